"""Which pages of an address space hold something of their own: PAGEMAP_SCAN, or /proc/PID/pagemap.

A private page is worth saving if it is present or swapped out, is not a page of the
mapped file and is not the shared zero page. A guard page (MADV_GUARD_INSTALL) looks
like a swapped one and is told apart by its own category.

PAGEMAP_SCAN (since 6.7) walks page tables at about 1 GiB in 10 ms and skips what was
never touched. Before that kernel the 64-bit entries of /proc/PID/pagemap are read. In
them the zero page is known by its number, which only CAP_SYS_ADMIN in the initial user
namespace may see: to others such pages seem populated.

Sources: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/fs.h, madvise(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntFlag
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.inside import open_file
from pipeline.kernel.procfs import ProcessGone

PAGE_BYTES = 4096
#: [start, end) in bytes
Range = tuple[int, int]

_PAGEMAP_SCAN = 0xC0606610
_ARG = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
#: how many runs one call tells: the first, of what mostly has few, and any after it
_FIRST_REGIONS, _REGIONS = 1024, 16384
_ENTRY = struct.Struct("<Q")
_ENTRY_BYTES = _ENTRY.size
_FRAME_NUMBER = (1 << 55) - 1
_KPF_ZERO_PAGE = 1 << 24
_HUGE_PAGES = 512
_HUGE_BYTES = _HUGE_PAGES * PAGE_BYTES
#: of memory, whose entries are read at once
_READ_BYTES = 512 << 20
#: from this size on, anonymous memory is scanned by itself
_LARGE_BYTES = 1 << 20
#: in pieces of so much; of a mapping of terabytes, in so many
_PIECE_BYTES, _PIECES = 64 << 20, 16


#: PM_SCAN_*: write-protect what matches; EPERM where a mapping is not watched
WP_MATCHING = 1
CHECK_WPASYNC = 2


class CATEGORY(IntFlag):
    """PAGE_IS_* of include/uapi/linux/fs.h."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


def open_pagemap(pid: HostPid) -> LocalFd:
    """Open /proc/PID/pagemap; the caller owns it.

    It shows the memory that `pid` has *now*: after an exec of the target it silently shows nothing.

    Raises:
        ProcessGone: there is no such process.
        OSError: EACCES, EPERM: it may not be traced.
    """
    try:
        return open_file(pid, "pagemap", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGone(pid) from None


def scan(
    fd: LocalFd,
    start: int,
    end: int,
    *,
    flags: int = 0,
    inverted: int = 0,
    mask: int = 0,
    anyof: int = 0,
    returned: int = 0,
) -> list[tuple[int, int, int]]:
    """PAGEMAP_SCAN of [start, end): (start, end, categories) of every run of matching pages, ascending.

    Args:
        fd: an open /proc/PID/pagemap.
        start: page aligned, as `end`; holes inside are skipped.
        flags: `WP_MATCHING`, `CHECK_WPASYNC`.
        inverted: categories that count as set when they are not.
        mask: all of these must be set (after inversion).
        anyof: at least one of these must be set.
        returned: the categories that are told, and that runs are cut by.

    Raises:
        OSError: ENOTTY or EINVAL: this kernel has no PAGEMAP_SCAN, or not this category;
            EPERM: PM_SCAN_CHECK_WPASYNC on a range without it; ESRCH: the memory is gone.
    """
    regions = min(_FIRST_REGIONS, _REGIONS)
    found: list[tuple[int, int, int]] = []
    while start < end:
        regions = min(regions, (end - start) // PAGE_BYTES + 1)
        vector = ctypes.create_string_buffer(_REGION.size * regions)
        address = ctypes.addressof(vector)
        argument = bytearray(
            _ARG.pack(_ARG.size, flags, start, end, 0, address, regions, 0, inverted, mask, anyof, returned)
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
        found.extend(_REGION.iter_unpack(memoryview(vector).cast("B")[: _REGION.size * count]))
        if count < regions:
            break
        # The kernel walks in parts of its own, and where the last of them ended well, the address says where an
        # earlier one did: what lies behind it was found already.
        walked = max(_ARG.unpack(argument)[4], found[-1][1])
        if walked <= start:
            break
        start = walked
        regions = _REGIONS
    return found


#: what PAGEMAP_SCAN fails with where there is none
_NO_SCAN = frozenset({errno.ENOTTY, errno.EINVAL})
_HAS = CATEGORY.PRESENT | CATEGORY.SWAPPED
_NOT = CATEGORY.FILE | CATEGORY.PFNZERO
#: as numbers: they are looked at run by run
_GUARD, _WRITTEN, _WATCHED = int(CATEGORY.GUARD), int(CATEGORY.WRITTEN), int(CATEGORY.WPALLOWED)


class Protected(NamedTuple):
    """What `written` has found: `runs` of pages, ascending, and those of them that looked protected `before`."""

    runs: list[Range]
    before: list[Range]


def written(fd: LocalFd, start: int, end: int, *, whole: bool, anonymous: bool = False) -> Protected | None:
    """Pages with private content that were written since the last call, which write-protects them again.

    Args:
        fd: an open /proc/PID/pagemap.
        start, end: of mappings that are watched, see `pipeline.kernel.userfaultfd`.
        whole: all pages with private content, written or not. Those that looked protected before are left as they are:
            if what marks them was there before the mapping was watched, writes go unnoticed.
        anonymous: there is no file behind it; see `populated`.

    Returns:
        None if something in between is not watched (any more).
    """
    excluded = CATEGORY.PFNZERO if anonymous else _NOT
    excluded |= CATEGORY.GUARD if _knows_guards() else 0
    mask = excluded if whole else excluded | CATEGORY.WRITTEN
    try:
        runs = scan(
            fd,
            start,
            end,
            flags=WP_MATCHING | CHECK_WPASYNC,
            inverted=excluded,
            mask=mask,
            anyof=_HAS,
            returned=CATEGORY.WRITTEN if whole else 0,
        )
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return None
    before = [(a, b) for a, b, categories in runs if not categories & _WRITTEN] if whole else []
    return Protected(merged((a, b) for a, b, _ in runs), before)


def unmarked(fd: LocalFd, start: int, end: int) -> list[Range] | None:
    """Pages of a shared mapping that are not marked as protected by its watch; they are marked from now on.

    Not marked are those that were written through this mapping since they were, and those that it does not show (any
    more): the kernel may have taken a page that was written out of it. Page tables are made for all of it.

    Args:
        fd: an open /proc/PID/pagemap.
        start, end: of a mapping that is watched, see `pipeline.kernel.userfaultfd`.

    Returns:
        Ascending; None if something in between is not watched (any more).
    """
    flags = WP_MATCHING | CHECK_WPASYNC
    try:
        # what is written between the two is there at the second one, and not marked at the next look
        there = scan(fd, start, end, flags=flags, mask=CATEGORY.WRITTEN)
        not_there = scan(fd, start, end, flags=flags, inverted=_HAS, mask=_HAS)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return None
    return union([(a, b) for a, b, _ in there], [(a, b) for a, b, _ in not_there])


@functools.cache
def _knows_guards() -> bool:
    """Whether PAGEMAP_SCAN has the category of guard pages (since 6.15)."""
    fd = LocalFd(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    try:
        scan(fd, PAGE_BYTES, 2 * PAGE_BYTES, mask=CATEGORY.GUARD, returned=CATEGORY.GUARD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(fd)
    return True


class Populated(NamedTuple):
    """What an address space has in some ranges: maximal [start, end) runs, ascending.

    `pages`: private content that is to be saved. `guards`: guard pages. `untouched`: those of `pages` that are
    write-protected by a userfaultfd that watches them: not written since. (The mark alone says little: a mapping that
    grows by one that is moved next to it is not watched any longer, and keeps the marks that it has, whoever writes.)
    """

    pages: list[Range]
    guards: list[Range]
    untouched: list[Range]


def populated(fd: LocalFd, ranges: Sequence[Range], anonymous: Sequence[Range] = ()) -> Populated:
    """Pages with private content, and guard pages, of one address space.

    Args:
        fd: an open /proc/PID/pagemap.
        ranges: ascending, disjoint, page aligned: the mappings to look at. They are scanned in one
            go from the first to the last; what lies between them is left out.
        anonymous: those of them that have no file behind them. Large ones are looked at by themselves: the kernel need
            not be asked what each page belongs to, which takes it most of the time. And from their end: who reads smaps
            meanwhile begins at the other, and two who walk side by side wait for each other at every page table.

    Returns:
        What lies inside of `ranges`. Pages of shared memory and of mapped files are not among it.
    """
    if not ranges:
        return Populated([], [], [])
    try:
        spans = reversed(list(_spans(ranges, anonymous)))
        scanned = [_scan_populated(fd, start, end, is_anonymous) for start, end, is_anonymous in spans]
        runs = [run for found in reversed(scanned) for run in found]
    except OSError as error:
        if error.errno not in _NO_SCAN:
            raise
        runs = list(_read_populated(fd, ranges))
    found = Populated([], [], [])
    for start, end, categories in runs:
        if categories & _GUARD:
            found.guards.append((start, end))
            continue
        found.pages.append((start, end))
        if categories & (_WATCHED | _WRITTEN) == _WATCHED:
            found.untouched.append((start, end))
    return Populated(*(intersect(one, ranges) for one in found))


def present(fd: LocalFd, ranges: Sequence[Range]) -> list[Range]:
    """Everything in `ranges` at which a touch is no fault of a missing page: also pages of zeros, and swapped ones.

    Args:
        fd, ranges: as for `populated`.
    """
    if not ranges:
        return []
    try:
        runs = scan(fd, ranges[0][0], ranges[-1][1], anyof=_HAS)
    except OSError as error:
        if error.errno not in _NO_SCAN:
            raise
        return merged(run for run, _, _ in _read_runs(fd, ranges, _THERE))
    return intersect([(start, end) for start, end, _ in runs], ranges)


def _spans(ranges: Sequence[Range], anonymous: Sequence[Range]) -> Iterator[tuple[int, int, bool]]:
    """Where to scan, in order, and whether that is anonymous."""
    at, last = ranges[0][0], ranges[-1][1]
    for start, end in anonymous:
        if end - start >= _LARGE_BYTES:
            if at < start:
                yield at, start, False
            piece = max(_PIECE_BYTES, (end - start) // _PIECES // PAGE_BYTES * PAGE_BYTES)
            for at in range(start, end, piece):
                yield at, min(at + piece, end), True
            at = end
    if at < last:
        yield at, last, False


def _scan_populated(fd: LocalFd, start: int, end: int, is_anonymous: bool) -> list[tuple[int, int, int]]:
    excluded = CATEGORY.PFNZERO if is_anonymous else _NOT
    # before 6.15 guards cannot be told from swapped pages (and are read as EFAULT)
    told = CATEGORY.WPALLOWED | CATEGORY.WRITTEN | (CATEGORY.GUARD if _knows_guards() else 0)
    return scan(fd, start, end, inverted=excluded, mask=excluded, anyof=_HAS, returned=told)


# -- without PAGEMAP_SCAN --------------------------------------------------------------------

# The most significant byte of an entry: present 0x80, swapped 0x40, file or shared 0x20, guard 0x04, uffd-wp 0x02,
# mapped once 0x01. A run of pages is a run of such bytes. The page of zeros is mapped by nobody that counts.


def _run_of(**kinds: Callable[[int], object]) -> re.Pattern[bytes]:
    classes = {name: bytes(top for top in range(256) if matches(top)) for name, matches in kinds.items()}
    return re.compile(
        b"|".join(b"(?P<%s>[%s]+)" % (name.encode(), re.escape(one)) for name, one in classes.items())
    )


def is_private(top: int) -> bool:
    """Whether a page has content of its own, by the most significant byte of its entry: also that of zeros."""
    return bool(top & 0xC0 and not top & 0x24)


def may_be_zeros(top: int) -> bool:
    """Whether a page may be that of zeros, by the most significant byte of its entry."""
    return is_private(top) and top & 0x81 == 0x80


_POPULATED = _run_of(
    pages=lambda top: is_private(top) and not may_be_zeros(top),
    doubtful=may_be_zeros,
    guards=lambda top: top & 0x04,
)
_THERE = _run_of(pages=lambda top: top & 0xC0)


def _read_populated(fd: LocalFd, ranges: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
    """(start, end, categories), as a scan tells them."""
    for run, entries, kind in _read_runs(fd, ranges, _POPULATED):
        if kind == "guards":
            yield *run, _GUARD
        else:
            there = without_zeros(run, entries) if kind == "doubtful" else None
            yield from ((start, end, _WRITTEN) for start, end in ([run] if there is None else there))


def _read_runs(
    fd: LocalFd, ranges: Sequence[Range], pattern: re.Pattern[bytes]
) -> Iterator[tuple[Range, bytes, str | None]]:
    for start, end in ranges:
        for address, entries in entries_of(fd, start, end):
            for match in pattern.finditer(entries[7::8]):
                first, last = match.span()
                run = (address + first * PAGE_BYTES, address + last * PAGE_BYTES)
                yield run, entries[first * _ENTRY_BYTES : last * _ENTRY_BYTES], match.lastgroup


def without_zeros(run: Range, entries: bytes) -> list[Range] | None:
    """The pages of a run that are not that of zeros; None where the kernel does not let us know.

    Args:
        entries: of the pages of the run.
    """
    frames = [entry & _FRAME_NUMBER for (entry,) in _ENTRY.iter_unpack(entries)]
    zeros = _page_of_zeros()
    if not zeros or 0 in frames:
        return None
    start = run[0]
    none = [
        (start + index * PAGE_BYTES, start + (index + 1) * PAGE_BYTES)
        for index, frame in enumerate(frames)
        if frame == zeros
    ]
    # where a huge page can begin: the kernel maps that of zeros whole
    for index in range(-(start // PAGE_BYTES) % _HUGE_PAGES, len(frames) - _HUGE_PAGES + 1, _HUGE_PAGES):
        if frames[index] % _HUGE_PAGES == 0:
            try:
                is_zeros = _is_huge_page_of_zeros(frames[index])
            except OSError:
                return None
            if is_zeros:
                at = start + index * PAGE_BYTES
                none.append((at, at + _HUGE_BYTES))
    return subtract([run], merged(sorted(none)))


@functools.cache
def _page_of_zeros() -> int:
    """Its number; 0 if it is hidden from us."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page.read(1)  # too small for the huge one
        return own_entry(page) & _FRAME_NUMBER


def _is_huge_page_of_zeros(frame: int) -> bool:
    """Whether a huge page that begins there is the one of zeros; OSError: that may not be asked."""
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.pread(fd, _ENTRY.size, frame * _ENTRY.size)
    finally:
        os.close(fd)
    return bool(_ENTRY.unpack(flags)[0] & _KPF_ZERO_PAGE)


def own_entry(memory: mmap.mmap) -> int:
    """The entry of the first page of a mapping of this process."""
    first = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(first)
    del first  # it holds the mapping open
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = os.pread(fd, _ENTRY.size, address // PAGE_BYTES * _ENTRY.size)
    finally:
        os.close(fd)
    return int(_ENTRY.unpack(entry)[0])


def entries_of(fd: LocalFd, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Raw 8-byte entries of the pages of [start, end), in pieces: (address of the first page, entries).

    No huge page lies in two pieces.
    """
    while start < end:
        until = min((start + _READ_BYTES) // _HUGE_BYTES * _HUGE_BYTES, end)
        wanted = (until - start) // PAGE_BYTES * _ENTRY_BYTES
        entries = os.pread(fd, wanted, start // PAGE_BYTES * _ENTRY_BYTES)
        if not entries:
            return
        yield start, entries
        start += len(entries) // _ENTRY_BYTES * PAGE_BYTES


# -- arithmetic of ranges ------------------------------------------------------------------

#: behind every address
_BEYOND = (1 << 65, 1 << 65)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Join neighbours that touch; the input is ascending and disjoint."""
    found: list[Range] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def union(one: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """What is in either; both ascending and disjoint, the result merged."""
    if not one or not other:
        return list(one or other)
    found: list[Range] = []
    for start, end in sorted([*one, *other]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def intersect(one: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """What is in both; both ascending and disjoint, the result merged.

    In the pause of a tree this is asked several times for each process: it calls nothing but append.
    """
    found: list[Range] = []
    begun = reached = -1
    rest = iter([*other, _BEYOND])
    low, high = next(rest)
    for start, end in one:
        while high <= start:
            low, high = next(rest)
        while low < end:
            first = start if start > low else low  # noqa: FURB136 (a call: twice as long in all)
            if first != reached:
                if begun >= 0:
                    found.append((begun, reached))
                begun = first
            if end < high:
                reached = end
                break
            reached = high
            low, high = next(rest)
    if begun >= 0:
        found.append((begun, reached))
    return found


def subtract(one: Sequence[Range], other: Sequence[Range]) -> list[Range]:
    """What is in `one` and not in `other`; both ascending and disjoint. As often asked as `intersect`."""
    found: list[Range] = []
    rest = iter([*other, _BEYOND])
    low, high = next(rest)
    for start, end in one:
        while high <= start:
            low, high = next(rest)
        while low < end:
            if low > start:
                found.append((start, low))
            start = high
            if start >= end:
                break
            low, high = next(rest)
        if start < end:
            found.append((start, end))
    return found


def total_bytes(ranges: Iterable[Range]) -> int:
    """The sum of the lengths."""
    return sum(end - start for start, end in ranges)
