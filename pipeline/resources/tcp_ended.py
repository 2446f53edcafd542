"""Sockets whose connection is over, and is still held by a descriptor.

An *ended* one has said and heard its last word in order; bytes may be left to be read, then comes the end. A *reset*
one is what `--tcp close` leaves of a connection. Nobody remembers who their peers were, so both are made with a peer of
our own at the same address, or in the loopback device: it does what the true one did, and is closed. Where there is no
loopback, a socket that was never connected takes the place of a reset one: reading gives ENOTCONN.

Source: net/ipv4/tcp_input.c (tcp_rcv_state_process, tcp_reset).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress

from pipeline.errors import RebuildError
from pipeline.resources import inet_address, sockets, tcp_read, tcp_rebuild
from pipeline.resources.tcp_rebuild import Made
from pipeline.resources.tcp_state import State, TcpState, info_of

_SOL = socket.SOL_SOCKET
_PATIENCE_S = 2.0
_LOOPBACK = {socket.AF_INET: ("127.0.0.1",), socket.AF_INET6: ("::1", "::ffff:127.0.0.1")}


def make_ended(sock: socket.socket, record: TcpState, made: Made, subject: str) -> None:
    """Let a fresh socket have been connected, and have ended.

    Raises:
        RebuildError: the kernel does not take a part of it.
    """
    common, local = record.socket, record.local
    try:
        tcp_rebuild.apply_first(sock, common, subject)
        name = None
        if local is not None:
            tcp_rebuild.bind_forced(sock, record, subject)
            name = inet_address.unpack(sock, common.family, local)
        if record.unread:
            tcp_rebuild.make_room_to_receive(sock, len(record.unread))
        host = name or (_LOOPBACK[socket.AddressFamily(common.family)][0], 0)
        with _connected(sock, (host[0], 0, *host[2:]), made) as peer:
            peer.settimeout(_PATIENCE_S)
            peer.sendall(record.unread)
            peer.shutdown(socket.SHUT_WR)
            _await(sock, State.CLOSE_WAIT, len(record.unread))
            sock.shutdown(socket.SHUT_WR)
            _await(sock, State.CLOSE, len(record.unread))
    except OSError as error:
        raise RebuildError(
            f"{subject}: its ended connection cannot be made again: {error.strerror}"
        ) from error
    _give_options(sock, record, subject)


def make_reset(sock: socket.socket, record: TcpState, made: Made, subject: str) -> None:
    """Let a fresh socket have a connection that its peer has reset.

    Raises:
        RebuildError: an option cannot be set.
    """
    for host in _LOOPBACK[socket.AddressFamily(record.socket.family)]:
        with suppress(OSError):
            _reset(sock, host, made)
            break
    tcp_rebuild.apply_first(sock, record.socket, subject)
    _give_options(sock, record, subject)


def _give_options(sock: socket.socket, record: TcpState, subject: str) -> None:
    tcp_rebuild.apply_rest(sock, record.socket, subject)
    tcp_rebuild.apply_reuse(sock, record)
    tcp_rebuild.apply_late(sock, record)


def _connected(sock: socket.socket, name: tuple[str | int, ...], made: Made) -> socket.socket:
    """Connect `sock` with a peer at an address, with a port of its own; the caller owns the peer."""
    with made(lambda: socket.socket(sock.family, socket.SOCK_STREAM)) as listener:
        listener.bind(name)
        listener.listen(1)
        with sockets.without_waiting(sock), suppress(BlockingIOError):
            sock.connect(listener.getsockname())
        listener.settimeout(_PATIENCE_S)
        peer, _ = listener.accept()
        return peer


def _reset(sock: socket.socket, host: str, made: Made) -> None:
    with _connected(sock, (host, 0), made) as peer:
        peer.setsockopt(_SOL, socket.SO_LINGER, struct.pack("=2i", 1, 0))
    poll = select.poll()
    poll.register(sock, 0)
    poll.poll(1000 * _PATIENCE_S)


def _await(sock: socket.socket, state: State, received: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while info_of(sock).state != state or tcp_read.queued(sock)[0] != received:
        if time.monotonic() > deadline:
            raise TimeoutError(0, f"it does not reach {state.name}")
        time.sleep(0.0005)
