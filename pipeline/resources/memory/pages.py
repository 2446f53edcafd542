"""Reading what is to be saved: runs of pages of a process, and the data of shared memory.

Pages travel as runs (address, length) in buffers that the caller owns and uses again;
no Python code runs per page. `process_vm_readv` takes up to 1024 runs a call and
releases the interpreter lock. /proc/PID/mem is used in two cases:

* where the owner may not read (PROT_NONE): process_vm_readv stops with EFAULT, mem
  ignores protection;
* for pages that are shared copy-on-write. process_vm_readv *pins* what it reads, and the
  kernel gives the target a copy of such a page of its own first (gup_must_unshare,
  since 5.19): memory doubles and reading is ten times slower. mem does not pin.

Sources: process_vm_readv(2), proc_pid_mem(5), lseek(2) SEEK_DATA; kernel commit
a7f226604170 ("mm/gup: trigger FAULT_FLAG_UNSHARE when R/O-pinning a possibly shared
anonymous page").
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Self

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.inside import open_file
from pipeline.kernel.pagemap import PAGE_BYTES, Range, entries_of, intersect, merged, open_pagemap, subtract
from pipeline.kernel.procfs import ProcessGone
from pipeline.kernel.syscalls import IOV_MAX, process_vm_readv
from pipeline.resources.memory.objects import SharedObject, Window

#: (address or offset, length), both in bytes and page aligned
Segment = tuple[int, int]

_libc = ctypes.CDLL(None)
_memcmp = _libc.memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)


def pieces(runs: Iterable[Range], size_bytes: int) -> Iterator[list[Segment]]:
    """Pack runs into pieces of at most `size_bytes` and `IOV_MAX` segments; long runs are cut."""
    piece: list[Segment] = []
    room = size_bytes
    for start, end in runs:
        while start < end:
            length = min(end - start, room)
            piece.append((start, length))
            start += length
            room -= length
            if not room or len(piece) == IOV_MAX:
                yield piece
                piece, room = [], size_bytes
    if piece:
        yield piece


# A page of our own that somebody else maps too, by the most significant byte of its pagemap entry:
# present 0x80, not of a file 0x20, not mapped here alone 0x01.
_TOP_MAPPED_ELSEWHERE = bytes(b for b in range(256) if b & 0xA1 == 0x80)
_MAPPED_ELSEWHERE = re.compile(b"[" + re.escape(_TOP_MAPPED_ELSEWHERE) + b"]+")
#: holes up to this size are looked at rather than skipped by another system call
_BRIDGED_BYTES = 256 * PAGE_BYTES


class ProcessMemory:
    """The memory of a process, to read from; a context manager. May be read from any thread.

    Args:
        pid: in the pipeline's pid namespace.

    Raises:
        ProcessGone: there is no such process.
        OSError: EACCES, EPERM: it may not be traced.
    """

    def __init__(self, pid: HostPid) -> None:
        self.pid = pid
        self._pagemap = open_pagemap(pid)
        try:
            self._memory = open_file(pid, "mem", os.O_RDONLY)
        except BaseException as error:
            os.close(self._pagemap)
            if isinstance(error, FileNotFoundError):
                raise ProcessGone(pid) from None
            raise
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both files; idempotent."""
        if self._open:
            self._open = False
            os.close(self._pagemap)
            os.close(self._memory)

    def read(self, piece: Sequence[Segment], buffer: bytearray | memoryview) -> int:
        """Read all segments of `piece`, one after the other, to the front of `buffer`.

        Pages that are shared copy-on-write with another process stay so.

        Returns:
            The number of bytes: the sum of the lengths.

        Raises:
            OSError: EFAULT, EIO: nothing is mapped there (any more); names the address.
            ProcessGone: there is no such process.
        """
        elsewhere = self._mapped_elsewhere(piece)
        if not elsewhere:
            return self._read_pinned(list(piece), buffer, 0)
        done = 0
        whole = [(start, start + length) for start, length in piece]
        careful = [(start, end, True) for start, end in intersect(elsewhere, whole)]
        quick = [(start, end, False) for start, end in subtract(whole, elsewhere)]
        for is_careful, parts in groupby(sorted(careful + quick), key=lambda part: part[2]):
            segments = [(start, end - start) for start, end, _ in parts]
            if not is_careful:
                done += self._read_pinned(segments, buffer, done)
                continue
            for address, length in segments:
                self._read_forced(address, length, buffer, done)
                done += length
        return done

    def _mapped_elsewhere(self, piece: Sequence[Segment]) -> list[Range]:
        """Anonymous pages that another process maps too, in the neighbourhood of `piece`."""
        found: list[Range] = []
        at = 0
        while at < len(piece):
            start = piece[at][0]
            end = start + piece[at][1]
            at += 1
            while at < len(piece) and 0 <= piece[at][0] - end <= _BRIDGED_BYTES:
                end = piece[at][0] + piece[at][1]
                at += 1
            for address, entries in entries_of(self._pagemap, start, end):
                found.extend(
                    (address + match.start() * PAGE_BYTES, address + match.end() * PAGE_BYTES)
                    for match in _MAPPED_ELSEWHERE.finditer(entries[7::8])
                )
        return found

    def _read_pinned(self, rest: list[Segment], buffer: bytearray | memoryview, done: int) -> int:
        """Read to `done` in the buffer by process_vm_readv; returns the bytes. Consumes `rest`."""
        begin = done
        while rest:
            try:
                count = process_vm_readv(self.pid, rest[:IOV_MAX], buffer, done)
            except ProcessLookupError:
                raise ProcessGone(self.pid) from None
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                count = 0
            done += count
            complete = 0
            while complete < min(len(rest), IOV_MAX) and count >= rest[complete][1]:
                count -= rest[complete][1]
                complete += 1
            stopped = complete < min(len(rest), IOV_MAX)
            del rest[:complete]
            if stopped:
                address, length = rest.pop(0)
                self._read_forced(address + count, length - count, buffer, done)
                done += length - count
        return done - begin

    def _read_forced(self, address: int, length: int, buffer: bytearray | memoryview, offset: int) -> None:
        """Read one range through /proc/PID/mem, whatever its protection."""
        view = memoryview(buffer)[offset : offset + length]
        while view:
            try:
                count = os.preadv(self._memory, [view], address)
            except OSError as error:
                raise OSError(
                    error.errno, f"pid {self.pid}: page at {address:#x}: {error.strerror}"
                ) from None
            if not count:
                raise ProcessGone(self.pid)
            address += count
            view = view[count:]


def read_runs(
    pid: HostPid, runs: Iterable[Range], buffer: bytearray | memoryview
) -> Iterator[tuple[list[Segment], int]]:
    """Read `runs` of `pid` piece by piece into `buffer`.

    Yields:
        The segments that stand in the buffer now, one after the other, and their bytes; the buffer
        belongs to the caller until the next step, which overwrites it. Raises as `ProcessMemory.read`.
    """
    with ProcessMemory(pid) as memory:
        for piece in pieces(runs, len(buffer)):
            yield piece, memory.read(piece, buffer)


# -- shared memory and files ---------------------------------------------------------------


def data_runs(fd: LocalFd, size_bytes: int, begin: int = 0) -> list[Range]:
    """The parts of a file that are not holes: [start, end) offsets, page aligned, ascending.

    Args:
        begin, size_bytes: where to look, from an offset to another; `begin` is page aligned.

    Moves the position of `fd`: it must be an open file description of our own.
    """
    runs: list[Range] = []
    at = begin
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        if start >= size_bytes:
            break
        at = min(at, size_bytes)
        start -= start % PAGE_BYTES
        runs.append((start, min(at + -at % PAGE_BYTES, size_bytes + -size_bytes % PAGE_BYTES)))
    return runs


def read_file_runs(
    fd: LocalFd, runs: Iterable[Range], buffer: bytearray | memoryview
) -> Iterator[tuple[list[Segment], int]]:
    """As `read_runs`, from a file or memfd; what lies behind its end reads as zeros."""
    whole = memoryview(buffer)
    for piece in pieces(runs, len(buffer)):
        done = 0
        for offset, length in piece:
            view = whole[done : done + length]
            while view:
                count = os.preadv(fd, [view], offset)
                if not count:
                    view[:] = bytes(len(view))
                    break
                offset += count
                view = view[count:]
            done += length
        yield piece, done


def segments_of(runs: Iterable[Range]) -> list[Segment]:
    """Runs, by their lengths."""
    return [(start, end - start) for start, end in runs]


def read_segments(fd: LocalFd, wanted: Sequence[Segment], view: memoryview) -> int:
    """Read these segments of a file into a buffer that has room for them; how many bytes that are."""
    runs = [(offset, offset + length) for offset, length in wanted]
    _, count = next(read_file_runs(fd, runs, view))
    return count


def read_shared(shared: SharedObject, buffer: bytearray | memoryview) -> Iterator[tuple[list[Segment], int]]:
    """Read all data of a shared memory object; segments are offsets in it. Zero pages are left out."""
    if shared.fd is not None:
        yield from read_file_runs(shared.fd, data_runs(shared.fd, shared.record.size_bytes), buffer)
        return
    for window, (start, end) in cover(shared.windows):
        with ProcessMemory(window.pid) as memory:
            shift = window.start - window.offset
            for piece in pieces([(start, end)], len(buffer)):
                ((offset, length),) = piece
                memory.read([(offset + shift, length)], buffer)
                kept = nonzero_runs(buffer, length)
                if not kept:
                    continue
                yield [(offset + a, b - a) for a, b in kept], compact(buffer, kept)


def shared_bytes(shared: SharedObject) -> int:
    """An upper bound of what `read_shared` will yield, for progress."""
    if shared.fd is None:
        return shared.record.size_bytes
    return sum(end - start for start, end in data_runs(shared.fd, shared.record.size_bytes))


def cover(windows: Sequence[Window]) -> Iterator[tuple[Window, Range]]:
    """The parts of the object that the windows show, each once: (window, [start, end) offsets)."""
    reached = 0
    for window in sorted(windows, key=lambda window: window.offset):
        start, end = max(reached, window.offset), window.offset + window.end - window.start
        if start < end:
            yield window, (start, end)
            reached = end


# -- comparing ---------------------------------------------------------------------------------


def nonzero_runs(buffer: bytearray | memoryview, size_bytes: int) -> list[Range]:
    """Runs of pages in the first `size_bytes` of `buffer` that are not all zero (offsets)."""
    window = (ctypes.c_char * size_bytes).from_buffer(buffer)
    zeros = ctypes.cast(ctypes.c_char_p(_ZEROS), ctypes.c_void_p).value or 0
    found: list[Range] = []
    for block in range(0, size_bytes, _BLOCK_BYTES):
        _refine(ctypes.addressof(window), zeros - block, block, min(size_bytes, block + _BLOCK_BYTES), found)
    return merged(found)


def differing_runs(one: bytearray, other: bytearray, size_bytes: int) -> list[Range]:
    """Runs of pages in the first `size_bytes` of two buffers that are not equal (offsets)."""
    first = (ctypes.c_char * size_bytes).from_buffer(one)
    second = (ctypes.c_char * size_bytes).from_buffer(other)
    found: list[Range] = []
    _refine(ctypes.addressof(first), ctypes.addressof(second), 0, size_bytes, found)
    return merged(found)


def _refine(one: int, other: int, start: int, end: int, found: list[Range]) -> None:
    """Compare in large pieces, and halves of what differs, down to pages."""
    if _memcmp(one + start, other + start, end - start) == 0:
        return
    pages = (end - start + PAGE_BYTES - 1) // PAGE_BYTES
    if pages == 1:
        found.append((start, end))
        return
    middle = start + pages // 2 * PAGE_BYTES
    _refine(one, other, start, middle, found)
    _refine(one, other, middle, end, found)


def compact(buffer: bytearray | memoryview, kept: Sequence[Range]) -> int:
    """Move the kept runs of a buffer together, to its front; returns their bytes."""
    view, done = memoryview(buffer), 0
    for start, end in kept:
        if start != done:
            view[done : done + end - start] = view[start:end]
        done += end - start
    return done
