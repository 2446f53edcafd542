"""The kinds of sockets and terminals in the harness of open files, and looks at sockets."""

from __future__ import annotations

import select
import socket

from pipeline.resources import (
    netlink_socket,
    other_socket,
    packet_socket,
    pty,
    raw_socket,
    tcp_socket,
    udp_socket,
    unix_socket,
)
from tests.resources import fdharness

_KINDS = (unix_socket, tcp_socket, udp_socket, raw_socket, packet_socket, netlink_socket, pty)
fdharness.KINDS[-1:-1] = [module.KIND for module in _KINDS if module.KIND not in fdharness.KINDS]
OTHER = other_socket.KIND


def of(fd: int) -> socket.socket:
    """A Python socket over a duplicate of `fd`; the caller closes it."""
    return socket.fromfd(fd, *_identity(fd))


def _identity(fd: int) -> tuple[int, int, int]:
    sock = socket.socket(fileno=fd)
    try:
        return sock.family, sock.type, sock.proto
    finally:
        sock.detach()


def polled(fd: int, wanted: int = select.POLLIN | select.POLLOUT | select.POLLRDHUP | select.POLLPRI) -> int:
    """What poll(2) says at once."""
    poll = select.poll()
    poll.register(fd, wanted)
    return sum(event for _, event in poll.poll(0))
