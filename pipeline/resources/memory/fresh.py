"""Memory of a puppet in which pages are missing, and into which they are put: UFFDIO_COPY.

Who writes to a page that is missing has the kernel make one, clear it and map it first, one by one. To put a page is to
make it of what it is to hold: less than half of the work. It takes a userfaultfd for missing pages, for which nobody
waits: it is one for faults of user space only, and the puppet runs nothing but system calls. Whoever else touches a
page that is missing, as the kernel does for a system call, is told EFAULT instead of finding zeros; so it is closed
before the puppet is given more than its memory.

Only large mappings are worth it; and not those that get huge pages by themselves, whose pages are made 512 at a time.

Sources: ioctl_userfaultfd(2), UFFDIO_COPY; userfaultfd(2), UFFD_USER_MODE_ONLY; a child's mappings are not watched by
it (dup_userfaultfd() in fs/userfaultfd.c); Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import AddressSpace
from pipeline.kernel import uffdio, userfaultfd
from pipeline.kernel.pagemap import Range, intersect, open_pagemap, present, subtract, union
from pipeline.kernel.uffdio import MODE
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet
from pipeline.resources.memory import later
from pipeline.resources.memory.classify import MADV_HUGEPAGE, MADV_NOHUGEPAGE

_ENTRY = "fresh memory"
#: of a mapping, from which on it is worth it
_LARGE_BYTES = 8 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Fresh:
    """The large mappings of a puppet, as long as it is not closed; see the module.

    Args:
        pid: the puppet.
        fd: a userfaultfd of its memory, owned from now on.
        ranges: the mappings, ascending.

    Raises:
        OSError: they cannot be watched, all of them.
    """

    def __init__(self, pid: HostPid, fd: LocalFd, ranges: list[Range]) -> None:
        self._pid = pid
        self._fd = fd
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]
        LEDGER.take(_ENTRY, fd)
        try:
            uffdio.begin(fd)
            for start, end in ranges:
                uffdio.register(fd, start, end, MODE.MISSING)
        except BaseException:
            self.close()
            raise

    def put(self, start: int, content: memoryview) -> int:
        """Put pages where they are missing; the bytes from `start` on that were: less where a page is there already."""
        done = 0
        while wanted := self._within_one(start + done, len(content) - done):
            put = self._put(start + done, content[done : done + wanted])
            done += put
            if put < wanted:
                break
        return done

    def _within_one(self, start: int, length: int) -> int:
        """How much of a range is in the mapping where it begins: so much may be put at once."""
        at = bisect_right(self._starts, start) - 1
        return max(0, min(length, self._ends[at] - start)) if at >= 0 else 0

    def _put(self, start: int, content: memoryview) -> int:
        try:
            return uffdio.copy(self._fd, start, content)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT):
                return 0
            raise

    def touchable(self, start: int, end: int) -> list[Range]:
        """What of [start, end) may be touched; the rest are pages that are missing, zeros."""
        ranges = list(zip(self._starts, self._ends, strict=True))
        pagemap = open_pagemap(self._pid)
        try:
            there = present(pagemap, intersect([(start, end)], ranges))
        finally:
            os.close(pagemap)
        return union(subtract([(start, end)], ranges), there)

    def close(self) -> None:
        """What is missing from here on is zeros; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, LocalFd(-1)
            os.close(fd)
            LEDGER.give_back(_ENTRY, fd)


def fresh(puppet: Puppet, space: AddressSpace) -> Fresh | None:
    """The large mappings of `space`, which the puppet has; None if there are none, or this kernel cannot."""
    ranges = list(_worth_it(space))
    if not ranges:
        return None
    try:
        return Fresh(puppet.pid, userfaultfd.make_inside(puppet.pid, puppet.syscall), ranges)
    except OSError:  # no such call, no room, not for us: there are other ways to write
        return None


def _worth_it(space: AddressSpace) -> Iterator[Range]:
    advised, always = _huge_pages()
    mappings = set(later.mappings(space))
    for vma in space.vmas:
        is_huge = advised and not space.thp_disable and MADV_NOHUGEPAGE not in vma.advice
        if is_huge and (always or MADV_HUGEPAGE in vma.advice):
            continue
        if (vma.start, vma.end) in mappings and vma.end - vma.start >= _LARGE_BYTES:
            yield vma.start, vma.end


def _huge_pages() -> tuple[bool, bool]:
    """Whether who asks for huge pages gets them, and whether everybody does."""
    try:
        chosen = _HUGE_PAGES.read_text()
    except OSError:
        return False, False
    return "[never]" not in chosen, "[always]" in chosen
