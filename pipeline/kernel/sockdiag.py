"""What sock_diag(7) says about a unix socket: its peer, its waiting clients, its socket file.

The message tables are pyroute2's. The netlink socket under them is a plain one: a query
for one inode is answered within send(2), so nothing waits and no event loop is needed.
A netlink socket answers for the network namespace it was made in; ask from there.
pyroute2 is imported on first use (about 0.1 s): ask once before a tree is frozen.

Source: sock_diag(7), include/uapi/linux/unix_diag.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NO_COOKIE = 0xFFFF_FFFF_FFFF_FFFF
_ALL_STATES = 0xFFFF_FFFF
#: a listener lists 4 bytes a waiting client; backlogs are at most 4096 unless somaxconn was raised
_ANSWER_BYTES = 1 << 18


class State(IntEnum):
    """`sk_state` of unix and TCP sockets (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    CLOSE = 7
    LISTEN = 10


@dataclass(frozen=True, slots=True)
class UnixSocket:
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
        from pyroute2.netlink.diag import (
            UDIAG_SHOW_ICONS,
            UDIAG_SHOW_PEER,
            UDIAG_SHOW_RQLEN,
            UDIAG_SHOW_VFS,
            unix_diag_msg,
            unix_diag_req,
        )

        request = unix_diag_req()
        request["header"]["type"] = _SOCK_DIAG_BY_FAMILY
        request["header"]["flags"] = _NLM_F_REQUEST
        request["sdiag_family"] = socket.AF_UNIX
        request["udiag_states"] = _ALL_STATES
        request["udiag_ino"] = inode
        request["udiag_show"] = UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN | UDIAG_SHOW_VFS
        request["udiag_cookie"] = _NO_COOKIE
        request.encode()
        self._socket.send(request.data)
        answer = self._socket.recv(_ANSWER_BYTES)
        (kind,) = struct.unpack_from("<H", answer, 4)
        if kind == _NLMSG_ERROR:
            (code,) = struct.unpack_from("<i", answer, 16)
            if code == -errno.ENOENT:
                return None
            raise OSError(-code, f"sock_diag of unix socket {inode}: {os.strerror(-code)}")
        message = unix_diag_msg(answer)
        message.decode()
        return _typed(message)


def _typed(message: Any) -> UnixSocket:
    file = message.get_attr("UNIX_DIAG_VFS")
    lengths = message.get_attr("UNIX_DIAG_RQLEN")
    waiting = bytes.fromhex((message.get_attr("UNIX_DIAG_ICONS") or "").replace(":", ""))
    return UnixSocket(
        inode=message["udiag_ino"],
        kind=message["udiag_type"],
        state=message["udiag_state"],
        peer=message.get_attr("UNIX_DIAG_PEER"),
        file=(file["udiag_vfs_dev"], file["udiag_vfs_ino"]) if file else None,
        waiting=struct.unpack(f"<{len(waiting) // 4}I", waiting),
        queued=lengths["udiag_rqueue"] if lengths else 0,
        backlog=lengths["udiag_wqueue"] if lengths else 0,
        shutdown=message.get_attr("UNIX_DIAG_SHUTDOWN") or 0,
    )
