"""The numbers that a tree needs for itself, so that nobody takes them who helps to build it. Pure."""

from __future__ import annotations

from pipeline.errors import RebuildError
from pipeline.image.codec import Image


def highest_descriptor(image: Image) -> int:
    """The highest number, and the most descriptors, of any process."""
    tables = [process.fds for process in image.processes.values()]
    highest = max((entry.fd for table in tables for entry in table), default=0)
    return max(highest, max(map(len, tables), default=0), len(image.mapped_files))


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
