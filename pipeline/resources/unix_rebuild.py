"""Making the unix sockets of a tree again, and joining them.

Pairs are made whole: by socketpair, or through a listener of the recorded name where an
end has one (its name is the listener's). Their queues are filled in phase 2. What needs
names, pids or listeners waits for phase 3 and is done for all sockets at once, in this order:

1. unread messages of pairs that carry credentials: now the senders' pids exist;
2. names: each path name bound in a private directory (`unix_names`);
3. unread datagrams of sockets that are no pair, from senders of the right name;
4. one-sided datagram peers, and those outside the tree;
5. listeners listen, and the clients that waited connect again, in their order;
6. shut-down halves and options; socket files move to their places.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile
from pipeline.resources import socket_options, sockets, unix_outside, unix_peercred, unix_queue
from pipeline.resources.kinds import CreateScope
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.unix_names import Place, check_target
from pipeline.resources.unix_pairs import bind_abstract, bind_for_now, make_pair, pair_key
from pipeline.resources.unix_state import (
    SHUT_RECEIVE,
    SHUT_SEND,
    Message,
    UnixState,
    is_path,
    raw_name,
    shown,
)

_HOW = {SHUT_RECEIVE: socket.SHUT_RD, SHUT_SEND: socket.SHUT_WR, SHUT_RECEIVE | SHUT_SEND: socket.SHUT_RDWR}


class _World:
    """The unix sockets of one rebuild."""

    def __init__(self) -> None:
        self.records: dict[Index, UnixState] = {}
        #: the other end of pairs whose peer was closed; owned by the scope
        self.closed_peers: dict[Index, LocalFd] = {}
        self.joined: set[Index] = set()
        self.finished = False

    def record(self, index: Index) -> UnixState:
        """That of the socket to which another one is joined.

        Raises:
            RebuildError: the image has no such unix socket.
        """
        try:
            return self.records[index]
        except KeyError:
            raise RebuildError(
                f"open file {index} is no unix socket of the image, but one is joined to it"
            ) from None


def _world(scope: CreateScope) -> _World:
    return scope.once(("unix sockets",), _World)


def _subject(index: Index, record: UnixState) -> str:
    return f"open file {index} (unix{' ' + shown(record.name) if record.name else ''})"


# -- phase 1 ----------------------------------------------------------------------


def create(file: OpenFile, record: UnixState, scope: CreateScope) -> LocalFd:
    """A socket of its own, or an end of a pair; with its owner, without a name.

    Raises:
        RebuildError: the place of its socket file is taken; its owner cannot be set.
    """
    world = _world(scope)
    if record.socket.family != socket.AF_UNIX:
        raise RebuildError(f"{_subject(file.index, record)}: is no socket of this kind")
    world.records[file.index] = record
    if record.file is not None:
        check_target(record.file, scope)
    if record.is_pair:
        ends = scope.once(pair_key(file.index, record), lambda: make_pair(file.index, record, scope))
        if record.peer is None:
            world.closed_peers[file.index] = ends[None]
        fd = LocalFd(fcntl.fcntl(ends[file.index], fcntl.F_DUPFD_CLOEXEC, 0))
    else:
        fd = sockets.take(sockets.make_socket(record.socket, scope))
    try:
        with borrowed(fd) as sock:
            sockets.give_owner(sock, record.socket, scope, _subject(file.index, record))
    except BaseException:
        os.close(fd)
        raise
    return fd


# -- phase 2 ----------------------------------------------------------------------


def connect(file: OpenFile, record: UnixState, scope: CreateScope) -> None:
    """Fill and settle the pair of `file`, if it is one that can be filled without pids."""
    world = _world(scope)
    if record.is_pair and not _needs_pids(world, file.index):
        _join_pair(world, file.index, scope)


def _needs_pids(world: _World, index: Index) -> bool:
    record = world.records[index]
    queue = list(record.queue)
    if record.peer is not None:
        queue += world.record(record.peer).queue
    return any(message.credentials is not None for message in queue)


def _join_pair(world: _World, index: Index, scope: CreateScope) -> None:
    """Fill both queues, then shut down and set options of both ends; once for both."""
    if index in world.joined:
        return
    record = world.records[index]
    own = scope.file(index)
    if record.peer is None:
        peer = world.closed_peers[index]
        world.joined.add(index)
        _fill(peer, index, record, scope)
        if record.reset:
            # Our end learns ECONNRESET when the scope closes the other one with this byte unread.
            with borrowed(own) as sock:
                sock.send(b"\0", socket.MSG_DONTWAIT)
        _settle(index, record, scope)
        return
    other = world.record(record.peer)
    world.joined |= {index, record.peer}
    peer = scope.file(record.peer)
    _fill(peer, index, record, scope)
    _fill(own, record.peer, other, scope)
    _settle(index, record, scope)
    _settle(record.peer, other, scope)


def _fill(sender: LocalFd, index: Index, record: UnixState, scope: CreateScope) -> None:
    if record.queue:
        with borrowed(sender) as sock:
            for message in record.queue:
                unix_queue.send(sock, message, _subject(index, record), scope, receiver=scope.file(index))


def _settle(index: Index, record: UnixState, scope: CreateScope) -> None:
    """The last things: shut-down halves, then options (they would disturb the filling)."""
    with borrowed(scope.file(index)) as sock:
        if record.shutdown:
            sock.shutdown(_HOW[record.shutdown])
        socket_options.apply(sock, record.socket.identity, record.socket.options, _subject(index, record))


# -- phase 3 ----------------------------------------------------------------------


@contextmanager
def _quietly(world: _World, scope: CreateScope) -> Iterator[None]:
    """No SIGIO to the rebuilt processes while their sockets are filled."""
    signalling = []
    for index in world.records:
        fd = scope.file(index)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ASYNC:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_ASYNC)
            signalling.append((fd, flags))
    try:
        yield
    finally:
        for fd, flags in signalling:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def finish(scope: CreateScope) -> None:
    """See the module: what waits for names, pids and listeners; does nothing the second time.

    Raises:
        RebuildError: a name is taken, a queue is limited here, a listener cannot listen.
    """
    world = _world(scope)
    if world.finished:
        return
    world.finished = True
    with _quietly(world, scope), ExitStack() as stack:
        for index, record in world.records.items():
            if record.is_pair:
                _join_pair(world, index, scope)
        names = _Names(world, scope, stack)
        alone = {index: record for index, record in world.records.items() if not record.is_pair}
        for index, record in alone.items():
            if record.queue:
                _fill_datagrams(index, record, names, scope, stack)
        for index, record in alone.items():
            if record.peer is not None:
                _call(index, record, names.address(record.peer), scope)
            elif record.outside is not None:
                with borrowed(scope.file(index)) as sock:
                    unix_outside.connect(sock, record, _subject(index, record), scope)
        for index, record in alone.items():
            if record.backlog is not None:
                _listen(index, record, record.backlog, scope)
                for client in record.clients:
                    _call(client, world.record(client), names.address(index), scope)
        for index, record in alone.items():
            _settle(index, record, scope)
        names.settle()


class _Names:
    """Every name that a socket of the tree is bound to, and how to reach it from here."""

    def __init__(self, world: _World, scope: CreateScope, stack: ExitStack) -> None:
        self._world = world
        self._places: dict[Index, Place] = {}
        self._by_name: dict[bytes, Index] = {}
        for index, record in world.records.items():
            if not record.name or (record.is_pair and not record.is_datagram):
                continue
            with borrowed(scope.file(index)) as sock:
                if is_path(record.name):
                    place = Place(sock, record.name, record.file, scope)
                    stack.callback(place.close)
                    self._places[index] = place
                elif raw_name(sock.getsockname()) != record.name:
                    bind_abstract(sock, record.name)
            self._by_name[record.name] = index

    def address(self, index: Index) -> bytes | str:
        """Where to send or connect to, to reach open file `index`."""
        if index in self._places:
            return self._places[index].address
        return self._world.record(index).name

    def bearer(self, name: bytes) -> Index | None:
        """The datagram socket of the tree that has this name."""
        index = self._by_name.get(name)
        return index if index is not None and self._world.records[index].is_datagram else None

    def settle(self) -> None:
        """Move every socket file to its place."""
        for place in self._places.values():
            place.settle()


def _fill_datagrams(
    index: Index, record: UnixState, names: _Names, scope: CreateScope, stack: ExitStack
) -> None:
    """Send the unread messages of a socket that is no pair, each from a socket of the sender's name."""
    substitutes: dict[bytes, socket.socket] = {}

    def send_from(sock: socket.socket, message: Message) -> None:
        unix_queue.send(sock, message, _subject(index, record), scope, names.address(index))

    for message in record.queue:
        bearer = names.bearer(message.sender) if message.sender else None
        if bearer is not None:
            with borrowed(scope.file(bearer)) as sock:
                send_from(sock, message)
            continue
        if message.sender not in substitutes:
            sock = stack.enter_context(sockets.make_socket(record.socket, scope))
            if message.sender:
                bind_for_now(sock, message.sender, scope, stack)
            substitutes[message.sender] = sock
        send_from(substitutes[message.sender], message)


def _call(index: Index, record: UnixState, address: bytes | str, scope: CreateScope) -> None:
    """Connect a socket that is no pair: a one-sided datagram peer, or a client that waits."""
    with borrowed(scope.file(index)) as sock:
        try:
            unix_peercred.connect(sock, address, record.own_credentials, scope)
        except OSError as error:
            raise RebuildError(
                f"{_subject(index, record)}: cannot connect to {shown(record.peer_name)}: {error.strerror}"
            ) from error


def _listen(index: Index, record: UnixState, backlog: int, scope: CreateScope) -> None:
    """Let the process that listened listen again: clients see its pid and ids."""
    with open("/proc/sys/net/core/somaxconn", "rb") as limit:
        most = int(limit.read())
    if backlog > most:
        raise RebuildError(
            f"{_subject(index, record)}: this host limits a backlog to {most}, it was {backlog} "
            "(raise net.core.somaxconn)"
        )
    with borrowed(scope.file(index)) as sock:
        unix_peercred.listen(sock, backlog, record.credentials, scope)
