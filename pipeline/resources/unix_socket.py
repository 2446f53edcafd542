"""Unix sockets: stream, datagram, seqpacket; pairs, listeners, names, unread messages.

The kernel holds: type, options, name and socket file, peer, shut-down halves, the queue,
and for a listener its backlog and the clients that wait. sock_diag(7) tells the peer's
inode, so ends find each other inside the tree; queues are looked at, not consumed.

Kept: all of that, open files in flight (SCM_RIGHTS), out-of-band bytes and marks, a peer that is
closed (end of file, or ECONNRESET where it left bytes unread), senders' credentials of unread
messages, and what SO_PEERCRED and SO_PEERGROUPS answer (`unix_peercred`).
What a socket has with somebody outside the tree: `unix_outside`.

Refused by name: a second holder outside the tree; data written to a connection that was not
accepted yet, which nobody can see; one-sided datagram peers without a name; an empty message that was looked at before.

Not preserved: inode numbers, which holder of it a client that waits was
connected by, bounds between writes to a stream, the mark of an out-of-band byte that was taken behind the last unread
byte, timestamps of unread messages.

Source: unix(7), sock_diag(7); net/unix/af_unix.c.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile
from pipeline.kernel.sockdiag import State, UnixSocket
from pipeline.resources import outside, sockets, unix_outside, unix_peercred, unix_queue, unix_rebuild
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.unix_state import (
    MAX_MESSAGE_BYTES,
    Peer,
    SocketFile,
    UnixState,
    is_path,
)
from pipeline.resources.unix_table import Table, name_of, peer_name_of, table_of

_SIOCUNIXFILE = 0x89E0
_DELETED = b" (deleted)"


class Unix:
    """See the module."""

    name = "unix"
    record: type[UnixState] = UnixState
    carried: Sequence[str] = (
        "stream, datagram and seqpacket pairs with unread messages, shut-down halves, closed peers",
        "files of every kind in flight (SCM_RIGHTS), nested and in circles; out-of-band bytes and marks",
        "credentials and pidfds of senders in the tree",
        "datagram sockets connected to a name outside the tree, which are connected to it again",
        "listeners (path and abstract) with clients of the tree that wait, bound and connected datagram sockets",
    )
    refused: Sequence[str] = (
        "a connection to a process outside the tree, or a client of one that waits (closed on demand: --unix-outside)",
        "a second holder outside the tree",
        "data sent before accept; credentials of a sender that has ended",
        "an empty message that waits to be read and was looked at before",
    )
    shown_by: Sequence[str] = (
        "programs/sockets.py",
        "programs/socket_places.py",
        "programs/real/test_screens.py",
        "resources/test_unix_in_flight.py",
        "resources/test_unix_socket.py",
    )

    def matches(self, view: FdView) -> bool:
        """A unix socket."""
        who = view.identity
        return who is not None and who.family == socket.AF_UNIX

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Everything it is joined to must be in the tree, nothing in its queue be more than bytes."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            if sockets.network(sock, scope) is None:
                return  # no sock_diag that can be asked knows it
        holders = outside.same_link(view, scope)
        yield from outside.blockers(view, holders, "the socket is also held by")
        table = table_of(scope)
        diag = table.find(view.stat.st_ino)
        if diag is None:
            yield Blocker(view.subject, "sock_diag does not know the socket", "try again", transient=True)
        elif diag.state == State.LISTEN:
            yield from unix_outside.check_clients(view, diag, table, scope)
        else:
            yield from unix_outside.check_peer(view, diag, table, scope)
            if diag.queued > MAX_MESSAGE_BYTES:
                yield Blocker(
                    view.subject,
                    f"{diag.queued} bytes wait to be read",
                    "wait until they are read",
                    transient=True,
                )

    def capture(self, view: FdView, scope: CaptureScope) -> UnixState:
        """Everything; an unread message that cannot be carried is refused here.

        Raises:
            Refused: see `unix_queue.capture`.
        """
        table = table_of(scope)
        diag = table.find(view.stat.st_ino)
        assert diag is not None, "check refuses a socket that is not known"
        listens = diag.state == State.LISTEN
        waits = diag.peer == 0 and table.listener_of(diag.inode) is not None
        peer = table.members.get(diag.peer) if diag.peer else None
        again = unix_outside.reconnected(view, diag, table, scope)
        peer_diag = table.find(diag.peer) if diag.peer else None
        name, peer_name = name_of(view), peer_name_of(view)
        with view.as_socket() as sock:
            return UnixState(
                socket=sockets.capture(view, sock, scope),
                name=name,
                file=_socket_file(view, sock, name, diag, scope) if is_path(name) else None,
                backlog=diag.backlog if listens else None,
                clients=[table.members[inode][0] for inode in diag.waiting if inode in table.members],
                peer=peer[0] if peer else None,
                mutual=peer_diag is not None and peer_diag.peer == diag.inode,
                peer_closed=diag.peer is not None and peer is None and again is None and not waits,
                outside=again,
                reset=bool(sockets.events(view.local, 0) & select.POLLERR),
                waits=waits,
                peer_name=peer_name,
                accepted=_was_accepted(diag, name, peer_name, table),
                credentials=unix_peercred.seen(sock, scope),
                own_credentials=unix_peercred.of_holder(view, scope) if waits else _seen_by_peer(peer, scope),
                shutdown=diag.shutdown,
                queue=unix_queue.capture(table.members[diag.inode][0], view, scope),
            )

    def create(self, file: OpenFile, record: UnixState, scope: CreateScope) -> LocalFd:
        """The socket, or its end of the pair that is made with the first end asked for."""
        return unix_rebuild.create(file, record, scope)

    def connect(self, file: OpenFile, record: UnixState, scope: CreateScope) -> None:
        """Fill the queues of pairs, shut halves down, set options."""
        unix_rebuild.connect(file, record, scope)

    def finish(self, file: OpenFile, record: UnixState, scope: CreateScope) -> None:
        """Names, listeners, waiting clients, datagram queues: for all sockets, with the first one asked for."""
        unix_rebuild.finish(scope)


def _was_accepted(diag: UnixSocket, name: bytes, peer_name: bytes, table: Table) -> bool:
    """Whether this end of a connection is more likely the one that accept(2) made.

    Both ends of one connection must not answer alike: a name that a listener has decides, else that one
    end has no name, else the lower inode.
    """
    if diag.kind == socket.SOCK_DGRAM or not name or diag.peer is None:
        return False
    if not peer_name:
        return True
    ours, theirs = table.listens_at(name), table.listens_at(peer_name)
    if ours != theirs:
        return ours
    return diag.inode < diag.peer if diag.peer else True


def _seen_by_peer(peer: tuple[Index, FdView] | None, scope: CaptureScope) -> Peer | None:
    if peer is None:
        return None
    with peer[1].as_socket() as sock:
        return unix_peercred.seen(sock, scope)


def _socket_file(
    view: FdView, sock: socket.socket, name: bytes, diag: UnixSocket, scope: CaptureScope
) -> SocketFile | None:
    """The file at the name of a bound socket, if it is there and still the one that was made."""
    if diag.kind != socket.SOCK_DGRAM and diag.peer is not None:
        return None  # of a connection only the string counts: the file is the listener's
    try:
        fd = fcntl.ioctl(sock, _SIOCUNIXFILE)
    except PermissionError:
        return _file_by_name(view, name, diag, scope)
    try:
        link = os.readlink(f"/proc/self/fd/{fd}".encode())
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return None if link.endswith(_DELETED) or not found.st_nlink else _file(view, link, found, scope)


def _file_by_name(view: FdView, name: bytes, diag: UnixSocket, scope: CaptureScope) -> SocketFile | None:
    """The same without CAP_NET_ADMIN: by the name, below the root or working directory of the holder."""
    start = "root" if name.startswith(b"/") else "cwd"
    base = os.readlink(f"/proc/{view.pid}/{start}".encode())
    try:
        found = os.stat(f"/proc/{view.pid}/{start}/".encode() + name.lstrip(b"/"), follow_symlinks=False)
    except OSError:
        return None
    if diag.file is None or found.st_ino & 0xFFFF_FFFF != diag.file[1] or not stat.S_ISSOCK(found.st_mode):
        return None
    return _file(view, os.path.normpath(os.path.join(base, name.lstrip(b"/"))), found, scope)


def _file(view: FdView, link: bytes, found: os.stat_result, scope: CaptureScope) -> SocketFile:
    return SocketFile(
        path=scope.path(view.pid, link),
        mode=stat.S_IMODE(found.st_mode),
        uid=scope.user(found.st_uid),
        gid=scope.group(found.st_gid),
        mtime_ns=found.st_mtime_ns,
    )


KIND = Unix()
