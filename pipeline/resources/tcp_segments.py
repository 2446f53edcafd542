"""Segments that are made for a socket here, as if its peer had sent them: a FIN, an acknowledgement.

Repair mode makes connections that are established; others are reached as the kernel reaches them, by what comes from
the peer. A raw socket of the connection's network sends the segment to the address that the connection has there,
so it never leaves. It bears the mark that locks let pass.

Source: RFC 9293 section 3; raw(7).
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from pipeline.errors import RebuildError
from pipeline.kernel.nfnetlink import PASSING_MARK
from pipeline.resources.tcp_state import End, State, info_of

FIN, ACK = 0x01, 0x10
_SO_MARK = 36
_IPV6_HEADER_INCLUDED = 36
_ARRIVES_S = 2.0


class Segment(NamedTuple):
    """One segment without data. `source`, `target`: packed address and port; `scope`: interface of a link-local one."""

    source: End
    target: End
    sequence: int
    acknowledges: int
    flags: int
    window: int
    scope: int = 0

    def packet(self) -> bytes:
        """With its IP header."""
        (near, near_port), (far, far_port) = self.source, self.target
        head = struct.pack(
            ">HHIIBBHHH",
            near_port,
            far_port,
            self.sequence & 0xFFFF_FFFF,
            self.acknowledges & 0xFFFF_FFFF,
            5 << 4,
            self.flags,
            min(self.window, 0xFFFF),
            0,
            0,
        )
        pseudo = near + far + struct.pack(">IBBH", 0, 0, socket.IPPROTO_TCP, len(head))
        head = head[:16] + struct.pack(">H", _checksum(pseudo + head)) + head[18:]
        if len(near) == 4:
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(head), 0, 0, 64, socket.IPPROTO_TCP, 0)
        else:
            ip = struct.pack(">IHBB", 6 << 28, len(head), socket.IPPROTO_TCP, 64)
        return ip + near + far + head


def _checksum(content: bytes) -> int:
    total = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def deliver(
    segment: Segment,
    sock: socket.socket,
    reaches: State,
    made: Callable[[Callable[[], socket.socket]], socket.socket],
    subject: str,
) -> None:
    """Send a segment to `sock` and wait until it has reached a state by it.

    Args:
        segment: for it.
        sock: its connection.
        reaches: the state.
        made: makes a socket in its network.
        subject: how a message names it.

    Raises:
        RebuildError: it does not get there.
    """
    family = socket.AF_INET if len(segment.target[0]) == 4 else socket.AF_INET6
    try:
        with made(lambda: _raw(family)) as raw:
            host = socket.inet_ntop(family, segment.target[0])
            where = (host, 0) if family == socket.AF_INET else (host, 0, 0, segment.scope)
            raw.sendto(segment.packet(), where)
    except OSError as error:
        raise RebuildError(
            f"{subject}: the end of its peer cannot be made again: {error.strerror}"
        ) from error
    deadline = time.monotonic() + _ARRIVES_S
    while info_of(sock).state != reaches:
        if time.monotonic() > deadline:
            raise RebuildError(
                f"{subject}: state {reaches.name} cannot be made again here: no segment arrives at its address (is it "
                "of this host, is lo up, and do the firewall's rules let it pass?)"
            )
        time.sleep(0.001)


def _raw(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, PASSING_MARK)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_HEADER_INCLUDED, 1)
    except BaseException:
        sock.close()
        raise
    return sock
