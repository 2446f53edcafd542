"""What a socket is, and an object of Python's over a descriptor that is somebody else's.

Source: socket(7).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from pipeline.ids import LocalFd


class Identity(msgspec.Struct, frozen=True):
    """What socket(2) was called with: `family` AF_*, `type` SOCK_* without flags, `protocol`."""

    family: int
    type: int
    protocol: int


#: the object asks the kernel by itself
_UNKNOWN = Identity(-1, -1, -1)
#: for an object that need not know
ANY = Identity(0, 0, 0)


@contextmanager
def borrowed(fd: LocalFd, who: Identity = _UNKNOWN) -> Iterator[socket.socket]:
    """A Python socket over a descriptor that stays open and stays the caller's.

    `who`: what it is, where that is known; else the kernel is asked, by three calls.
    """
    sock = socket.socket(who.family, who.type, who.protocol, fd)
    try:
        yield sock
    finally:
        sock.detach()


def identify(sock: socket.socket) -> Identity:
    """Family, type and protocol as the kernel has them."""
    return Identity(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
    )
