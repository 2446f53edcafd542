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

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import uffdio, userfaultfd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.kernel.uffdio import FEATURE, MODE

DEVICE = "/dev/userfaultfd"
#: ioctl of the device that makes a descriptor, and its flags
NEW = 0xAA00
NEW_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

_FEATURES = FEATURE.EVENT_FORK | FEATURE.EVENT_REMAP | FEATURE.EVENT_REMOVE | FEATURE.EVENT_UNMAP

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


def make_in(
    pid: HostPid, send: Callable[[LocalFd], int], inside: Callable[..., int], flags: int = NEW_FLAGS
) -> LocalFd:
    """A descriptor of the memory of a process that lends its system calls; the caller owns it, the process has none.

    Args:
        pid: the process.
        send: gives it a duplicate of ours, and says its number there.
        inside: runs a system call in it.
        flags: of userfaultfd(2).

    Raises:
        OSError: see `open_device`.
    """
    device = open_device()
    try:
        lent = send(device)
    finally:
        os.close(device)
    with ExitStack() as undo:
        try:
            fd = userfaultfd.taken_from(pid, inside(NR.ioctl, lent, NEW, flags), inside)
            undo.callback(os.close, fd)
        finally:
            inside(NR.close, lent)
        undo.pop_all()
    return fd


def begin(fd: LocalFd) -> None:
    """Choose what the descriptor tells.

    Raises:
        OSError: EPERM: forks may be followed by CAP_SYS_PTRACE in the initial user namespace only.
    """
    uffdio.begin(fd, _FEATURES)


def register(fd: LocalFd, start: int, end: int) -> None:
    """Answer for the pages that are missing in [start, end).

    Raises:
        OSError: EINVAL: something in it is no anonymous memory; EBUSY: somebody else answers.
    """
    uffdio.register(fd, start, end, MODE.MISSING)


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


def is_calm(fd: LocalFd) -> bool:
    """Whether nothing has happened that was not read; false, too, while who was waiting for that goes on.

    Events may be told in another order than they have happened in, but never across a moment of calm.
    """
    try:
        # nothing, nowhere: what is left is the question whether mappings are being changed
        uffdio.zero(fd, 0, 0)
    except OSError:
        return True
    return False


def is_gone(fd: LocalFd) -> bool:
    """Whether the memory is gone that a descriptor watches: its process has ended, or executes another program."""
    try:
        uffdio.zero(fd, _NOWHERE, PAGE_BYTES)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False
