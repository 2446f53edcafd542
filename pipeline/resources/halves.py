"""Which directions of a datagram socket are shut down: what poll(2) tells of it, and shutting them down again.

poll tells a socket that is shut down for reading, and one that is for both, but not for writing alone.

Source: shutdown(2); net/core/datagram.c (datagram_poll), net/ipv4/af_inet.c (inet_shutdown).
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress

from pipeline.ids import LocalFd
from pipeline.resources import sockets

RECEIVE, SEND = 1, 2


def of(fd: LocalFd) -> int:
    """The halves that poll tells."""
    found = sockets.events(fd, select.POLLRDHUP)
    if found & select.POLLHUP:
        return RECEIVE | SEND
    return RECEIVE if found & select.POLLRDHUP else 0


def shut(sock: socket.socket, halves: int) -> None:
    """Shut halves down."""
    for bit, how in ((RECEIVE, socket.SHUT_RD), (SEND, socket.SHUT_WR)):
        if halves & bit:
            with suppress(OSError):  # of one that is not connected the kernel says so, and shuts it down
                sock.shutdown(how)
