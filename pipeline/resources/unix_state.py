"""The record of a unix socket, and what its names are.

A name is `sun_path` without the closing zero byte of a path: empty for an unnamed socket,
starting with a zero byte for an abstract name, else a path as the program wrote it, which
may be relative. An accepted socket has the name of its listener.

Source: unix(7).
"""

from __future__ import annotations

import os
import socket
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pipeline.image.schema import U32, Id, Index, PathRef, Pid, Record
from pipeline.resources.sockets import SocketState

#: most bytes that are carried of one message, or of the unread bytes of one stream
MAX_MESSAGE_BYTES = 64 << 20
#: SCM_MAX_FD: the kernel sends no more with one message
MAX_FILES = 253
NGROUPS_MAX = 65536

SHUT_RECEIVE = 1
SHUT_SEND = 2

Name = Annotated[bytes, Meta(max_length=108)]


class Peer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`struct ucred`: level-0 pid (0 outside the tree), effective uid and gid; of a socket's peer its groups, too."""

    pid: Pid
    uid: Id
    gid: Id
    groups: Annotated[list[Id], Meta(max_length=NGROUPS_MAX)] = []


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One unread message, or unread bytes of a stream with one sender.

    `sender`: name of the socket it came from (datagrams). `credentials`: of the sending process, where
    the message carries them. `files`: open files in flight with it. `mark`: ``urgent`` for an out-of-band
    byte, ``passed`` for the mark of one that was taken already.
    """

    data: Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]
    sender: Name = b""
    credentials: Peer | None = None
    files: Annotated[list[Index], Meta(max_length=MAX_FILES)] = []
    mark: Literal["", "urgent", "passed"] = ""


class SocketFile(Record, frozen=True, kw_only=True):
    """The file that a path name made, if it is still there.

    `mtime_ns` recognizes the stale file at restore.
    """

    path: PathRef
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    uid: Id
    gid: Id
    mtime_ns: int


class Outside(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A datagram peer outside the tree, to be connected again by its name.

    `file`: its socket file, None for an abstract name. `must`: it has to be there; else the socket is left without
    peer, as if that had ended.
    """

    file: PathRef | None
    must: bool


class UnixState(Record, frozen=True, kw_only=True):
    """A unix socket.

    Args:
        name: its own; `file`: None for other than path names, and where the file was removed or replaced.
        backlog: None if it does not listen; `clients`: who waits to be accepted, in order.
        peer: the socket it is connected to, in the tree; `mutual`: that one is connected to this one too.
        peer_closed: it had a peer, which was closed; `reset`: and with unread bytes: ECONNRESET is due.
        outside: a peer that is not of the tree and is connected again.
        waits: it is connected to a listener that did not accept it yet.
        peer_name: name of the peer. `accepted`: of a named pair, this is the end that accept(2) returned.
        credentials: what SO_PEERCRED and SO_PEERGROUPS answer here; `own_credentials`: what it answers at the peer.
        shutdown: `SHUT_RECEIVE` | `SHUT_SEND`.
    """

    socket: SocketState
    name: Name = b""
    file: SocketFile | None = None
    backlog: U32 | None = None
    clients: Annotated[list[Index], Meta(max_length=65536)] = []
    peer: Index | None = None
    mutual: bool = False
    peer_closed: bool = False
    reset: bool = False
    outside: Outside | None = None
    waits: bool = False
    peer_name: Name = b""
    accepted: bool = False
    credentials: Peer | None = None
    own_credentials: Peer | None = None
    shutdown: Annotated[int, Meta(ge=0, le=SHUT_RECEIVE | SHUT_SEND)] = 0
    queue: Annotated[list[Message], Meta(max_length=65536)] = []

    @property
    def is_datagram(self) -> bool:
        """Datagram sockets are bound and connected apart from each other."""
        return self.socket.type == socket.SOCK_DGRAM

    @property
    def is_pair(self) -> bool:
        """Whether it is made together with its peer."""
        return self.mutual or self.peer_closed


def raw_name(name: Any) -> bytes:
    """What Python's getsockname, getpeername or recvmsg gave for a unix socket, as bytes."""
    return name if isinstance(name, bytes) else os.fsencode(name or b"")


def is_path(name: bytes) -> bool:
    """Whether a name is a path in the filesystem."""
    return bool(name) and not name.startswith(b"\0")


def shown(name: bytes) -> str:
    """A name for people."""
    return "@" + name[1:].decode(errors="backslashreplace") if name[:1] == b"\0" else os.fsdecode(name)
