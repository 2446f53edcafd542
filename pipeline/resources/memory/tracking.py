"""Which private pages of a process were written since they were last read, while it runs.

One `Tracking` an address space: a userfaultfd in asynchronous write-protect mode (`pipeline.kernel.userfaultfd`), made
inside the process while it stood still, and known here by a duplicate. Each `collect` tells the pages that were written
since the one before and write-protects them again; what is mapped anew is registered then, and told whole: before
Linux 6.13 ("clear uffd-wp PTE/PMD state on mremap") moved memory takes its protection along, and would look unwritten.

A mapping cannot be trusted to tell all where it may not be watched, and a whole process where devices write into its
pages behind the page tables: O_DIRECT and asynchronous I/O pin pages, and what arrives in a pinned page marks nothing
(the kernel has no pin in mind when it write-protects). Whoever uses the answers sends such memory once more, whole,
when the tree stands still.

Shared memory is not tracked: it can be written by whoever has it open.

Source: Documentation/admin-guide/mm/pagemap.rst, mm/userfaultfd.c, fs/proc/task_mmu.c (make_uffd_wp_pte).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs, smaps, userfaultfd
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import PAGE_BYTES, Range, merged, open_pagemap, populated, written
from pipeline.kernel.smaps import Mapping
from pipeline.kernel.syscalls import pidfd_getfd, pidfd_open
from pipeline.ledger import LEDGER

#: the kernel's own mappings have no pages that are carried
_KERNELS = frozenset({b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"})

#: nobody has anything mapped here
_LAST_PAGE = 0x7FFF_FFFF_E000

#: runs a system call inside a process
Inside = Callable[..., int]


class Written(NamedTuple):
    """What a `Tracking` tells: pages that were written, and ranges of which it cannot know."""

    runs: list[Range]
    unwatched: list[Range]


class TrackingLost(Exception):
    """What was sent is of no use: a process has ended, or executes another program. The text says what happened."""


class Tracking:
    """Watches the private memory of one process.

    Args:
        pid: the process; stopped.
        inside: runs system calls in it.

    Raises:
        OSError: EINVAL, ENOSYS: this kernel cannot; EPERM: a sandbox forbids it.

    Ownership: holds the watch until `close`; nothing of it is left in the process then, nor if we are killed: but for
    a descriptor that watches nothing, if that happens just between the calls that make it.
    """

    def __init__(self, pid: HostPid, inside: Inside) -> None:
        self._pid = pid
        self._fd = LocalFd(-1)
        number = inside(NR.userfaultfd, userfaultfd.MAKE_FLAGS)
        try:
            try:
                process = pidfd_open(pid, 0 if procfs.status(pid).tgid == pid else os.O_EXCL)  # PIDFD_THREAD
                try:
                    self._fd = pidfd_getfd(process, number)
                    LEDGER.take("watch of memory", self._fd)
                finally:
                    os.close(process)
            finally:
                inside(NR.close, number)
            userfaultfd.begin_tracking(self._fd)
        except BaseException:
            self.close()
            raise

    def collect(self) -> Written:
        """The pages that were written since the last call; at the first, all that have content.

        Raises:
            TrackingLost: see there.
        """
        try:
            pagemap = open_pagemap(self._pid)
        except procfs.ProcessGone:
            raise TrackingLost(self._gone) from None
        runs: list[Range] = []
        unwatched: list[Range] = []
        try:
            for mapping in _private(smaps.maps(self._pid)):
                found = self._written(pagemap, mapping)
                if found is None:
                    unwatched.append((mapping.start, mapping.end))
                else:
                    runs += found
        except ProcessLookupError:
            raise TrackingLost(self._gone) from None
        finally:
            os.close(pagemap)
        return Written(merged(runs), merged(unwatched))

    def untouched(self) -> list[Range]:
        """The pages that have content now, and have had it since the last `collect` without being written.

        A `collect` behind it tells what had better not be trusted: memory that was moved.

        Raises:
            TrackingLost: see there.
        """
        try:
            pagemap = open_pagemap(self._pid)
            try:
                found = _private(smaps.maps(self._pid))
                anonymous = [(one.start, one.end) for one in found if one.anonymous]
                return populated(pagemap, [(one.start, one.end) for one in found], anonymous).untouched
            finally:
                os.close(pagemap)
        except ProcessLookupError:
            raise TrackingLost(self._gone) from None

    @property
    def _gone(self) -> str:
        return f"pid {self._pid} has ended, or has executed another program"

    def _written(self, pagemap: LocalFd, mapping: Mapping) -> list[Range] | None:
        start, end, anonymous = mapping.start, mapping.end, mapping.anonymous
        runs = written(pagemap, start, end, whole=False, anonymous=anonymous)
        if runs is None and userfaultfd.register(self._fd, start, end):
            runs = written(pagemap, start, end, whole=True, anonymous=anonymous)
        return runs

    def may_watch(self, start: int, end: int) -> bool:
        """Whether these mappings can be watched: they are from now on. ProcessLookupError: the memory is gone."""
        return userfaultfd.register(self._fd, start, end)

    def check(self) -> None:
        """The process has the memory that is watched.

        Raises:
            TrackingLost: see there.
        """
        try:
            userfaultfd.register(self._fd, _LAST_PAGE, _LAST_PAGE + PAGE_BYTES)
        except ProcessLookupError:
            raise TrackingLost(self._gone) from None

    def close(self) -> None:
        """Watch no longer; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, LocalFd(-1)
            os.close(fd)
            LEDGER.give_back("watch of memory", fd)


def _private(mappings: Sequence[Mapping]) -> list[Mapping]:
    return [mapping for mapping in mappings if not mapping.shared and mapping.name not in _KERNELS]
