"""The TCP sockets of a network namespace, as sock_diag(7) lists them: one question for all of them.

It names what no descriptor tells: the peer of a connection that is still being made, and the
connections that wait to be accepted (they have no inode yet).

It is asked in the older of two forms, which alone has an answer for both families: for each question the kernel walks
through the table of connections of the whole host, 0.3 ms and more, and through that of bound ports if sockets that are
only bound are asked for. Listeners are in a table of their own, which is small.

Source: include/uapi/linux/inet_diag.h (struct inet_diag_req); net/ipv4/inet_diag.c, inet_diag_dump_compat().
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator

import msgspec

from pipeline.kernel.rtnetlink import Netlink

NETLINK_SOCK_DIAG = 4
_TCPDIAG_GETSOCK = 18
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


def dump(diag: Netlink, states: Collection[int]) -> Iterator[TcpEntry]:
    """TCP sockets of the network in which the socket of `diag` was made.

    Args:
        diag: of the protocol `NETLINK_SOCK_DIAG`.
        states: `sk_state` of those that are asked for.

    Raises:
        OSError: what the kernel says; FileNotFoundError: it does not list TCP sockets.
    """
    wanted = sum(1 << state for state in set(states))
    for content in diag.dump(_TCPDIAG_GETSOCK, struct.pack("=52xII", wanted, 0)):
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
