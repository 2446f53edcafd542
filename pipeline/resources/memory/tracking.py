"""Which private pages of a process were written since they were last read, while it runs.

One `Tracking` an address space, begun while it stood still. Each `collect` tells the pages that were written since the
one before. There are two kinds, and `begin` takes the first that the kernel has:

`WriteProtected` is a userfaultfd in asynchronous write-protect mode (`pipeline.kernel.userfaultfd`), made inside the
process, and known here by a duplicate. Each `collect` write-protects again what it tells; what is mapped anew is
registered then, and told whole. That a page is marked as protected says nothing where a mapping is not registered:
writes pass and leave the mark. Moved memory takes its marks along before Linux 6.13 ("clear uffd-wp PTE/PMD state on
mremap"); and where it is moved next to a mapping that is registered, both become one that is not, with the marks of the
older part, in later kernels, too. So marks count in registered mappings only, and are removed when one is registered.

`SoftDirty` clears the bits that the kernel keeps (`pipeline.kernel.soft_dirty`), for which the process has to stand
still at each `collect` but the first.

A mapping cannot be trusted to tell all where it may not be watched, and a whole process where devices write into its
pages behind the page tables: O_DIRECT and asynchronous I/O pin pages, and what arrives in a pinned page marks nothing
(the kernel has no pin in mind when it write-protects). Whoever uses the answers sends such memory once more, whole,
when the tree stands still.

Where a program has a userfaultfd for its own memory, nobody else may have one for the same mapping: `Unwatched`. One
that begins with that while it is tracked may be refused it (EBUSY); it is tracked no longer when that is seen.

Shared memory is not tracked: it can be written by whoever has it open. Nor are huge pages of hugetlbfs, but those of 2
MiB by userfaultfd: kernels before "use huge_page_size() in pagemap_scan_hugetlb_entry()" (2026) protect no larger
ones, and do not say so; and none has a soft-dirty bit.

Source: Documentation/admin-guide/mm/pagemap.rst, mm/userfaultfd.c, fs/proc/task_mmu.c (make_uffd_wp_pte).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import hugetlb, procfs, smaps, soft_dirty, userfaultfd
from pipeline.kernel.pagemap import PAGE_BYTES, Range, intersect, merged, open_pagemap, populated, written
from pipeline.kernel.smaps import Mapping
from pipeline.ledger import LEDGER
from pipeline.resources.memory.missing import RangeSet

#: the kernel's own mappings have no pages that are carried
_KERNELS = frozenset({b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"})

#: of huge pages of hugetlbfs, those that every PAGEMAP_SCAN write-protects
_PROTECTABLE_BYTES = 2 << 20

#: nobody has anything mapped here
_LAST_PAGE = 0x7FFF_FFFF_E000


class Written(NamedTuple):
    """What a `Tracking` tells: pages that were written, and ranges of which it cannot know."""

    runs: list[Range]
    unwatched: list[Range]


class TrackingLost(Exception):
    """What was sent is of no use: a process has ended, or executes another program. The text says what happened."""


class Tracking(ABC):
    """Watches the private memory of one process; see the module.

    Ownership: holds the watch until `close`; nothing of it is left in the process then.
    """

    #: the process has to stand still at each `collect` but the first
    stands_still = False

    @abstractmethod
    def collect(self) -> Written:
        """The pages that were written since the last call; at the first, all that have content.

        Raises:
            TrackingLost: see there.
        """

    @abstractmethod
    def untouched(self) -> list[Range]:
        """The pages that have content now, and have had it since the last `collect` without being written.

        Unless the process stands still at a `collect`, one behind it tells what had better not be trusted: memory
        that was moved.

        Raises:
            TrackingLost: see there.
        """

    @abstractmethod
    def may_watch(self, start: int, end: int) -> bool:
        """Whether these mappings can be watched: they are from now on. ProcessLookupError: the memory is gone."""

    @abstractmethod
    def check(self) -> None:
        """The process has the memory that is watched.

        Raises:
            TrackingLost: see there.
        """

    @abstractmethod
    def close(self) -> None:
        """Watch no longer; idempotent."""


def prepare(pids: Iterable[HostPid]) -> None:
    """What takes long and is better done before the processes stand still, for `begin` or for `Tracking.collect`.

    Huge pages are split where each would be told as a whole; khugepaged makes new ones all the time.
    """
    if userfaultfd.is_asynchronous() or not soft_dirty.is_known():
        return
    for pid in pids:
        # its first thread has ended, or a sandbox forbids it: then they are told as a whole
        with suppress(OSError):
            soft_dirty.split_huge_pages(pid)


def begin(pid: HostPid, inside: userfaultfd.Inside, *, answers: bool = False) -> Tracking:
    """Begin to watch.

    Args:
        pid: the process; stopped.
        inside: runs system calls in it.
        answers: it answers for page faults of its own, or may at any time.

    Raises:
        OSError: EINVAL, ENOSYS: this kernel cannot; EPERM: a sandbox forbids it.
        TrackingLost: it can only be done in a way that would disturb the program.
    """
    if answers:
        return Unwatched(pid)
    try:
        return WriteProtected(pid, inside)
    except OSError:
        if not soft_dirty.is_known():
            raise
        return SoftDirty(pid)


class WriteProtected(Tracking):
    """By userfaultfd.

    Args:
        pid, inside: see `begin`.

    Raises:
        OSError: see `pipeline.kernel.userfaultfd.make_inside`.

    Ownership: see `Tracking`; nor is anything left in the process if we are killed, but for what is said there.
    """

    def __init__(self, pid: HostPid, inside: userfaultfd.Inside) -> None:
        self._pid = pid
        #: what was registered at some time
        self._known = RangeSet()
        #: what the last look could not tell: a part of it may have been protected nevertheless
        self._untold: list[Range] = []
        self._fd = userfaultfd.make_inside(pid, inside)
        LEDGER.take("watch of memory", self._fd)
        try:
            userfaultfd.begin_tracking(self._fd)
        except BaseException:
            self.close()
            raise

    def collect(self) -> Written:
        try:
            pagemap = open_pagemap(self._pid)
        except procfs.ProcessGone:
            raise _lost(self._pid) from None
        runs: list[Range] = []
        unwatched: list[Range] = []
        try:
            if userfaultfd.has_one(self._pid):
                raise TrackingLost(f"pid {self._pid} has begun to answer page faults itself")
            for mapping in _private(smaps.maps(self._pid)):
                if hugetlb.devices().get(mapping.device, _PROTECTABLE_BYTES) != _PROTECTABLE_BYTES:
                    unwatched.append((mapping.start, mapping.end))
                    continue
                is_untold = bool(intersect([(mapping.start, mapping.end)], self._untold))
                found = self._written(pagemap, mapping, whole=is_untold)
                if found is None:
                    unwatched.append((mapping.start, mapping.end))
                else:
                    runs += found
        except ProcessLookupError:
            raise _lost(self._pid) from None
        finally:
            os.close(pagemap)
        self._untold = merged(unwatched)
        return Written(merged(runs), list(self._untold))

    def untouched(self) -> list[Range]:
        try:
            pagemap = open_pagemap(self._pid)
            try:
                found = _private(smaps.maps(self._pid))
                anonymous = [(one.start, one.end) for one in found if one.anonymous]
                return populated(pagemap, [(one.start, one.end) for one in found], anonymous).untouched
            finally:
                os.close(pagemap)
        except ProcessLookupError:
            raise _lost(self._pid) from None

    def _written(self, pagemap: LocalFd, mapping: Mapping, *, whole: bool) -> list[Range] | None:
        """None: it cannot be told. What comes before the part that is not watched is protected all the same."""
        start, end, anonymous = mapping.start, mapping.end, mapping.anonymous
        if self._known.within(start, end) != [(start, end)]:
            # whoever watches it may do so in the same way, and would lose what it marks
            if not userfaultfd.register(self._fd, start, end):
                return None
            self._known.add(start, end)
            whole = True
        found = written(pagemap, start, end, whole=whole, anonymous=anonymous)
        if found is None and userfaultfd.register(self._fd, start, end):
            found = written(pagemap, start, end, whole=True, anonymous=anonymous)
        if found is not None and found.before:
            # by marks, perhaps, that were there before it was watched: they let writes through
            if not userfaultfd.unprotect(self._fd, found.before[0][0], found.before[-1][1]):
                return None
            found = written(pagemap, start, end, whole=True, anonymous=anonymous)
        return found and found.runs

    def may_watch(self, start: int, end: int) -> bool:
        return userfaultfd.register(self._fd, start, end)

    def check(self) -> None:
        try:
            userfaultfd.register(self._fd, _LAST_PAGE, _LAST_PAGE + PAGE_BYTES)
        except ProcessLookupError:
            raise _lost(self._pid) from None

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, LocalFd(-1)
            os.close(fd)
            LEDGER.give_back("watch of memory", fd)


class SoftDirty(Tracking):
    """By soft-dirty bits.

    Args:
        pid: see `begin`.

    Raises:
        OSError: EACCES: it may not be looked at.
        TrackingLost: it looks at its own bits.
    """

    stands_still = True

    def __init__(self, pid: HostPid) -> None:
        self._pid = pid
        self._is_first = True
        for file in soft_dirty.users(pid):
            raise TrackingLost(f"pid {pid} looks at its own writes: it has {file} open")
        #: shows the memory that it has now, and never another
        self._pagemap = open_pagemap(pid)
        LEDGER.take("watch of memory", self._pagemap)
        try:
            soft_dirty.clear(pid)
        except BaseException:
            self.close()
            raise

    def collect(self) -> Written:
        found = self._mappings()
        unwatched: list[Range] = [(one.start, one.end) for one in found if one.device in hugetlb.devices()]
        if self._is_first:
            anonymous = [(one.start, one.end) for one in found if one.anonymous]
            runs = populated(self._pagemap, [(one.start, one.end) for one in found], anonymous).pages
            self._is_first = False
            return Written(runs, unwatched)
        runs = self._look(found).written
        try:
            soft_dirty.clear(self._pid)
        except ProcessLookupError:
            raise _lost(self._pid) from None
        return Written(runs, unwatched)

    def untouched(self) -> list[Range]:
        return self._look(self._mappings()).clean

    def _look(self, mappings: Sequence[Mapping]) -> soft_dirty.Bits:
        watched = [(one.start, one.end) for one in mappings if one.device not in hugetlb.devices()]
        return soft_dirty.look(self._pagemap, watched)

    def _mappings(self) -> list[Mapping]:
        try:
            found = _private(smaps.maps(self._pid))
        except ProcessLookupError:
            raise _lost(self._pid) from None
        self.check()
        return found

    def may_watch(self, start: int, end: int) -> bool:
        del start, end
        return False

    def check(self) -> None:
        if not os.pread(self._pagemap, 1 << 3, 0):
            raise _lost(self._pid)

    def close(self) -> None:
        if self._pagemap >= 0:
            fd, self._pagemap = self._pagemap, LocalFd(-1)
            os.close(fd)
            LEDGER.give_back("watch of memory", fd)


class Unwatched(Tracking):
    """Of a process whose memory others watch: nothing is told until it stands still.

    Args:
        pid: see `begin`.
    """

    def __init__(self, pid: HostPid) -> None:
        self._pid = pid

    def collect(self) -> Written:
        try:
            return Written([], merged((one.start, one.end) for one in _private(smaps.maps(self._pid))))
        except ProcessLookupError:
            raise _lost(self._pid) from None

    def untouched(self) -> list[Range]:
        return []

    def may_watch(self, start: int, end: int) -> bool:
        del start, end
        return False

    def check(self) -> None:
        """Nothing is taken for granted that would have to be."""

    def close(self) -> None:
        """Nothing is held."""


def _lost(pid: HostPid) -> TrackingLost:
    return TrackingLost(f"pid {pid} has ended, or has executed another program")


def _private(mappings: Sequence[Mapping]) -> list[Mapping]:
    return [mapping for mapping in mappings if not mapping.shared and mapping.name not in _KERNELS]
