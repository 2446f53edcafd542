"""Making connections again, in repair mode until the tree runs.

In repair mode connect(2) says nothing to the peer and makes an established connection with the sequence numbers that
were set before; what is sent then goes into the queue of one's choice. The rest of a state's way is gone as the kernel
goes it: a FIN of the peer is delivered (`pipeline.resources.tcp_segments`), one's own follows from shutdown(2).

Until the tree runs, closing the socket says nothing to the peer either, so a rebuild that fails does no harm to a
connection that goes on at its source. `wake` is what comes behind that: repair mode ends, what was not sent yet
is sent, and one's own FIN.

Not kept: what the kernel has learned of the path (round trip time, congestion window), segments received out
of order (the peer sends them again), ECN, urgent marks in what was sent.

Source: net/ipv4/tcp.c, net/ipv4/tcp_output.c (tcp_write_xmit: `repair`).
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pipeline.errors import ImageError, RebuildError
from pipeline.kernel import interfaces
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import inet_address, socket_options
from pipeline.resources.inet_address import Address
from pipeline.resources.sockets import EXTERNAL_NETWORK, SocketState
from pipeline.resources.tcp_read import (
    OFF,
    OFF_SILENTLY,
    ON,
    QUEUE_SEQ,
    RECEIVE_QUEUE,
    REPAIR,
    REPAIR_OPTIONS,
    REPAIR_QUEUE,
    REPAIR_WINDOW,
    SEND_QUEUE,
    TIMESTAMP,
)
from pipeline.resources.tcp_segments import ACK, FIN, Segment, deliver
from pipeline.resources.tcp_state import FIN_RECEIVED, Connection, State, TcpState, info_of, plain

Made = Callable[[Callable[[], socket.socket]], socket.socket]

_TCP = socket.IPPROTO_TCP
_SOL = socket.SOL_SOCKET
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}
_OPT_MSS, _OPT_WINDOW, _OPT_SACK, _OPT_TIMESTAMP = 2, 3, 4, 8
_LEAST_MSS, _MOST_MSS = 88, 32767
_PIECE_BYTES = 1 << 18
_SMALLEST_PIECE_BYTES = 1 << 10
#: how long an acknowledgement may be on its way within a host
_ANSWER_S = 0.2
#: repair mode forces it, and ends with it cleared
_REUSE = "SO_REUSEADDR"
#: of an unconnected socket only; of a connected one it says what was agreed
_UNCONNECTED_ONLY = frozenset({"TCP_MAXSEG", "TCP_FASTOPEN", "TCP_FASTOPEN_CONNECT", "TCP_DEFER_ACCEPT"})
#: what accept(2) takes from the first segment, and no stream socket may be told
_OF_THE_SEGMENT = frozenset(
    {"IP_MULTICAST_TTL", "IP_MULTICAST_IF", "IPV6_MULTICAST_HOPS", "IPV6_MULTICAST_IF"}
)
#: for the time when there is a connection
_AFTERWARDS = frozenset({_REUSE, "TCP_WINDOW_CLAMP", "SO_SNDBUF", "SO_RCVBUF", "SO_BUF_LOCK"})


def begin(sock: socket.socket, subject: str) -> None:
    """Put a new socket into repair mode.

    Raises:
        RebuildError: it may not be.
    """
    try:
        sock.setsockopt(_TCP, REPAIR, ON)
    except OSError as error:
        hint = ""
        if error.errno == errno.EPERM:
            hint = "; it takes CAP_NET_ADMIN in this network: restore as root"
        raise RebuildError(
            f"{subject}: a connection cannot be made again here: {error.strerror}{hint}"
        ) from error


def bind_forced(sock: socket.socket, record: TcpState, subject: str) -> None:
    """Bind to an address that other sockets of the tree may be bound to, too.

    Where that may not be forced, it is tried as anybody may.
    """
    assert record.local is not None
    family = record.socket.family
    try:
        sock.setsockopt(_TCP, REPAIR, ON)
    except PermissionError:
        sock.setsockopt(_SOL, socket.SO_REUSEADDR, 1)
        inet_address.bind(sock, family, record.local, subject)
        sock.setsockopt(_SOL, socket.SO_REUSEADDR, 0)
        return
    try:
        with _free_bind(sock, family, record.socket.netns != EXTERNAL_NETWORK):
            inet_address.bind(sock, family, record.local, subject)
    finally:
        sock.setsockopt(_TCP, REPAIR, OFF_SILENTLY)


def establish(sock: socket.socket, record: TcpState, subject: str, fresh: socket_options.Values) -> None:
    """Make a socket in repair mode the end of its connection; it stays in repair mode.

    Args:
        sock: fresh, in its network.
        record: with a connection.
        subject: how a message names it.
        fresh: its options.

    Raises:
        RebuildError: the kernel does not take a part of it.
    """
    now = record.connection
    if now is None or record.local is None or record.peer is None:
        raise ImageError(f"{subject}: a connection without its ends")
    common = record.socket
    try:
        apply_first(sock, common, subject, fresh)
        _set_sequences(sock, now.received_end - len(now.received), now.acknowledged_end)
        # connect(2) derives from it what fits into a segment, and does not when the agreed value is set later
        sock.setsockopt(_TCP, socket.TCP_MAXSEG, max(_LEAST_MSS, min(now.mss, _MOST_MSS)))
        with _free_bind(sock, common.family, common.netns != EXTERNAL_NETWORK):
            inet_address.bind(sock, common.family, record.local, subject)
            inet_address.connect(sock, common.family, record.peer, subject)
        sock.setsockopt(_TCP, socket.TCP_MAXSEG, 0)
        _agree(sock, now)
        apply_rest(sock, common, subject)
        _fill(sock, RECEIVE_QUEUE, now.received)
        _fill(sock, SEND_QUEUE, now.sent)
        _make_room(sock, len(now.unsent))
    except OSError as error:
        raise RebuildError(f"{subject}: its connection cannot be made again: {error.strerror}") from error


def apply_first(
    sock: socket.socket, common: SocketState, subject: str, fresh: socket_options.Values | None = None
) -> None:
    """The options that a socket has before it is connected. `fresh`: see `socket_options.apply`."""
    without = _UNCONNECTED_ONLY | _OF_THE_SEGMENT | _AFTERWARDS | socket_options.LATE
    socket_options.apply(sock, common.identity, common.options, subject, without, fresh)


def apply_rest(sock: socket.socket, common: SocketState, subject: str) -> None:
    """Those that a connection would change."""
    rest = {name: common.options[name] for name in _AFTERWARDS - {_REUSE} if name in common.options}
    socket_options.apply(sock, common.identity, rest, subject)


def apply_reuse(sock: socket.socket, record: TcpState) -> None:
    """SO_REUSEADDR, which repair mode has changed."""
    if any(record.socket.options.get(_REUSE, b"")):
        sock.setsockopt(_SOL, socket.SO_REUSEADDR, 1)


def _set_sequences(sock: socket.socket, received: int, acknowledged: int) -> None:
    """Which byte comes next from the peer, and which one goes to it."""
    _set_sequence(sock, RECEIVE_QUEUE, received)
    _set_sequence(sock, SEND_QUEUE, acknowledged)


def make_room_to_receive(sock: socket.socket, size_bytes: int) -> None:
    """So that bytes that are sent now fit into the queue; `apply_rest` gives the buffer its size."""
    _grow(sock, RECEIVE_QUEUE, size_bytes)


def _set_sequence(sock: socket.socket, queue: int, number: int) -> None:
    sock.setsockopt(_TCP, REPAIR_QUEUE, queue)
    sock.setsockopt(_TCP, QUEUE_SEQ, struct.pack("=I", number & 0xFFFF_FFFF))


@contextmanager
def _free_bind(sock: socket.socket, family: int, free: bool) -> Iterator[None]:
    """Let `sock` be bound to an address that is not ready yet: IPv6 looks for duplicates when a link comes up.

    That is so in the tree's own networks, whose addresses come with the tree.
    """
    option = _FREEBIND[socket.AddressFamily(family)]
    before = sock.getsockopt(*option)
    if free:
        sock.setsockopt(*option, 1)
    try:
        yield
    finally:
        if free:
            sock.setsockopt(*option, before)


def _agree(sock: socket.socket, now: Connection) -> None:
    agreed = [(_OPT_MSS, now.mss)]
    if now.scales is not None:
        agreed.append((_OPT_WINDOW, now.scales[0] | now.scales[1] << 16))
    if now.sack:
        agreed.append((_OPT_SACK, 0))
    if now.timestamps:
        agreed.append((_OPT_TIMESTAMP, 0))
    sock.setsockopt(_TCP, REPAIR_OPTIONS, b"".join(struct.pack("=II", *one) for one in agreed))
    if now.timestamps:
        sock.setsockopt(_TCP, TIMESTAMP, struct.pack("=I", now.timestamp))


def _fill(sock: socket.socket, queue: int, data: bytes) -> None:
    """Put bytes into a queue: in pieces, as large as there is room for."""
    if not data:
        return
    sock.setsockopt(_TCP, REPAIR_QUEUE, queue)
    left = memoryview(data)
    piece = _PIECE_BYTES
    grown = False
    while left:
        try:
            left = left[sock.send(left[:piece], socket.MSG_DONTWAIT) :]
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS):
                raise
            if piece > _SMALLEST_PIECE_BYTES:
                piece //= 4
            elif not grown:
                grown = True
                _grow(sock, queue, len(data))
                piece = _PIECE_BYTES
            else:
                raise


def _grow(sock: socket.socket, queue: int, size_bytes: int) -> None:
    """Room for what was in a buffer: the kernel may have packed it closer there.

    Without CAP_NET_ADMIN on this host there is as much as anybody may have.
    """
    number, forced = (
        (socket.SO_RCVBUF, _SO_RCVBUFFORCE) if queue == RECEIVE_QUEUE else (socket.SO_SNDBUF, _SO_SNDBUFFORCE)
    )
    wanted = sock.getsockopt(_SOL, number) // 2 + 2 * size_bytes
    try:
        sock.setsockopt(_SOL, forced, wanted)
    except PermissionError:
        sock.setsockopt(_SOL, number, wanted)


def _make_room(sock: socket.socket, size_bytes: int) -> None:
    """So that all that was not sent yet can be queued in one go; `wake` gives the buffer its size again."""
    if size_bytes:
        _grow(sock, SEND_QUEUE, size_bytes)


def go_to_state(sock: socket.socket, record: TcpState, made: Made, subject: str) -> None:
    """From ESTABLISHED to where the connection was, but for one's own FIN that nobody has acknowledged; its window.

    Both ends have to be there by now: an acknowledgement of a FIN that finds nobody is answered with RST.

    Args:
        sock: established, in repair mode.
        record: with a connection.
        made: makes a socket in its network.
        subject: how a message names it.

    Raises:
        RebuildError: it does not get there.
    """
    now = record.connection
    assert now is not None
    state = State(now.state)
    if state == State.CLOSING and now.unsent:
        raise RebuildError(f"{subject}: CLOSING with bytes that were not sent cannot be made again")
    if state in (State.FIN_WAIT2, State.CLOSING):
        sock.setsockopt(_TCP, REPAIR_QUEUE, SEND_QUEUE)
        sock.shutdown(socket.SHUT_WR)
    if state == State.FIN_WAIT2:
        acknowledgement = _fin(sock, record, now)._replace(flags=ACK, acknowledges=now.sent_end + 1)
        deliver(acknowledgement, sock, state, made, subject)
    elif state in FIN_RECEIVED:
        reached = State.CLOSING if state == State.CLOSING else State.CLOSE_WAIT
        fin = _fin(sock, record, now)
        with _closed_peer(record, now, made) as hears:
            deliver(fin, sock, reached, made, subject)
            if hears is not None:
                deliver(fin, sock, reached, made, subject)  # a retransmission is answered at once
                hears()
    try:
        sock.setsockopt(_TCP, REPAIR_WINDOW, now.window.pack())  # last: such segments tell a window, too
    except OSError as error:
        raise RebuildError(f"{subject}: its window cannot be set: {error.strerror}") from error


def _fin(sock: socket.socket, record: TcpState, now: Connection) -> Segment:
    """With which the peer of a connection says that it sends no more."""
    assert record.local is not None
    assert record.peer is not None
    return Segment(
        source=plain(record.peer.host, record.peer.port),
        target=plain(record.local.host, record.local.port),
        sequence=now.received_end,
        acknowledges=now.acknowledged_end,
        flags=FIN | ACK,
        window=now.window.snd_wnd >> (now.scales[0] if now.scales else 0),
        scope=_scope_of(sock, record.local),
    )


@contextmanager
def _closed_peer(record: TcpState, now: Connection, made: Made) -> Iterator[Callable[[], None] | None]:
    """In the block there is somebody who takes the acknowledgement of a FIN whose sender is nobody's any more.

    That is a connection within a network of the tree, or a host, of which one end was closed: an answer that finds
    nobody is answered with RST. What is yielded waits for it. None: its peer is there, or not of this host.
    """
    if not record.lock:  # its peer is in the tree
        yield None
        return
    family, local, peer = record.socket.family, record.local, record.peer
    assert local is not None
    assert peer is not None
    with made(lambda: socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) as sock:
        begin(sock, "a peer that was closed")
        _set_sequences(sock, now.acknowledged_end + len(now.sent), now.received_end + 1)
        try:
            with _free_bind(sock, family, record.socket.netns != EXTERNAL_NETWORK):
                inet_address.bind(sock, family, peer, "it")
                inet_address.connect(sock, family, local, "it")
        except RebuildError:
            yield None
        else:
            yield partial(_await_segment, sock)


def _await_segment(sock: socket.socket) -> None:
    deadline = time.monotonic() + _ANSWER_S
    while not info_of(sock).segments_in and time.monotonic() < deadline:  # a lock may keep it
        time.sleep(0.0005)


def _scope_of(sock: socket.socket, address: Address) -> int:
    """The number of the interface of a link-local address; 0 for others."""
    return interfaces.number_of(sock, address.interface.encode()) if address.interface else 0


def wake(sock: socket.socket, record: TcpState, fresh: socket_options.Values) -> None:
    """End repair mode: the tree runs. OSError: a part of it could not be done. `fresh`: as for `establish`."""
    now = record.connection
    assert now is not None
    options = record.socket.options
    sock.setsockopt(_TCP, REPAIR, OFF)
    apply_reuse(sock, record)
    if now.unsent:
        send_all(sock, now.unsent)
        socket_options.apply(
            sock,
            record.socket.identity,
            {name: options[name] for name in ("SO_SNDBUF", "SO_BUF_LOCK") if name in options},
            "its connection",
        )
    if now.state in (State.FIN_WAIT1, State.LAST_ACK):
        sock.shutdown(socket.SHUT_WR)
    apply_late(sock, record, fresh)


def apply_late(sock: socket.socket, record: TcpState, fresh: socket_options.Values | None = None) -> None:
    """What would have been in the way until now. `fresh`: see `socket_options.apply`."""
    options = record.socket.options
    late = {name: options[name] for name in socket_options.LATE if name in options}
    socket_options.apply(sock, record.socket.identity, late, "its connection", fresh=fresh)


def send_all(sock: socket.socket, data: bytes) -> None:
    """Queue bytes without waiting. OSError: they do not all fit; the connection is reset, so that none is missed."""
    left = memoryview(data)
    try:
        while left:
            left = left[sock.send(left, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            return  # the peer has ended it: that is told to the program
        disconnect = struct.pack("=H14x", socket.AF_UNSPEC)
        syscall(NR.connect, sock.fileno(), disconnect, len(disconnect))
        raise
