"""Page faults of another process, answered here: userfaultfd(2) for missing pages.

A descriptor belongs to the memory in which it is made. One that answers faults of system calls, too, is made by whoever
may open /dev/userfaultfd: the open file is lent to the process, in which an ioctl makes the descriptor. The kernel
tells of forks, moves, drops and unmappings, and whoever causes one waits until it is read: the books of what is
missing follow the program without a gap.

As long as anybody has a duplicate of the descriptor, whoever touches a missing page waits. When the last one is
closed, what is missing is zeros.

Sources: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst,
include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from pipeline.ids import LocalFd
from pipeline.kernel.pagemap import PAGE_BYTES

DEVICE = "/dev/userfaultfd"
#: ioctl of the device that makes a descriptor, and its flags
NEW = 0xAA00
NEW_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_API_VERSION = 0xAA
_API = struct.Struct("<3Q")
_REGISTER = struct.Struct("<4Q")
_RANGE = struct.Struct("<2Q")
_COPY = struct.Struct("<4Qq")
_ZERO = struct.Struct("<3Qq")
_MODE_MISSING = 1
#: EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP
_FEATURES = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6

#: nobody has anything mapped here
_NOWHERE = 0x7FFF_FFFF_E000

_MESSAGE = struct.Struct("<B7x3Q")
_FAULT, _FORK, _REMAP, _REMOVE, _UNMAP = range(0x12, 0x17)
_MESSAGES_AT_ONCE = 64


class Fault(NamedTuple):
    """Somebody waits for the page at `address`."""

    address: int


class Forked(NamedTuple):
    """There is a child with the same mappings and the same pages missing; `fd` is its own, and the reader's now."""

    fd: LocalFd


class Moved(NamedTuple):
    """A mapping was moved."""

    start: int
    to: int
    length: int


class Dropped(NamedTuple):
    """What was at [start, end) is no more; `unmapped`: nor is the mapping."""

    start: int
    end: int
    unmapped: bool


Event = Fault | Forked | Moved | Dropped


def open_device() -> LocalFd:
    """The device; the caller owns it.

    Raises:
        OSError: EACCES: it is for others only; ENOENT: this kernel has none (it came with 6.1).
    """
    return LocalFd(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))


def make(device: LocalFd) -> LocalFd:
    """A descriptor of our own memory; the caller owns it."""
    return LocalFd(fcntl.ioctl(device, NEW, NEW_FLAGS))


def begin(fd: LocalFd) -> None:
    """Choose what the descriptor tells.

    Raises:
        OSError: EPERM: forks may be followed by CAP_SYS_PTRACE in the initial user namespace only.
    """
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(_API_VERSION, _FEATURES, 0)))


def begin_filling(fd: LocalFd) -> None:
    """The descriptor tells nothing: pages are only put by it. Raises OSError: EINVAL."""
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(_API_VERSION, 0, 0)))


def register(fd: LocalFd, start: int, end: int) -> None:
    """Answer for the pages that are missing in [start, end).

    Raises:
        OSError: EINVAL: something in it is no anonymous memory; EBUSY: somebody else answers.
    """
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, end - start, _MODE_MISSING, 0)))


def unregister(fd: LocalFd, start: int, end: int) -> None:
    """Answer no longer for [start, end): what is missing there is zeros."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _RANGE.pack(start, end - start))


def read_events(fd: LocalFd) -> list[Event]:
    """What has happened; empty if nothing has.

    Raises:
        OSError: EMFILE, ENFILE, ENOMEM: there is no room for the descriptor of a child; nothing is lost by that.
    """
    try:
        raw = os.read(fd, _MESSAGE.size * _MESSAGES_AT_ONCE)
    except BlockingIOError:
        return []
    return [_event(*_MESSAGE.unpack_from(raw, at)) for at in range(0, len(raw), _MESSAGE.size)]


def _event(kind: int, first: int, second: int, third: int) -> Event:
    if kind == _FAULT:
        return Fault(second)
    if kind == _FORK:
        return Forked(LocalFd(first & 0xFFFF_FFFF))
    if kind == _REMAP:
        return Moved(first, second, third)
    if kind in (_REMOVE, _UNMAP):
        return Dropped(first, second, unmapped=kind == _UNMAP)
    raise OSError(errno.EPROTO, f"userfaultfd tells of an event {kind:#x} that was not asked for")


def copy(fd: LocalFd, address: int, content: memoryview) -> int:
    """Put pages where they are missing, and wake who waits for them; returns how many bytes are there now.

    Fewer than all, also none: the mapping is being changed, and its events are to be read first (EAGAIN).

    Raises:
        OSError: EEXIST: the first of them is there; ENOENT: nothing is mapped there that this descriptor answers for,
            or was when a mapping that is being moved was waited for; ESRCH: the memory is gone; ENOMEM.
    """
    if content.readonly:
        content = memoryview(bytearray(content))
    source = ctypes.addressof(ctypes.c_char.from_buffer(content))
    return _fill(fd, _UFFDIO_COPY, _COPY, address, source, len(content))


def zero(fd: LocalFd, start: int, length: int) -> int:
    """As `copy`, with pages of zeros."""
    return _fill(fd, _UFFDIO_ZEROPAGE, _ZERO, start, length)


def is_calm(fd: LocalFd) -> bool:
    """Whether nothing has happened that was not read; false, too, while who was waiting for that goes on.

    Events may be told in another order than they have happened in, but never across a moment of calm.
    """
    try:
        # nothing, nowhere: what is left is the question whether mappings are being changed
        zero(fd, 0, 0)
    except OSError:
        return True
    return False


def is_gone(fd: LocalFd) -> bool:
    """Whether the memory is gone that a descriptor watches: its process has ended, or executes another program."""
    try:
        zero(fd, _NOWHERE, PAGE_BYTES)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _fill(fd: LocalFd, request: int, layout: struct.Struct, *arguments: int) -> int:
    argument = bytearray(layout.pack(*arguments, 0, 0))
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        done: int = layout.unpack(argument)[-1]
        if error.errno == errno.EAGAIN or done > 0:
            return max(done, 0)
        raise
    return int(layout.unpack(argument)[-1])


def wake(fd: LocalFd, start: int, length: int) -> None:
    """Let who waits for pages of [start, start + length) look again."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, _RANGE.pack(start, length))
