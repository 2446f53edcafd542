"""Reading what is to be saved: runs of pages of a process, and the data of shared memory.

Pages travel as runs (address, length) in buffers that the caller owns and uses again;
no Python code runs per page. `process_vm_readv` takes up to 1024 runs a call, releases
the interpreter lock, and stops with EFAULT where a page may not be read by its owner
(PROT_NONE, guard); such a run is read through /proc/PID/mem, which ignores protection.

Sources: process_vm_readv(2), proc_pid_mem(5), lseek(2) SEEK_DATA.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.pagemap import PAGE_BYTES, Range, merged
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


class ProcessMemory:
    """The memory of a process, to read from; a context manager.

    Args:
        pid: in the pipeline's pid namespace. May be read from any thread.
    """

    def __init__(self, pid: HostPid) -> None:
        self.pid = pid
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close /proc/PID/mem, if it was needed; idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def read(self, piece: Sequence[Segment], buffer: bytearray | memoryview) -> int:
        """Read all segments of `piece`, one after the other, to the front of `buffer`.

        Returns:
            The number of bytes: the sum of the lengths.

        Raises:
            OSError: EFAULT, EIO: nothing is mapped there (any more); names the address.
            ProcessGone: there is no such process.
        """
        done, rest = 0, list(piece)
        while rest:
            try:
                count = process_vm_readv(self.pid, rest, buffer, done)
            except ProcessLookupError:
                raise ProcessGone(self.pid) from None
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                count = 0
            done += count
            while rest and count >= rest[0][1]:
                count -= rest.pop(0)[1]
            if rest:
                address, length = rest.pop(0)
                self._read_forced(address + count, length - count, buffer, done)
                done += length - count
        return done

    def _read_forced(self, address: int, length: int, buffer: bytearray | memoryview, offset: int) -> None:
        if self._fd < 0:
            try:
                self._fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise ProcessGone(self.pid) from None
        view = memoryview(buffer)[offset : offset + length]
        while view:
            try:
                count = os.preadv(self._fd, [view], address)
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


def data_runs(fd: LocalFd, size_bytes: int) -> list[Range]:
    """The parts of a file that are not holes: [start, end) offsets, page aligned, ascending.

    Moves the position of `fd`: it must be an open file description of our own.
    """
    runs: list[Range] = []
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
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


def read_shared(shared: SharedObject, buffer: bytearray | memoryview) -> Iterator[tuple[list[Segment], int]]:
    """Read all data of a shared memory object; segments are offsets in it. Zero pages are left out."""
    if shared.fd is not None:
        yield from read_file_runs(shared.fd, data_runs(shared.fd, shared.record.size_bytes), buffer)
        return
    for window, (start, end) in _cover(shared.windows):
        with ProcessMemory(window.pid) as memory:
            shift = window.start - window.offset
            for piece in pieces([(start, end)], len(buffer)):
                ((offset, length),) = piece
                memory.read([(offset + shift, length)], buffer)
                kept = nonzero_runs(buffer, length)
                if not kept:
                    continue
                yield [(offset + a, b - a) for a, b in kept], _compact(buffer, kept)


def shared_bytes(shared: SharedObject) -> int:
    """An upper bound of what `read_shared` will yield, for progress."""
    if shared.fd is None:
        return shared.record.size_bytes
    return sum(end - start for start, end in data_runs(shared.fd, shared.record.size_bytes))


def _cover(windows: Sequence[Window]) -> Iterator[tuple[Window, Range]]:
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


def _compact(buffer: bytearray | memoryview, kept: Sequence[Range]) -> int:
    """Move the kept runs of a buffer together, to its front; returns their bytes."""
    view, done = memoryview(buffer), 0
    for start, end in kept:
        if start != done:
            view[done : done + end - start] = view[start:end]
        done += end - start
    return done
