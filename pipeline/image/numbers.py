"""The numbers that a tree needs for itself, so that nobody takes them who helps to build it. Pure."""

from __future__ import annotations

from pipeline.errors import RebuildError
from pipeline.image.codec import Image

#: what a puppet has of its own: its channel, its program, and what tells the kernel the next pid
PUPPET_FDS = 3
#: and none of them below
_LOWEST = 200
#: and so many numbers lie between them and as many as the tree needs at once
_DISTANCE = 64


def descriptors(image: Image) -> set[int]:
    """The numbers of the descriptors of all processes."""
    return {entry.fd for process in image.processes.values() for entry in process.fds}


def most_descriptors(image: Image) -> int:
    """How many descriptors a process of the tree, or who maps its files, has at once."""
    tables = max((len(process.fds) for process in image.processes.values()), default=0)
    return max(tables, len(image.mapped_files))


def puppet_descriptors(image: Image, spare: int) -> range:
    """Numbers for the own descriptors of a puppet: `PUPPET_FDS` in a row that no process of the tree has.

    They need not be above all of the tree's: some programs have theirs just below the hard limit (Valgrind).

    Args:
        spare: so many descriptors a process may have beyond those of the image.
    """
    taken = descriptors(image)
    start = max(most_descriptors(image) + spare + _DISTANCE, _LOWEST)
    while not taken.isdisjoint(range(start, start + PUPPET_FDS)):
        start += 1
    return range(start, start + PUPPET_FDS)


def reserved_pids(image: Image, new_pidns: bool) -> list[set[int]]:
    """Pids of its tasks, groups and sessions, by the level of the pid namespace, the outermost first.

    Args:
        new_pidns: there is one more around the tree, whose pids nobody has chosen.

    Raises:
        RebuildError: the tree has the number of the first process there.
    """
    reserved: list[set[int]] = []
    for process in image.processes.values():
        for pids in [process.pids, *(thread.pids for thread in process.threads)]:
            for level, pid in enumerate(pids):
                while len(reserved) <= level:
                    reserved.append(set())
                reserved[level].add(pid)
    groups = {number for process in image.processes.values() for number in (process.sid, process.pgid)}
    if new_pidns:
        reserved.insert(0, set())
        if 1 in reserved[1]:
            raise RebuildError("the tree holds pid 1 itself; it needs no pid namespace around it")
        reserved[1] |= groups
    elif reserved:
        reserved[0] |= groups
    return reserved
