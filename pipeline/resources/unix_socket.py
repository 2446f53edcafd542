"""Unix sockets: stream, datagram, seqpacket; pairs, listeners, names, unread messages.

The kernel holds: type, options, name and socket file, peer, shut-down halves, the queue,
and for a listener its backlog and the clients that wait. sock_diag(7) tells the peer's
inode, so ends find each other inside the tree; queues are looked at, not consumed.

Kept: all of that, a peer that is closed (end of file, or ECONNRESET where it left bytes
unread), senders' credentials of unread messages where SO_PASSCRED shows them, and uid and
gid of SO_PEERCRED (the pid too for listeners: a process of the rebuilt tree calls listen).

Refused by name: a peer, waiting client or second holder outside the tree; descriptors in
flight (SCM_RIGHTS); out-of-band data; data written to a connection that was not
accepted yet; one-sided datagram peers without a name.

Not preserved: inode numbers, the pid and supplementary groups of SO_PEERCRED and
SO_PEERGROUPS of connected pairs (a client that waits has the ids of a holder), bounds
between writes to a stream, timestamps of unread messages.

Source: unix(7), sock_diag(7); net/unix/af_unix.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile
from pipeline.kernel import procfs
from pipeline.kernel.sockdiag import State, UnixDiag, UnixSocket
from pipeline.resources import outside, sockets, unix_queue, unix_rebuild
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.unix_state import (
    MAX_MESSAGE_BYTES,
    SHUT_RECEIVE,
    Peer,
    SocketFile,
    UnixState,
    is_path,
    raw_name,
    shown,
)

_SIOCUNIXFILE = 0x89E0
_SO_PASSPIDFD = 76
_NO_ID = 0xFFFF_FFFF
_DELETED = b" (deleted)"


class _Table:
    """All unix sockets of the tree, and what sock_diag says of each; kept in `CaptureScope.peers`."""

    def __init__(self, scope: CaptureScope) -> None:
        self.members: dict[int, tuple[Index, FdView]] = {}
        self._known: dict[int, UnixSocket | None] = {}
        self._scope = scope
        self._networks = {EXTERNAL_NETWORK}
        for index, view in scope.files():
            who = sockets.identity_of(view)
            if who is not None and who.family == socket.AF_UNIX:
                self.members[view.stat.st_ino] = index, view
                with sockets.borrowed(view.local) as sock:
                    netns = sockets.network(sock, scope)
                if netns is not None:
                    self._networks.add(netns)

    def find(self, inode: int) -> UnixSocket | None:
        """sock_diag's answer, asked once."""
        if inode not in self._known:
            self._known[inode] = None
            for netns in self._networks:  # each knows its own only
                with UnixDiag(partial(self._scope.in_network, netns)) as diag:
                    self._known[inode] = self._known[inode] or diag.find(inode)
        return self._known[inode]

    def listener_of(self, inode: int) -> int | None:
        """Inode of the listener in the tree at which socket `inode` waits to be accepted."""
        for member in self.members:
            found = self.find(member)
            if found is not None and inode in found.waiting:
                return member
        return None

    def listens_at(self, name: bytes) -> bool:
        """Whether a listener in the tree has this name."""
        for member, (_, view) in self.members.items():
            found = self.find(member)
            if found is not None and found.state == State.LISTEN and _name(view) == name:
                return True
        return False


def _table(scope: CaptureScope) -> _Table:
    table = scope.peers().get("unix sockets")
    if table is None:
        table = scope.peers()["unix sockets"] = _Table(scope)
    return table


def _name(view: FdView) -> bytes:
    with sockets.borrowed(view.local) as sock:
        return raw_name(sock.getsockname())


def _peer_name(view: FdView) -> bytes:
    with sockets.borrowed(view.local) as sock:
        try:
            return raw_name(sock.getpeername())
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            return b""


class Unix:
    """See the module."""

    name = "unix"
    record: type[UnixState] = UnixState
    carried: Sequence[str] = (
        "stream, datagram and seqpacket pairs with unread messages, shut-down halves, closed peers",
        "listeners (path and abstract) with clients of the tree that wait, bound and connected datagram sockets",
    )
    refused: Sequence[str] = (
        "a peer, waiting client or holder outside the tree",
        "descriptors in flight (SCM_RIGHTS), out-of-band data, data sent before accept",
    )
    shown_by: Sequence[str] = (
        "programs/sockets.py",
        "resources/test_unix_socket.py",
    )

    def matches(self, view: FdView) -> bool:
        """A unix socket."""
        who = sockets.identity_of(view)
        return who is not None and who.family == socket.AF_UNIX

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Everything it is joined to must be in the tree, nothing in its queue be more than bytes."""
        with sockets.borrowed(view.local) as sock:
            yield from sockets.check(view, sock, scope)
            if sockets.network(sock, scope) is None:
                return  # no sock_diag that can be asked knows it
            passes_pidfd = _int_option(sock, _SO_PASSPIDFD)
        holders = outside.same_link(view, scope)
        yield from outside.blockers(view, holders, "the socket is also held by")
        in_flight = int(view.info.get("scm_fds", ["0"])[0])
        if in_flight:
            yield Blocker(
                view.subject,
                f"{in_flight} descriptor(s) are in flight in its queue (SCM_RIGHTS)",
                "wait until they are received",
            )
        found = sockets.events(view.local, select.POLLIN | select.POLLPRI)
        if found & select.POLLPRI:
            yield Blocker(
                view.subject, "out-of-band data waits to be read", "wait until it is read", transient=True
            )
        if found & select.POLLIN and passes_pidfd:
            yield Blocker(
                view.subject, "messages with a pidfd (SO_PASSPIDFD) wait to be read", "wait", transient=True
            )
        table = _table(scope)
        diag = table.find(view.stat.st_ino)
        if diag is None:
            yield Blocker(view.subject, "sock_diag does not know the socket", "try again", transient=True)
        elif diag.state == State.LISTEN:
            yield from _check_clients(view, diag, table)
        else:
            yield from _check_peer(view, diag, table, scope)
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
            Refused: see `unix_queue.peek`.
        """
        table = _table(scope)
        diag = table.find(view.stat.st_ino)
        assert diag is not None, "check refuses a socket that is not known"
        listens = diag.state == State.LISTEN
        waits = diag.peer == 0 and table.listener_of(diag.inode) is not None
        peer = table.members[diag.peer] if diag.peer else None
        peer_diag = table.find(diag.peer) if diag.peer else None
        found = sockets.events(view.local, select.POLLIN)
        name, peer_name = _name(view), _peer_name(view)
        with sockets.borrowed(view.local) as sock:
            return UnixState(
                socket=sockets.capture(view, sock, scope),
                name=name,
                file=_socket_file(view, sock, name, diag, scope) if is_path(name) else None,
                backlog=diag.backlog if listens else None,
                clients=[table.members[inode][0] for inode in diag.waiting],
                peer=peer[0] if peer else None,
                mutual=peer_diag is not None and peer_diag.peer == diag.inode,
                peer_closed=diag.peer == 0 and not waits,
                reset=bool(found & select.POLLERR),
                waits=waits,
                peer_name=peer_name,
                accepted=_was_accepted(diag, name, peer_name, table),
                credentials=_credentials(sock, scope),
                own_credentials=_of_holder(view, scope) if waits else _seen_by_peer(peer, scope),
                shutdown=diag.shutdown,
                queue=(
                    unix_queue.peek(
                        sock, diag.queued, bool(diag.shutdown & SHUT_RECEIVE), view.subject, scope
                    )
                    if found & select.POLLIN and not (listens or (found & select.POLLERR and not diag.queued))
                    else []
                ),
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


def _int_option(sock: socket.socket, number: int) -> int:
    with suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, number)
    return 0


def _check_clients(view: FdView, diag: UnixSocket, table: _Table) -> Iterator[Blocker]:
    """Those who wait at a listener must be in the tree and have sent nothing."""
    for inode in diag.waiting:
        if inode not in table.members:
            whose = "a client that is closed already" if not inode else "a client outside the tree"
            yield Blocker(
                view.subject,
                f"{whose} waits to be accepted",
                "wait until it is accepted",
                transient=True,
            )


def _check_peer(view: FdView, diag: UnixSocket, table: _Table, scope: CaptureScope) -> Iterator[Blocker]:
    """The peer must be in the tree, closed, or a listener in the tree that did not accept yet."""
    pending_error = sockets.events(view.local, 0) & select.POLLERR
    closed = diag.peer == 0 and table.listener_of(diag.inode) is None
    # A stream gives its error behind its bytes, where nobody looks; the others before.
    resettable = diag.kind == socket.SOCK_STREAM or (diag.kind == socket.SOCK_SEQPACKET and not diag.queued)
    if pending_error and not (closed and resettable):
        yield Blocker(view.subject, "an error waits to be read", "wait until it is read", transient=True)
    if diag.peer is None:
        return
    name = shown(_peer_name(view))
    if diag.peer:
        other = table.find(diag.peer)
        if diag.peer not in table.members:
            link = b"socket:[%d]" % diag.peer
            pids = sorted({pid for pid, _ in outside.of_link(link, scope)})
            who = ", ".join(outside.name_of(pid) for pid in pids[:4]) or "a process that cannot be seen"
            yield Blocker(
                view.subject,
                f"its peer {name or 'without a name'} is held by {who} outside the tree",
                "include that process, or close the connection",
            )
        elif other is not None and other.peer != diag.inode and not _name(table.members[diag.peer][1]):
            yield Blocker(
                view.subject, "it is connected to a datagram socket without a name that left it", "close it"
            )
    elif closed and diag.kind != socket.SOCK_DGRAM and diag.shutdown != 3:
        yield Blocker(
            view.subject,
            f"its connection to {name or 'a listener'} outside the tree was not accepted yet",
            "wait until it is accepted",
            transient=True,
        )
    elif not closed:
        with sockets.borrowed(view.local) as sock:
            (unread,) = struct.unpack("<i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
        if unread:
            yield Blocker(
                view.subject,
                "data was sent on a connection that was not accepted yet",
                "wait until it is accepted",
                transient=True,
            )


def _was_accepted(diag: UnixSocket, name: bytes, peer_name: bytes, table: _Table) -> bool:
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


def _credentials(sock: socket.socket, scope: CaptureScope) -> Peer | None:
    """SO_PEERCRED; None where nothing was remembered."""
    answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = struct.unpack("<iII", answer)
    if _NO_ID in (uid, gid):
        return None
    return Peer(scope.member(pid) if pid else 0, scope.user(uid), scope.group(gid))


def _seen_by_peer(peer: tuple[Index, FdView] | None, scope: CaptureScope) -> Peer | None:
    if peer is None:
        return None
    with sockets.borrowed(peer[1].local) as sock:
        return _credentials(sock, scope)


def _of_holder(view: FdView, scope: CaptureScope) -> Peer:
    """The ids of a holder: what a client that waits will be to the server, as far as can be told."""
    status = procfs.status(view.pid)
    return Peer(scope.member(view.pid), scope.user(status.uids[1]), scope.group(status.gids[1]))


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
