"""Soft-dirty bits: which pages a process has written since they were cleared, on kernels without better means.

Writing 4 to /proc/PID/clear_refs write-protects the whole memory of a process and clears its bits; a page that is
written, moved, or mapped anew gets its bit back, which is bit 55 of its entry in /proc/PID/pagemap. There is no call
that reads and clears at once: what is written in between is lost to whoever does both, unless the process stands still.

There is one set of bits for everybody. A garbage collector that looks at its own program's bits is misled by whoever
clears them, so they are left alone where somebody has clear_refs open (`users`).

A huge page has one bit: a program that writes here and there would seem to write everything. So they are split before
(`split_huge_pages`), which takes no more than to tell the kernel that a part of each is cold. Splitting sets the bits
of whatever was ever written.

A page that was dropped and then read shows the shared page of zeros, clean. Whoever may not see which pages those are
(`pipeline.kernel.pagemap`) has to suppose it of every clean page that is mapped more than once, or by nobody that
counts.

Sources: Documentation/admin-guide/mm/soft-dirty.rst, mm/pagemap.rst; clear_refs_write() and pagemap_pmd_range() in
fs/proc/task_mmu.c; process_madvise(2), madvise_cold_or_pageout_pte_range() in mm/madvise.c.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs, smaps
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.inside import open_file
from pipeline.kernel.pagemap import (
    PAGE_BYTES,
    Range,
    entries_of,
    is_private,
    may_be_zeros,
    merged,
    own_entry,
    without_zeros,
)
from pipeline.kernel.syscalls import pidfd_open, syscall

_CLEAR_SOFT_DIRTY = b"4"
_SOFT_DIRTY = 1 << 55
_HUGE_BYTES = 512 * PAGE_BYTES
_MADV_COLD = 20
_IOVEC = struct.Struct("<2Q")
#: UIO_MAXIOV
_MOST_PARTS = 1024

# what an entry says, a byte a page; the byte below its most significant one begins with the soft-dirty bit
_ITS_OWN, _MAYBE_ZEROS, _WRITTEN = 1, 2, 16
_CONTENT = bytes(
    (_MAYBE_ZEROS if may_be_zeros(top) else _ITS_OWN) if is_private(top) else 0 for top in range(256)
)
_DIRTY = bytes(_WRITTEN if second & 0x80 else 0 for second in range(256))
_RUN = re.compile(rb"(?P<written>[\x11\x12]+)|(?P<clean>\x01+)|(?P<doubtful>\x02+)")


class Bits(NamedTuple):
    """Pages with private content: those that were written since the bits were cleared, and those that surely were not.

    A page that is in neither has no content, or may be a page of zeros that came in place of a dropped one.
    """

    written: list[Range]
    clean: list[Range]


@functools.cache
def is_known() -> bool:
    """Whether this kernel keeps soft-dirty bits (CONFIG_MEM_SOFT_DIRTY): a page that was just written has it."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        return bool(own_entry(page) & _SOFT_DIRTY)


def users(pid: HostPid) -> Iterator[str]:
    """The clear_refs files that `pid` has open.

    Raises:
        ProcessGone: it has ended.
    """
    for number in procfs.list_dir(pid, "fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                continue
            raise
        if target.startswith("/proc/") and target.endswith("/clear_refs"):
            yield target


def clear(pid: HostPid) -> None:
    """Clear the bits of all the memory of a process, which stands still.

    Raises:
        ProcessLookupError: it has ended.
        OSError: EACCES: it may not be looked at.
    """
    try:
        fd = open_file(pid, "clear_refs", os.O_WRONLY)
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    try:
        os.write(fd, _CLEAR_SOFT_DIRTY)
    finally:
        os.close(fd)


def split_huge_pages(pid: HostPid) -> None:
    """Split the huge pages of a process into small ones, as far as that may be done; before `clear`, while it runs.

    Takes CAP_SYS_NICE in the initial user namespace; without it nothing happens.

    Raises:
        ProcessLookupError: it has ended.
    """
    found = smaps.with_huge_pages(pid)
    if not found:
        return
    process = pidfd_open(pid)
    try:
        for start, end in found:
            first = -(-start // _HUGE_BYTES) * _HUGE_BYTES
            parts = [_IOVEC.pack(at, PAGE_BYTES) for at in range(first, end - _HUGE_BYTES + 1, _HUGE_BYTES)]
            for at in range(0, len(parts), _MOST_PARTS):
                some = parts[at : at + _MOST_PARTS]
                with suppress(OSError):  # such as memory that is locked
                    syscall(NR.process_madvise, process, b"".join(some), len(some), _MADV_COLD, 0)
    finally:
        os.close(process)


def look(pagemap: LocalFd, ranges: Sequence[Range]) -> Bits:
    """What the bits of some ranges say; nothing is changed.

    Args:
        pagemap: an open /proc/PID/pagemap.
        ranges: ascending, disjoint, page aligned: private mappings.
    """
    written: list[Range] = []
    clean: list[Range] = []
    for start, end in ranges:
        for address, entries in entries_of(pagemap, start, end):
            for match in _RUN.finditer(_classes(entries)):
                first, last = match.span()
                run = (address + first * PAGE_BYTES, address + last * PAGE_BYTES)
                match match.lastgroup:
                    case "written":
                        written.append(run)
                    case "clean":
                        clean.append(run)
                    case _:
                        clean += without_zeros(run, entries[8 * first : 8 * last]) or []
    return Bits(merged(written), merged(clean))


def _classes(entries: bytes) -> bytes:
    content, dirty = entries[7::8].translate(_CONTENT), entries[6::8].translate(_DIRTY)
    both = int.from_bytes(content, "little") | int.from_bytes(dirty, "little")
    return both.to_bytes(len(content), "little")
