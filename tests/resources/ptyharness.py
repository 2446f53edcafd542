"""What the tests of pseudo-terminals share: a devpts of their own, and small ways to look at a pair."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from pipeline.kernel.syscalls import CLONE, mount, setns, unshare
from tests.resources.fdharness import Capture, Rebuilt, Subject

_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18


@pytest.fixture
def own_terminals() -> Iterator[None]:
    """A devpts of our own in a mount namespace of our own, so that numbers are free when they should be."""
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    here = os.getcwd()
    unshare(CLONE.NEWNS)
    try:
        mount(None, b"/", None, _MS_REC | _MS_PRIVATE)
        mount(b"devpts", b"/dev/pts", b"devpts", 0, b"newinstance,ptmxmode=0666")
        yield
    finally:
        setns(home, CLONE.NEWNS)
        os.close(home)
        os.chdir(here)


def output(master: int, wanted: bytes) -> bytes:
    """As much as is wanted of what comes out of a terminal; it comes in pieces."""
    found = os.read(master, len(wanted))
    while len(found) < len(wanted):
        found += os.read(master, len(wanted) - len(found))
    return found


def number(fd: int, request: int) -> int:
    """What an ioctl tells that fills in one number."""
    (value,) = struct.unpack("<i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


@contextmanager
def gone(child: Subject) -> Iterator[Capture]:
    """The capture of a subject that has closed everything, as if it had ended."""
    with Capture(child.pid) as capture:
        records = capture.records()
    child.call(partial(os.closerange, 3, 200))
    with Rebuilt(capture, records) as new:
        yield new  # type: ignore[misc]


def without_modes(slave: int, off: int) -> None:
    """Clear bits of the local modes."""
    settings = termios.tcgetattr(slave)
    settings[3] &= ~off
    termios.tcsetattr(slave, termios.TCSANOW, settings)
