"""The TCP sockets of a network namespace, as sock_diag(7) lists them: two questions for all of them.

It names what no descriptor tells: the peer of a connection that is still being made, and the
connections that wait to be accepted (they have no inode yet).

Source: include/uapi/linux/inet_diag.h; net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import msgspec

from pipeline.kernel.rtnetlink import Netlink

NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_ALL_STATES = 0xFFFF_FFFF
#: family, state, timer, retransmissions; ports; addresses; interface; cookie; expires, queues, uid, inode
_MESSAGE = struct.Struct("=4B2s2s16s16sI8s5I")


class TcpEntry(msgspec.Struct, frozen=True):
    """One TCP socket. Ends are (packed address, port); `received`: bytes to be read, for a listener waiting clients.

    `inode`: 0 for one that has no descriptor: it waits to be accepted, or was closed.
    """

    state: int
    local: tuple[bytes, int]
    remote: tuple[bytes, int]
    received: int
    queued: int
    inode: int


def dump(diag: Netlink) -> Iterator[TcpEntry]:
    """Every TCP socket of the network in which the socket of `diag` was made. OSError: what the kernel says."""
    for family in (socket.AF_INET, socket.AF_INET6):
        request = struct.pack("=4BI48x", family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
        for content in diag.dump(_SOCK_DIAG_BY_FAMILY, request):
            yield _typed(content)


def _typed(content: bytes) -> TcpEntry:
    found = _MESSAGE.unpack_from(content)
    family, state, _, _, near_port, far_port, near, far, _, _, _, received, queued, _, inode = found
    length = 4 if family == socket.AF_INET else 16
    return TcpEntry(
        state=state,
        local=(near[:length], int.from_bytes(near_port, "big")),
        remote=(far[:length], int.from_bytes(far_port, "big")),
        received=received,
        queued=queued,
        inode=inode,
    )
