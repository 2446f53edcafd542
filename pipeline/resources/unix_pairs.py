"""Making both ends of a unix connection at once.

By socketpair, or through a listener of the recorded name where an end has one: its name is the listener's.
Neither leaves a file behind.

Source: unix(7), socketpair(2).
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import NamedTuple

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Index
from pipeline.resources import sockets, unix_peercred
from pipeline.resources.kinds import CreateScope
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.unix_names import Place, address_of
from pipeline.resources.unix_state import Peer, UnixState, is_path, shown


def pair_key(index: Index, record: UnixState) -> tuple[str, Index, Index]:
    """Under which `CreateScope.once` knows the pair of an open file."""
    other = index if record.peer is None else record.peer
    return "unix pair", min(index, other), max(index, other)


def make_pair(index: Index, record: UnixState, scope: CreateScope) -> dict[Index | None, LocalFd]:
    """Both ends, owned by the scope, under their indexes; a peer that was closed is under None."""
    if record.is_datagram or not (record.name or record.peer_name):
        own, peer = unix_peercred.make_pair(record.socket, record.credentials, scope)
    elif record.accepted or not record.peer_name:
        peer, own = _connect_pair(
            record, record.name, record.peer_name, record.own_credentials, record.credentials, scope
        )
    else:
        own, peer = _connect_pair(
            record, record.peer_name, record.name, record.credentials, record.own_credentials, scope
        )
    ends = {index: scope.own(sockets.take(own)), record.peer: scope.own(sockets.take(peer))}
    if record.is_datagram and record.peer is None and record.peer_name:
        # Unread messages are from the closed socket, whose name they still tell.
        with borrowed(ends[None]) as sock, ExitStack() as stack:
            bind_for_now(sock, record.peer_name, scope, stack)
    return ends


def _connect_pair(
    record: UnixState,
    server_name: bytes,
    client_name: bytes,
    server_credentials: Peer | None,
    client_credentials: Peer | None,
    scope: CreateScope,
) -> tuple[socket.socket, socket.socket]:
    """(client, accepted socket) of a connection to a listener that lives only here."""
    with ExitStack() as stack:
        if is_path(server_name):
            key = "unix listener", record.socket.netns, record.socket.identity, server_name
            kept = scope.once(
                (*key, _hashable(server_credentials)),
                lambda: _keep_listener(record, server_name, server_credentials, scope),
            )
            listener = stack.enter_context(borrowed(kept.socket, record.socket.identity))
            address: bytes | str = address_of(kept.file)
        else:
            listener = stack.enter_context(sockets.make_socket(record.socket, scope))
            address = bind_for_now(listener, server_name, scope, stack)
            unix_peercred.listen(listener, 1, server_credentials, scope)
        client = sockets.make_socket(record.socket, scope)
        try:
            if client_name:
                bind_for_now(client, client_name, scope, stack)
            unix_peercred.connect(client, address, client_credentials, scope)
            server, _ = listener.accept()
        except OSError as error:
            client.close()
            raise RebuildError(f"unix connection to {shown(server_name)}: {error.strerror}") from error
        except BaseException:
            client.close()
            raise
    return client, server


def _hashable(peer: Peer | None) -> tuple[object, ...]:
    return () if peer is None else (peer.pid, peer.uid, peer.gid, *peer.groups)


class _Listener(NamedTuple):
    """A listener without a file, and what its file was; both owned by the scope."""

    socket: LocalFd
    file: LocalFd


def _keep_listener(record: UnixState, name: bytes, who: Peer | None, scope: CreateScope) -> _Listener:
    """One for all connections to a listener of that path name: to bind it to a name that is none here takes long."""
    listener = sockets.make_socket(record.socket, scope)
    try:
        place = Place(listener, name, None, scope)
        file = scope.own(place.leave())
        unix_peercred.listen(listener, 1, who, scope)
    except BaseException:
        listener.close()
        raise
    return _Listener(scope.own(sockets.take(listener)), file)


def bind_for_now(sock: socket.socket, name: bytes, scope: CreateScope, stack: ExitStack) -> bytes | str:
    """Give `sock` a name without leaving a file behind; returns the address to reach it by meanwhile."""
    if is_path(name):
        place = Place(sock, name, None, scope)
        stack.callback(place.close)
        return place.address
    bind_abstract(sock, name)
    return name


def bind_abstract(sock: socket.socket, name: bytes) -> None:
    """Bind to a name that is no path.

    Raises:
        RebuildError: it is taken.
    """
    try:
        sock.bind(name)
    except OSError as error:
        raise RebuildError(f"unix socket {shown(name)}: cannot be bound: {error.strerror}") from error
