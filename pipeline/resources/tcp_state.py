"""What an image says of a TCP socket: the records, and how states are called.

Sequence numbers are those of data: where a FIN is part of what was sent or received, the state says so.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from pipeline.image.schema import U16, U32, Index, Record
from pipeline.resources.inet_address import Address
from pipeline.resources.sockets import SocketState

#: of one direction; together with the rest a record has to stay below `pipeline.image.codec.MAX_RECORD_BYTES`
MAX_QUEUE_BYTES = 24 << 20
Bytes = Annotated[bytes, Meta(max_length=MAX_QUEUE_BYTES)]


#: packed address, without the IPv6 form of IPv4 ones, and port
End = tuple[bytes, int]
_MAPPED = bytes(10) + b"\xff\xff"


def plain(host: bytes, port: int) -> End:
    """One end, comparable between sockets of both families."""
    return host.removeprefix(_MAPPED) if len(host) == 16 and host[:12] == _MAPPED else host, port


class State(IntEnum):
    """`sk_state` (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


#: the program has said that it sends no more; the peer has
FIN_UNACKNOWLEDGED = frozenset({State.FIN_WAIT1, State.CLOSING, State.LAST_ACK})
FIN_SENT = frozenset({State.FIN_WAIT2, *FIN_UNACKNOWLEDGED})
FIN_RECEIVED = frozenset({State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING})
#: what can be made again with all that belongs to it
CONNECTED = frozenset({State.ESTABLISHED, State.CLOSE_WAIT, *FIN_SENT})


class Window(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """struct tcp_repair_window: the windows of both directions and what they were last told with."""

    snd_wl1: U32
    snd_wnd: U32
    max_window: U32
    rcv_wnd: U32
    rcv_wup: U32

    def pack(self) -> bytes:
        """As TCP_REPAIR_WINDOW takes it."""
        return struct.pack("=5I", self.snd_wl1, self.snd_wnd, self.max_window, self.rcv_wnd, self.rcv_wup)


class Connection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A connection.

    Args:
        state: one of `CONNECTED`.
        received: bytes that wait to be read; `received_end`: sequence number behind them.
        sent: bytes sent and not acknowledged; `unsent`: those behind them; `sent_end`: number behind both.
        mss: as agreed (mss_clamp). `scales`: of windows, ours and the peer's; None without.
        sack, timestamps: agreed upon; `timestamp`: our clock, as the peer knows it.
        window: see there.
    """

    state: Annotated[int, Meta(ge=1, le=11)]
    received: Bytes = b""
    received_end: U32
    sent: Bytes = b""
    unsent: Bytes = b""
    sent_end: U32
    mss: U16
    scales: tuple[Annotated[int, Meta(ge=0, le=14)], Annotated[int, Meta(ge=0, le=14)]] | None = None
    sack: bool = False
    timestamps: bool = False
    timestamp: U32 = 0
    window: Window

    @property
    def acknowledged_end(self) -> int:
        """The sequence number of the first byte that the peer has not acknowledged."""
        return (self.sent_end - len(self.sent) - len(self.unsent)) & 0xFFFF_FFFF


class Client(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A socket of the tree that waits to be accepted, and the address that it has connected to."""

    file: Index
    peer: Address


#: idle: fresh or bound. connecting: SYN_SENT. waiting: connected, and the listener, in the tree, did not accept it yet.
#: ended: both directions are over. closed: by `--tcp close`; finds a reset
Phase = Literal["idle", "listening", "connected", "connecting", "waiting", "ended", "closed"]


class TcpState(Record, frozen=True, kw_only=True):
    """A TCP socket.

    Args:
        local: None if not bound; `peer`: None without one.
        backlog: None if not listening; `clients`: who waits to be accepted, in order.
        connection: for the phase `connected`.
        unread: for the phase `ended`.
        lock: name of the lock that holds the peer off (see tcp_lock); empty where it is in the tree.
    """

    socket: SocketState
    phase: Phase = "idle"
    local: Address | None = None
    peer: Address | None = None
    backlog: U32 | None = None
    clients: Annotated[list[Client], Meta(max_length=65536)] = []
    connection: Connection | None = None
    unread: Bytes = b""
    lock: Annotated[str, Meta(max_length=16, pattern="^([0-9a-f]{16})?$")] = ""


class Info(NamedTuple):
    """What TCP_INFO says."""

    state: int
    options: int
    scale_out: int
    scale_in: int
    #: of a listener: clients that wait, and its backlog
    waiting: int
    backlog: int
    acknowledged_bytes: int
    last_heard_ms: int
    segments_in: int


_TIMESTAMPS, _SACK, _SCALES = 1, 2, 4
_INFO_BYTES = 144


def info_of(sock: socket.socket) -> Info:
    """TCP_INFO of a socket; nothing is changed."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES).ljust(_INFO_BYTES, b"\0")
    waiting, backlog = struct.unpack_from("=2I", raw, 24)
    (heard,) = struct.unpack_from("=I", raw, 56)
    (acknowledged,) = struct.unpack_from("=Q", raw, 120)
    (segments,) = struct.unpack_from("=I", raw, 140)
    return Info(raw[0], raw[5], raw[6] & 15, raw[6] >> 4, waiting, backlog, acknowledged, heard, segments)


def agreed(info: Info) -> tuple[tuple[int, int] | None, bool, bool]:
    """Window scales, SACK and timestamps as the ends have agreed."""
    scales = (info.scale_out, info.scale_in) if info.options & _SCALES else None
    return scales, bool(info.options & _SACK), bool(info.options & _TIMESTAMPS)
