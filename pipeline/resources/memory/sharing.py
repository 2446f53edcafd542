"""Pages that a process still shares with the parent it was forked from.

They are not sent twice, and are one page in memory again after the restore: the
child's puppet is forked from the parent's, which has its pages by then.

The kernel tells root which page frame is behind an address (/proc/PID/pagemap): equal
frames are one page. Without that right the contents are compared, which finds at
least as many; both are done on megabytes at a time.

Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import msgspec

from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import AddressSpace
from pipeline.kernel.pagemap import PAGE_BYTES, Range, entries_of, intersect, merged, open_pagemap, subtract
from pipeline.resources.memory.alike import private_alike
from pipeline.resources.memory.pages import ProcessMemory, differing_runs, pieces

_COMPARE_BYTES = 4 << 20
#: gaps up to this size are looked at, too
_BRIDGED_BYTES = 256 * PAGE_BYTES
_ENTRY_BYTES = 8
_FRAME_MASK = (1 << 55) - 1
#: present, swapped and the frame (or swap entry); not soft-dirty, exclusive, write-protected
_SAME_MASK = 0xC07F_FFFF_FFFF_FFFF
_EQUAL = re.compile(rb"\0+")


class CopyOnWrite(msgspec.Struct, frozen=True):
    """How the memory of a child relates to its parent's.

    Args:
        send: the runs of the child that are its own.
        shared: the runs that are the parent's pages.
        dropped: pages that the parent has where the child, with the same mapping, has none.
    """

    send: list[Range]
    shared: list[Range]
    dropped: list[Range]


def plan_copy_on_write(
    parent_pid: HostPid,
    parent: AddressSpace,
    parent_runs: Sequence[Range],
    pid: HostPid,
    child: AddressSpace,
    runs: Sequence[Range],
) -> CopyOnWrite:
    """Find what `pid` shares with the process it was forked from. Both are frozen.

    Args:
        parent_runs: all pages of the parent that the image carries, those that *it* shares with
            its own parent included.
        runs: all pages of the child that must be there after the restore.
    """
    alike = private_alike(parent.vmas, child.vmas)
    theirs = intersect(parent_runs, alike)
    both = intersect(theirs, runs)
    dropped = subtract(theirs, runs)
    shared = merged(_equal(parent_pid, pid, both))
    return CopyOnWrite(subtract(runs, shared), shared, dropped)


def _equal(one: HostPid, other: HostPid, ranges: Sequence[Range]) -> Iterator[Range]:
    if not ranges:
        return
    with ExitStack() as opened:
        first = open_pagemap(one)
        opened.callback(os.close, first)
        second = open_pagemap(other)
        opened.callback(os.close, second)
        if _tells_frames(first, ranges):
            yield from _equal_frames(first, second, ranges)
            return
    yield from _equal_contents(one, other, ranges)


def _tells_frames(fd: LocalFd, ranges: Sequence[Range]) -> bool:
    """Whether this reader is told page frames: they read as 0 to others (CAP_SYS_ADMIN is needed)."""
    for start, end in ranges:
        for _, entries in entries_of(fd, start, min(end, start + PAGE_BYTES)):
            entry = int.from_bytes(entries, "little")
            if entry >> 63:
                return bool(entry & _FRAME_MASK)
    return False


def _equal_frames(one: LocalFd, other: LocalFd, ranges: Sequence[Range]) -> Iterator[Range]:
    found: list[Range] = []
    for start, end in _bridged(ranges):
        both = zip(entries_of(one, start, end), entries_of(other, start, end), strict=True)
        for (address, first), (_, second) in both:
            found.extend(
                (address + match.start() * PAGE_BYTES, address + match.end() * PAGE_BYTES)
                for match in _EQUAL.finditer(_differences(first, second))
            )
    yield from intersect(merged(found), ranges)


def _bridged(ranges: Sequence[Range]) -> Iterator[Range]:
    """The ranges with the small gaps between them: looking at a page more costs less than another read."""
    start, end = ranges[0]
    for begin, until in ranges[1:]:
        if begin - end > _BRIDGED_BYTES:
            yield start, end
            start = begin
        end = until
    yield start, end


def _differences(one: bytes, other: bytes) -> bytes:
    """One byte a page: zero where both entries name the same page. Arithmetic on whole columns of bytes."""
    size = min(len(one), len(other))
    pages = size // _ENTRY_BYTES
    total = 0
    for column in range(_ENTRY_BYTES):
        mask = _SAME_MASK >> 8 * column & 0xFF
        difference = int.from_bytes(one[column:size:8], "little") ^ int.from_bytes(
            other[column:size:8], "little"
        )
        total |= difference if mask == 0xFF else difference & int.from_bytes(bytes([mask]) * pages, "little")
    return total.to_bytes(pages, "little")


def _equal_contents(one: HostPid, other: HostPid, ranges: Sequence[Range]) -> Iterator[Range]:
    first, second = bytearray(_COMPARE_BYTES), bytearray(_COMPARE_BYTES)
    with ProcessMemory(one) as parent, ProcessMemory(other) as child:
        for piece in pieces(ranges, _COMPARE_BYTES):
            size = parent.read(piece, first)
            child.read(piece, second)
            equal = subtract([(0, size)], differing_runs(first, second, size))
            at = 0
            for address, length in piece:
                for start, end in intersect(equal, [(at, at + length)]):
                    yield address + start - at, address + end - at
                at += length
