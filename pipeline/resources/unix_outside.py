"""What a unix socket has with processes that are not part of the tree.

- A datagram socket that is connected to a name (a client of syslog at /dev/log) is connected to it again, if the
  name is there at the destination. It leaves nothing behind that somebody else remembers.
- A connection is remembered by both sides and cannot be kept. By default it is refused by name; with
  ``--unix-outside close`` the program finds that the other side hung up, behind what was sent before.
- A client outside that waits at a listener of the tree: refused, or with ``close`` not there any more.

Whoever is outside and has a datagram socket connected to one of the tree finds that closed, and connects again.

Source: unix(7), syslog(3); net/unix/af_unix.c (unix_dgram_connect).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Iterator

from pipeline.errors import Blocker, RebuildError
from pipeline.kernel.sockdiag import UnixSocket
from pipeline.resources import outside, sockets
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.unix_state import Outside, UnixState, is_path, shown
from pipeline.resources.unix_table import Table, name_of, peer_name_of

_REMEDY = "include that process, close the connection, or let it be hung up: --unix-outside close"


def _closes(scope: CaptureScope) -> bool:
    return scope.policy.unix_outside == "close"


def reconnected(view: FdView, diag: UnixSocket, table: Table, scope: CaptureScope) -> Outside | None:
    """How a peer outside is found again; None where there is none, or where it cannot be."""
    if diag.kind != socket.SOCK_DGRAM or not diag.peer or diag.peer in table.members:
        return None
    other = table.find(diag.peer)
    if other is not None and other.peer == diag.inode:
        return None  # it is connected to this socket, too, which it would lose
    name, must = peer_name_of(view), not _closes(scope)
    if not is_path(name):
        return Outside(None, must) if name and other is not None else None
    if not name.startswith(b"/"):
        return None  # of a working directory that nobody can tell
    try:
        found = os.stat(f"/proc/{view.pid}/root".encode() + name)
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        return None
    if other is not None and other.file is not None and found.st_ino & 0xFFFF_FFFF != other.file[1]:
        return None  # somebody else has the name by now
    return Outside(scope.path(view.pid, name), must)


def connect(sock: socket.socket, record: UnixState, subject: str, scope: CreateScope) -> None:
    """Connect a datagram socket to its peer outside again, or leave it without.

    Raises:
        RebuildError: the peer has to be there, and is not.
    """
    assert record.outside is not None
    try:
        if record.outside.file is None:
            sock.connect(record.peer_name)
            return
        file = scope.open(record.outside.file, os.O_PATH)
        try:
            sock.connect(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
    except OSError as error:
        if record.outside.must:
            raise RebuildError(
                f"{subject}: cannot connect to {shown(record.peer_name)} outside the tree: {error.strerror} "
                "(start it here, or dump with --unix-outside close)"
            ) from error


def check_clients(view: FdView, diag: UnixSocket, table: Table, scope: CaptureScope) -> Iterator[Blocker]:
    """Those who wait at a listener must be in the tree."""
    for inode in diag.waiting:
        if inode not in table.members and not _closes(scope):
            whose = "a client that is closed already" if not inode else "a client outside the tree"
            yield Blocker(
                view.subject,
                f"{whose} waits to be accepted",
                "wait until it is accepted, or let it be hung up: --unix-outside close",
                transient=True,
            )


def check_peer(view: FdView, diag: UnixSocket, table: Table, scope: CaptureScope) -> Iterator[Blocker]:
    """The peer must be in the tree, closed, or a listener in the tree that did not accept yet; or see the module."""
    pending_error = sockets.events(view.local, 0) & select.POLLERR
    closed = diag.peer == 0 and table.listener_of(diag.inode) is None
    # A stream gives its error behind its bytes, where nobody looks; the others before.
    resettable = diag.kind == socket.SOCK_STREAM or (diag.kind == socket.SOCK_SEQPACKET and not diag.queued)
    if pending_error and not (closed and resettable):
        yield Blocker(view.subject, "an error waits to be read", "wait until it is read", transient=True)
    if diag.peer is None:
        return
    if diag.peer and diag.peer in table.members:
        other = table.find(diag.peer)
        if other is not None and other.peer != diag.inode and not name_of(table.members[diag.peer][1]):
            yield Blocker(
                view.subject, "it is connected to a datagram socket without a name that left it", "close it"
            )
    elif diag.peer:
        if not _closes(scope) and reconnected(view, diag, table, scope) is None:
            yield from _held_by(view, diag.peer, scope)
    elif closed and diag.kind != socket.SOCK_DGRAM and diag.shutdown != 3:
        if not _closes(scope):
            yield Blocker(
                view.subject,
                f"its connection to {shown(peer_name_of(view)) or 'a listener'} outside the tree was not accepted yet",
                "wait until it is accepted",
                transient=True,
            )
    elif not closed:
        yield from _check_sent(view)


def _held_by(view: FdView, inode: int, scope: CaptureScope) -> Iterator[Blocker]:
    link = b"socket:[%d]" % inode
    pids = sorted({pid for pid, _ in outside.of_link(link, scope)})
    if not pids and scope.unseen:
        return
    who = ", ".join(outside.name_of(pid) for pid in pids[:4]) or "a process that cannot be seen"
    name = shown(peer_name_of(view)) or "without a name"
    yield Blocker(view.subject, f"its peer {name} is held by {who} outside the tree", _REMEDY)


def _check_sent(view: FdView) -> Iterator[Blocker]:
    """What a client sent before it was accepted is in a queue that only accept(2) gives."""
    with view.as_socket() as sock:
        (unread,) = struct.unpack("<i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    if unread:
        yield Blocker(
            view.subject,
            "data was sent on a connection that was not accepted yet, where nobody can look",
            "wait until it is accepted",
            transient=True,
        )
