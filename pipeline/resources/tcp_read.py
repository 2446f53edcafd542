"""Reading connections: sequence numbers, windows and both queues, by TCP_REPAIR.

Repair mode belongs to the socket, not to who asks for it: while it is on, the program's own calls on the socket would
fail. So it is on only while one socket is read, some microseconds, of a tree that stands still; and it is done by a
shielded child (see `shielded`): when we are killed, it goes on with that socket, puts repair mode off, and ends, and
only then is the tree let go. If the child is killed, we put it off.

Putting repair mode off sets SO_REUSEADDR back to 0: it is given its value again. SO_PEEK_OFF is off meanwhile, and
given back likewise.

Source: net/ipv4/tcp.c (do_tcp_setsockopt, tcp_recvmsg_locked, tcp_peek_sndq).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import msgpack

from pipeline.ids import LocalFd
from pipeline.resources.shielded import Shield, shielded
from pipeline.resources.socket_identity import ANY, borrowed
from pipeline.resources.tcp_state import (
    FIN_RECEIVED,
    FIN_SENT,
    FIN_UNACKNOWLEDGED,
    MAX_QUEUE_BYTES,
    Connection,
    Window,
    agreed,
    info_of,
)

_TCP, _SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
REPAIR, REPAIR_QUEUE, QUEUE_SEQ, REPAIR_OPTIONS, TIMESTAMP, REPAIR_WINDOW = 19, 20, 21, 22, 24, 29
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
#: TCP_REPAIR: on; off without a word to the peer; off with a probe of its window
ON, OFF_SILENTLY, OFF = 1, -1, 0
_NO_SUCH_MODE = 42
_SIOCOUTQNSD = 0x894B
_SO_PEEK_OFF = 42
_READ_AGAIN = 50


def may_repair(sock: socket.socket) -> bool:
    """Whether we may put a socket that does not listen into repair mode; nothing is changed."""
    try:
        sock.setsockopt(_TCP, REPAIR, _NO_SUCH_MODE)
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def queued(sock: socket.socket) -> tuple[int, int]:
    """Bytes that wait to be read, and those that are not acknowledged (a FIN counts as one)."""
    return _ioctl(sock, termios.FIONREAD), _ioctl(sock, termios.TIOCOUTQ)


def _ioctl(sock: socket.socket, number: int) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(sock, number, bytes(4)))[0])


def unsent(sock: socket.socket) -> int:
    """Bytes that were not sent yet (a FIN counts as one)."""
    return _ioctl(sock, _SIOCOUTQNSD)


def peek(local: LocalFd) -> bytes:
    """What waits to be read, without taking it. The socket has no pending error."""
    with borrowed(local, ANY) as sock:
        waiting, _ = queued(sock)
    return _lent([local], lambda: shielded(lambda: _peek_whole(local, waiting))) if waiting else b""


def _peek_whole(local: LocalFd, size_bytes: int) -> bytes:
    with borrowed(local, ANY) as sock, _whole_queue(sock):
        return sock.recv(size_bytes, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def _lent(locals_: Sequence[LocalFd], look: Callable[[], bytes]) -> bytes:
    """Look by a child that outlives us and gives back what it has changed; if it fails, as when it is killed, we do."""
    with ExitStack() as loans:
        for local in locals_:
            with borrowed(local, ANY) as sock:
                loans.callback(_end_loan, local, _settings_of(sock))
        found = look()
        loans.pop_all()
    return found


def _end_loan(local: LocalFd, before: _Settings) -> None:
    with borrowed(local, ANY) as sock:
        _give_back(sock, before)


class _Settings(NamedTuple):
    """What is changed of a socket while it is read. `peek_offset`: SO_PEEK_OFF, -1 without."""

    reuse: int
    peek_offset: int


def _settings_of(sock: socket.socket) -> _Settings:
    try:
        offset = sock.getsockopt(_SOL, _SO_PEEK_OFF)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise
        offset = -1
    return _Settings(sock.getsockopt(_SOL, socket.SO_REUSEADDR), offset)


def _give_back(sock: socket.socket, before: _Settings) -> None:
    """Out of repair mode, with the settings that it had; changes nothing if that is so."""
    if sock.getsockopt(_TCP, REPAIR):
        sock.setsockopt(_TCP, REPAIR, OFF_SILENTLY)
    if before.reuse:
        sock.setsockopt(_SOL, socket.SO_REUSEADDR, before.reuse)
    if before.peek_offset >= 0:
        sock.setsockopt(_SOL, _SO_PEEK_OFF, before.peek_offset)


@contextmanager
def _whole_queue(sock: socket.socket) -> Iterator[None]:
    """Without SO_PEEK_OFF, by which MSG_PEEK would not begin at the first byte, and would move it."""
    before = _settings_of(sock)
    try:
        if before.peek_offset >= 0:
            sock.setsockopt(_SOL, _SO_PEEK_OFF, -1)
        yield
    finally:
        _give_back(sock, before)


def read(locals_: Sequence[LocalFd], shield: Shield) -> list[Connection]:
    """Read connections, all in one child.

    Args:
        locals_: duplicates of sockets in a state of `CONNECTED`, of a tree that stands still.
        shield: whose child it is.

    Raises:
        OSError: the kernel does not let us; ENODATA: a queue does not stop changing.
    """
    packed = _lent(locals_, lambda: shield.run(_read_all, locals_, os.getpid()))
    answers = msgpack.unpackb(packed, max_bin_len=2 * MAX_QUEUE_BYTES, use_list=False, strict_map_key=False)
    return [_typed(*answer) for answer in answers]


def _read_all(locals_: Sequence[LocalFd], parent: int) -> bytes:
    """In the child, until all are read or `parent`, who wants to know, has ended."""
    found = []
    for local in locals_:
        if os.getppid() != parent:
            break
        with borrowed(local, ANY) as sock:
            found.append(_read_whole(sock))
    packed: bytes = msgpack.packb(found)
    return packed


def _read_whole(sock: socket.socket) -> tuple[Any, ...]:
    for _ in range(_READ_AGAIN):
        found = _read_once(sock)
        if found is not None:
            return found
    raise OSError(errno.ENODATA, "a queue does not stop changing")


def _read_once(sock: socket.socket) -> tuple[Any, ...] | None:
    """One look in repair mode; None if something came in between."""
    with _whole_queue(sock):
        sock.setsockopt(_TCP, REPAIR, ON)
        return _look(sock)


def _look(sock: socket.socket) -> tuple[Any, ...] | None:
    info = info_of(sock)
    state = info.state
    fin = int(state in FIN_UNACKNOWLEDGED)
    sock.setsockopt(_TCP, REPAIR_QUEUE, SEND_QUEUE)
    sent_end = sock.getsockopt(_TCP, QUEUE_SEQ)
    received, outstanding = queued(sock)
    data = _peek_in_repair(sock, outstanding)
    if len(data) != outstanding - fin or _ioctl(sock, termios.TIOCOUTQ) != outstanding:
        return None
    behind = unsent(sock)
    sock.setsockopt(_TCP, REPAIR_QUEUE, RECEIVE_QUEUE)
    received_end = sock.getsockopt(_TCP, QUEUE_SEQ)
    waiting = _peek_in_repair(sock, received)
    if len(waiting) != received or sock.getsockopt(_TCP, QUEUE_SEQ) != received_end:
        return None
    if info_of(sock).state != state:
        return None
    return (
        state,
        sent_end,
        data,
        behind,
        received_end,
        waiting,
        sock.getsockopt(_TCP, socket.TCP_MAXSEG),
        sock.getsockopt(_TCP, TIMESTAMP),
        sock.getsockopt(_TCP, REPAIR_WINDOW, 20),
        *agreed(info),
    )


def _peek_in_repair(sock: socket.socket, size_bytes: int) -> bytes:
    if not size_bytes:
        return b""
    try:
        return sock.recv(size_bytes, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def _typed(
    state: int,
    sent_end: int,
    data: bytes,
    behind: int,
    received_end: int,
    received: bytes,
    mss: int,
    timestamp: int,
    window: bytes,
    scales: tuple[int, int] | None,
    sack: bool,
    timestamps: bool,
) -> Connection:
    """What `_look` has found."""
    fin = int(state in FIN_SENT)
    # a FIN that was not sent yet stands behind the data
    behind = min(len(data), max(0, behind - int(state in FIN_UNACKNOWLEDGED)))
    return Connection(
        state=state,
        received=received,
        received_end=(received_end - int(state in FIN_RECEIVED)) & 0xFFFF_FFFF,
        sent=data[: len(data) - behind],
        unsent=data[len(data) - behind :],
        sent_end=(sent_end - fin) & 0xFFFF_FFFF,
        mss=mss,
        scales=scales,
        sack=sack,
        timestamps=timestamps,
        timestamp=timestamp & 0xFFFF_FFFF,
        window=Window(*struct.unpack("=5I", window)),
    )
