"""Where pages that arrive are written: a file, or the memory of a process that is being built.

There are three ways into memory, and each takes what the one before cannot (docs/performance.md has the figures):

1. UFFDIO_COPY, where no page is yet (`pipeline.resources.memory.fresh`);
2. process_vm_writev(2), for all segments of a run at once, as far as the process itself may write;
3. /proc/PID/mem, which ignores the permissions of private mappings, page by page.

As long as pages are put in the first way, the others fail at those that are missing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pipeline.ids import HostPid
from pipeline.image.packing import PAGE_BYTES, zero_pages
from pipeline.kernel.syscalls import IOV_MAX, process_vm_writev
from pipeline.resources.memory import huge_pages
from pipeline.resources.memory.fresh import Fresh

#: (address or offset, length) in bytes
Segment = tuple[int, int]
#: (address or offset, where its content begins, length) in bytes
_Part = tuple[int, int, int]

_LOOK_BYTES = 256 << 10
_ZERO_PAGE = bytes(PAGE_BYTES)


class Place(Protocol):
    """Where the pages of a space are written. Its methods may be called in any thread, one at a time.

    They raise OSError: EIO, EFAULT: nothing is mapped there, or a page cannot be had; ENOSPC, ENOMEM.
    """

    #: what a failure is said of
    subject: str

    def write(self, segments: Sequence[Segment], content: memoryview) -> None:
        """Write to `segments`, whose content lies one behind the other."""

    def zero(self, start: int, length: int) -> None:
        """Make a range zero. Where it is zero already nothing is written, so that it takes no memory."""


class FilePlace:
    """A file that is open; the descriptor stays the caller's. See `Place`."""

    subject = "shared memory, or a file without a name"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, segments: Sequence[Segment], content: memoryview) -> None:
        for offset, at, length in _parts(segments):
            done = 0
            while done < length:
                done += os.pwrite(self._fd, content[at + done : at + length], offset + done)

    def zero(self, start: int, length: int) -> None:
        _zero_through(self._fd, start, length)


class HugeFilePlace:
    """A file of huge pages of hugetlbfs, which can be written only through a mapping. See `Place`.

    Args:
        fd: it stays the caller's.
        page_bytes: of a huge page.
    """

    def __init__(self, fd: int, page_bytes: int) -> None:
        self.subject = f"shared memory{huge_pages.remark([page_bytes])}"
        self._fd = fd
        self._page_bytes = page_bytes

    def write(self, segments: Sequence[Segment], content: memoryview) -> None:
        """See `Place`; ENOMEM: the pool has no pages."""
        if content.readonly:
            content = memoryview(bytearray(content))
        for offset, at, length in _parts(segments):
            with self._window(offset, length) as address:
                # another process may write here, so may we; and are told where an assignment would end us
                if process_vm_writev(HostPid(os.getpid()), [(address, at, length)], content) < length:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def zero(self, start: int, length: int) -> None:
        room = memoryview(bytearray(min(length, _LOOK_BYTES)))
        for offset in range(start, start + length, len(room)):
            part = room[: min(len(room), start + length - offset)]
            count = os.preadv(self._fd, [part], offset)  # a hole takes no page by this
            zero = set(zero_pages(part[:count]))
            for page in range(count // PAGE_BYTES):
                if page not in zero:
                    self.write([(offset + page * PAGE_BYTES, PAGE_BYTES)], memoryview(_ZERO_PAGE))

    @contextmanager
    def _window(self, offset: int, length: int) -> Iterator[int]:
        """The address here of a part of the file; the pages that it needs are reserved as it is mapped."""
        first = offset - offset % self._page_bytes
        size = -(-(offset + length - first) // self._page_bytes) * self._page_bytes
        with mmap.mmap(self._fd, size, offset=first) as mapped:
            yield ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + offset - first


class MemoryPlace:
    """The private memory of a process that stands still. See `Place`.

    Args:
        pid: the process.
        fd: its /proc/PID/mem; it stays the caller's.
        fresh: its mappings in which pages may be missing; stays the caller's, too.
        subject: what a failure is said of.
    """

    def __init__(self, pid: HostPid, fd: int, fresh: Fresh | None = None, subject: str = "memory") -> None:
        self.subject = subject
        self._pid = pid
        self._fd = fd
        self._fresh = fresh

    def write(self, segments: Sequence[Segment], content: memoryview) -> None:
        if content.readonly:  # it was unpacked, and has no address here
            content = memoryview(bytearray(content))
        parts = list(_parts(segments))
        if self._fresh is not None:
            parts = [rest for part in parts for rest in _behind([part], self._put(part, content))]
        while parts:
            some = parts[:IOV_MAX]
            done = self._write_at_once(some, content)
            parts = _behind(parts, done)
            if done < sum(length for _, _, length in some):
                # the next page is missing, or the process itself may not write it
                parts = _behind(parts, self._put(parts[0], content) or self._write_one(parts[0], content))

    def _put(self, part: _Part, content: memoryview) -> int:
        start, at, length = part
        return self._fresh.put(start, content[at : at + length]) if self._fresh is not None else 0

    def _write_at_once(self, parts: Sequence[_Part], content: memoryview) -> int:
        try:
            return process_vm_writev(self._pid, parts, content)
        except OSError:  # whatever it is, the slower ways say it better
            return 0

    def _write_one(self, part: _Part, content: memoryview) -> int:
        """OSError, ESRCH: the process has ended, which the kernel does not say in another way."""
        start, at, length = part
        done = os.pwrite(self._fd, content[at : at + length], start)
        if not done:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return done

    def zero(self, start: int, length: int) -> None:
        end = start + length
        for begin, stop in [(start, end)] if self._fresh is None else self._fresh.touchable(start, end):
            _zero_through(self._fd, begin, stop - begin)


def _parts(segments: Sequence[Segment]) -> Iterator[_Part]:
    at = 0
    for start, length in segments:
        yield start, at, length
        at += length


def _behind(parts: list[_Part], done: int) -> list[_Part]:
    """What is left when so many bytes of them are written."""
    for number, (start, at, length) in enumerate(parts):
        if done < length:
            return [(start + done, at + done, length - done), *parts[number + 1 :]]
        done -= length
    return []


def _zero_through(fd: int, offset: int, length: int) -> None:
    end = offset + length
    room = memoryview(bytearray(min(length, _LOOK_BYTES)))
    while offset < end:
        wanted = room[: min(len(room), end - offset)]
        count = os.preadv(fd, [wanted], offset) // PAGE_BYTES * PAGE_BYTES
        zero = set(zero_pages(wanted[:count]))
        for page in range(len(wanted) // PAGE_BYTES):
            if page not in zero:
                os.pwrite(fd, _ZERO_PAGE, offset + page * PAGE_BYTES)
        offset += len(wanted)
