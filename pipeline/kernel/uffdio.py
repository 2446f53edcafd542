"""The ioctls of a userfaultfd: what every use of it here is made of.

All of them act on the memory in which the descriptor was made, whoever calls them.

Sources: ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h, fs/userfaultfd.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from enum import IntFlag

from pipeline.ids import LocalFd

_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_UNREGISTER = 0x8010AA01
_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_WRITEPROTECT = 0xC018AA06
_API_VERSION = 0xAA
#: api, features, ioctls; start, length, mode, ioctls; start, length; dst, src, length, mode, done; start, length, mode
_THREE, _FOUR, _RANGE = struct.Struct("<3Q"), struct.Struct("<4Q"), struct.Struct("<2Q")
_COPIED, _ZEROED = struct.Struct("<4Qq"), struct.Struct("<3Qq")
_MODE_WRITEPROTECT = 1


class MODE(IntFlag):
    """What faults of a range are answered: UFFDIO_REGISTER_MODE_*."""

    MISSING = 1
    WP = 2
    MINOR = 4


class FEATURE(IntFlag):
    """UFFD_FEATURE_*, those that are named here."""

    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    EVENT_UNMAP = 1 << 6
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


def begin(fd: LocalFd, features: int = 0) -> None:
    """Choose its features, which is done once.

    Raises:
        OSError: EINVAL: this kernel has not all of them; EPERM: EVENT_FORK is for CAP_SYS_PTRACE in the initial user
            namespace only.
    """
    fcntl.ioctl(fd, _API, bytearray(_THREE.pack(_API_VERSION, features, 0)))


def register(fd: LocalFd, start: int, end: int, modes: int) -> None:
    """Answer for faults in [start, end); where that is so already nothing changes.

    Args:
        modes: `MODE`.

    Raises:
        OSError: EINVAL: something in it is no memory for these modes, or nothing is mapped there; EBUSY: somebody else
            answers; EPERM: who maps it may not write to what is behind it; ENOMEM: the memory is gone.
    """
    fcntl.ioctl(fd, _REGISTER, bytearray(_FOUR.pack(start, end - start, modes, 0)))


def unregister(fd: LocalFd, start: int, end: int) -> None:
    """Answer no longer for [start, end)."""
    fcntl.ioctl(fd, _UNREGISTER, _RANGE.pack(start, end - start))


def wake(fd: LocalFd, start: int, length: int) -> None:
    """Let who waits for pages of [start, start + length) look again."""
    fcntl.ioctl(fd, _WAKE, _RANGE.pack(start, length))


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
    return _fill(fd, _COPY, _COPIED, address, source, len(content))


def zero(fd: LocalFd, start: int, length: int) -> int:
    """As `copy`, with pages of zeros."""
    return _fill(fd, _ZEROPAGE, _ZEROED, start, length)


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


def protect(fd: LocalFd, start: int, end: int) -> None:
    """Write-protect the pages of [start, end).

    Raises:
        OSError: ENOENT, EINVAL: it does not answer for writes there; EAGAIN: the mapping is being changed.
    """
    fcntl.ioctl(fd, _WRITEPROTECT, bytearray(_THREE.pack(start, end - start, _MODE_WRITEPROTECT)))


def unprotect(fd: LocalFd, start: int, end: int) -> None:
    """Take the protection from the pages of [start, end), and the mark of it; OSError as `protect`."""
    fcntl.ioctl(fd, _WRITEPROTECT, bytearray(_THREE.pack(start, end - start, 0)))
