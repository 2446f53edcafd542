"""What sock_diag(7) says about a unix socket: its peer, its waiting clients, its socket file.

A query for one inode is answered within send(2), so nothing waits and no event loop is needed. It is asked for
every socket while a tree stands still, so messages are taken apart by hand.
A netlink socket answers for the network namespace it was made in; ask from there.

Source: sock_diag(7), include/uapi/linux/unix_diag.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from types import TracebackType
from typing import Self

import msgspec

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NO_COOKIE = 0xFFFF_FFFF_FFFF_FFFF
_ALL_STATES = 0xFFFF_FFFF
_HEADER_BYTES = 16
#: struct nlmsghdr and struct unix_diag_req
_REQUEST = struct.Struct("<IHHII B3xIIIQ")
#: struct unix_diag_msg: family, type, state, inode, cookie
_MESSAGE = struct.Struct("<xBBxI8x")
#: attributes, and what is asked for: UDIAG_SHOW_* has a bit for each of them
_VFS, _PEER, _ICONS, _RQLEN, _SHUTDOWN = 1, 2, 3, 4, 6
_SHOW = 1 << _VFS | 1 << _PEER | 1 << _ICONS | 1 << _RQLEN
#: a listener lists 4 bytes a waiting client; backlogs are at most 4096 unless somaxconn was raised
_ANSWER_BYTES = 1 << 18


class State(IntEnum):
    """`sk_state` of unix and TCP sockets (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    CLOSE = 7
    LISTEN = 10


class UnixSocket(msgspec.Struct, frozen=True):
    """One unix socket.

    Args:
        inode: of the socket, as fstat shows it.
        kind: SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
        state: see `State`; datagram sockets too are ESTABLISHED once they have a peer.
        peer: inode of the peer; 0 where the peer is closed or was not accepted yet; None without peer.
        file: (device number as the kernel packs it, low 32 bits of the inode) of the socket file.
        waiting: a listener's clients that wait to be accepted, in order; 0 for closed ones.
        queued: bytes to be read, for a listener the number of waiting clients.
        backlog: a listener's backlog, else bytes (with overhead) sent but not read by the peer.
        shutdown: bit 0 receiving, bit 1 sending is shut down.
    """

    inode: int
    kind: int
    state: int
    peer: int | None
    file: tuple[int, int] | None
    waiting: tuple[int, ...]
    queued: int
    backlog: int
    shutdown: int


class UnixDiag:
    """Asks for unix sockets of the network namespace in which it was opened; a context manager.

    Ownership: holds one netlink socket until it is left.
    """

    def __init__(self, made: Callable[[Callable[[], socket.socket]], socket.socket]) -> None:
        """`made`: makes the socket in the network namespace that is asked."""
        self._socket = made(
            lambda: socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                _NETLINK_SOCK_DIAG,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def find(self, inode: int) -> UnixSocket | None:
        """The socket with this inode; None if there is none in this network namespace.

        Raises:
            OSError: what the kernel answered, other than ENOENT.
        """
        request = _REQUEST.pack(
            _REQUEST.size,
            _SOCK_DIAG_BY_FAMILY,
            _NLM_F_REQUEST,
            0,
            0,
            socket.AF_UNIX,
            _ALL_STATES,
            inode,
            _SHOW,
            _NO_COOKIE,
        )
        self._socket.send(request)
        answer = self._socket.recv(_ANSWER_BYTES)
        (kind,) = struct.unpack_from("<H", answer, 4)
        if kind == _NLMSG_ERROR:
            (code,) = struct.unpack_from("<i", answer, 16)
            if code == -errno.ENOENT:
                return None
            raise OSError(-code, f"sock_diag of unix socket {inode}: {os.strerror(-code)}")
        return _typed(answer)


def _typed(answer: bytes) -> UnixSocket:
    (length,) = struct.unpack_from("<I", answer)
    kind, state, inode = _MESSAGE.unpack_from(answer, _HEADER_BYTES)
    found: dict[int, bytes] = {}
    at = _HEADER_BYTES + _MESSAGE.size
    while at + 4 <= min(length, len(answer)):
        size, number = struct.unpack_from("<HH", answer, at)
        found[number] = answer[at + 4 : at + size]
        at += max(size + 3 & ~3, 4)

    def numbers(attribute: int) -> tuple[int, ...]:
        value = found.get(attribute, b"")
        return struct.unpack(f"<{len(value) // 4}I", value)

    file, peer, lengths = numbers(_VFS), numbers(_PEER), numbers(_RQLEN)
    return UnixSocket(
        inode=inode,
        kind=kind,
        state=state,
        peer=peer[0] if peer else None,
        file=(file[1], file[0]) if file else None,
        waiting=numbers(_ICONS),
        queued=lengths[0] if lengths else 0,
        backlog=lengths[1] if lengths else 0,
        shutdown=found.get(_SHUTDOWN, b"\0")[0],
    )
