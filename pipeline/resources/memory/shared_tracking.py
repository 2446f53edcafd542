"""Which pages of shared memory were written since they were last looked at, by whoever maps it, while it runs.

A page that is shared is written through the page tables of any process that maps it, and each has marks of its own
(`pipeline.kernel.userfaultfd`); only what is marked as protected in all of them was not written. That is sound where
all of them are known at both ends of a time in which none has come or gone:

* It is memory of MAP_SHARED | MAP_ANONYMOUS, which the tree has no descriptor of: nobody can map it who was not forked
  from somebody that has it mapped, nor write to it in another way. (Whoever may open /proc/PID/map_files, as root of
  the machine may, could; of such there is the pipeline.)
* Nobody outside of the tree has it mapped when it begins (`windows`, asked for all processes that can be seen here).
* Whoever is forked is told of (`following`), and told whether he still has it: as many such children have to be found
  in the tree as there are. Whatever else a process does with its mapping, where it was is missing then, or is watched
  no longer, and nothing is known.
* What is not mapped by a process (any more) is not marked: the kernel takes pages out of page tables when it swaps, or
  is told to (MADV_DONTNEED), and the marks of what was written go with them.
* Only where it has data it is marked, since marks take page tables in each process; data that is elsewhere by now may
  have been written.
* Who makes a hole (MADV_REMOVE) writes nothing, and the marks stay. It is told of before it is made, in a system call
  that is over when what may have been written is read (`pipeline.stages.grace`).

If it is not so at a look, nothing is known of that one, and all of it is compared (`pipeline.stages.sent`), as is what
is not watched at all: memory that is small, that has descriptors, that many processes map, all of which have to be
looked at; or where forks are not told of, to anybody but root of the machine.

Devices write behind the page tables here, too: see `pipeline.resources.memory.tracking`.

Source: fs/proc/task_mmu.c (pagemap_scan_pmd_entry, make_uffd_wp_pte); mm/memory.c (zap_install_uffd_wp_if_needed).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs, userfaultfd
from pipeline.kernel.pagemap import Range, intersect, open_pagemap, subtract, union, unmarked
from pipeline.kernel.procfs import ProcessGone
from pipeline.kernel.smaps import parse_maps
from pipeline.resources.memory.following import Following
from pipeline.resources.memory.objects import InodeKey, SharedObject, Window
from pipeline.resources.memory.pages import data_runs

#: less is compared in the time that it takes to ask
_LARGE_BYTES = 8 << 20
#: to look at so many mappings takes about half as long as to compare it
_MOST_SHARES = 16
#: what a page table is for
_TABLE_BYTES = 2 << 20


class Shown(NamedTuple):
    """Shared memory now: an open file description of our own, its size, and where the tree has it mapped."""

    fd: LocalFd
    size_bytes: int
    windows: Sequence[Window]


def is_worth_it(shared: SharedObject) -> bool:
    """Whether it is of the kind that can be watched, and it pays."""
    record = shared.record
    mapped = sum(window.end - window.start for window in shared.windows)
    return (
        record.kind == "anon"
        and not record.hugetlb
        and shared.fd is not None
        and not shared.is_open
        and record.size_bytes >= _LARGE_BYTES
        and mapped <= _MOST_SHARES * record.size_bytes
    )


def windows(pids: Iterable[HostPid], keys: Mapping[InodeKey, int]) -> dict[int, list[Window]]:
    """Where these processes have shared memory mapped now, by its space; whoever has ended has none.

    Args:
        pids: of this host.
        keys: the spaces of what to look for, by device and inode.

    Raises:
        OSError: EACCES: one may not be looked at.
    """
    found: dict[int, list[Window]] = {space: [] for space in keys.values()}
    inodes = [b" %d " % inode for _, inode in keys]
    for pid in pids:
        with suppress(ProcessGone):
            content = procfs.read_file(pid, "maps")
            for mapping in parse_maps(content) if any(inode in content for inode in inodes) else ():
                space = keys.get((mapping.device, mapping.inode))
                if space is not None:
                    found[space].append(Window(pid, mapping.start, mapping.end, mapping.offset))
    return found


class SharedTracking:
    """Watches shared memory of one tree; see the module.

    Ownership: holds the watch until `close`; nothing of it is left in any process then, but page tables.
    """

    def __init__(self) -> None:
        self._following: Following | None = None
        self._begun: set[HostPid] = set()
        #: by space: where it has had data, in whole page tables
        self._data: dict[int, list[Range]] = {}
        #: by space: where it was mapped, and all of its data was marked, at the last look
        self._marked: dict[int, frozenset[Window]] = {}

    def begin(self, pid: HostPid, inside: userfaultfd.Inside, shown: Sequence[Window]) -> bool:
        """Begin to watch what a process shows of shared memory; whether it could be done.

        Args:
            pid: the process; stopped.
            inside: runs system calls in it.
            shown: its mappings.
        """
        try:
            if self._following is None:
                self._following = Following()
            fd = userfaultfd.make_inside(pid, inside)
            try:
                userfaultfd.begin_following(fd)
            except BaseException:
                os.close(fd)
                raise
            self._following.add(fd)
            self._begun.add(pid)
            return all(userfaultfd.register(fd, window.start, window.end) for window in shown)
        except OSError:
            return False

    def collect(self, shown: Mapping[int, Shown]) -> dict[int, list[Range] | None]:
        """Offsets of the pages that may have been written since the last call, by space; None: any.

        Args:
            shown: what is watched, each space.
        """
        if self._following is None:
            return dict.fromkeys(shown)
        told = self._following.look()
        found: dict[int, list[Range] | None] = {}
        pagemaps: dict[HostPid, LocalFd] = {}
        try:
            for space, (fd, size_bytes, where) in shown.items():
                forked = {window.pid for window in where} - self._begun
                before = self._marked.pop(space, None)
                data = self._data[space] = _with_new_data(fd, size_bytes, self._data.get(space, []))
                runs = _unmarked(where, data, pagemaps) if len(forked) == told.children else None
                if runs is not None:
                    self._marked[space] = frozenset(where)
                is_known = told.is_calm and before is not None and before <= frozenset(where)
                found[space] = runs if is_known else None
        finally:
            for pagemap in pagemaps.values():
                os.close(pagemap)
        return found

    def close(self) -> None:
        """Watch no longer; idempotent."""
        if self._following is not None:
            following, self._following = self._following, None
            following.close()


def _with_new_data(fd: LocalFd, size_bytes: int, data: Sequence[Range]) -> list[Range]:
    """Where there is data by now, in whole page tables, and where there was."""
    found: list[Range] = []
    for start, end in subtract([(0, size_bytes)], data):
        for begin, stop in data_runs(fd, end, start):
            found = union(
                found, [(begin - begin % _TABLE_BYTES, min(stop + -stop % _TABLE_BYTES, size_bytes))]
            )
    return union(data, found)


def _unmarked(
    where: Sequence[Window], data: Sequence[Range], pagemaps: dict[HostPid, LocalFd]
) -> list[Range] | None:
    """Offsets of the data that is not marked in all of these; None if one is not watched, or its process has ended."""
    found: list[Range] = []
    for window in where:
        shift = window.offset - window.start
        for begin, stop in intersect(data, [(window.start + shift, window.end + shift)]):
            try:
                if window.pid not in pagemaps:
                    pagemaps[window.pid] = open_pagemap(window.pid)
                runs = unmarked(pagemaps[window.pid], begin - shift, stop - shift)
            except (ProcessGone, OSError):
                return None
            if runs is None:
                return None
            found = union(found, [(start + shift, end + shift) for start, end in runs])
    return found
