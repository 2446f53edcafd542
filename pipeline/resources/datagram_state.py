"""What UDP, raw and ping sockets have in common: where they are bound, whom they are connected to, groups, halves."""

from __future__ import annotations

import socket

from pipeline.image.schema import U8, Record
from pipeline.resources import halves, inet_address, multicast
from pipeline.resources.inet_address import Address
from pipeline.resources.sockets import SocketState


class DatagramState(Record, frozen=True, kw_only=True):
    """`local`: None if not bound. `peer`: None if not connected. `shut`: bit 0 receiving, bit 1 sending."""

    socket: SocketState
    local: Address | None = None
    peer: Address | None = None
    groups: multicast.Memberships = []
    shut: U8 = 0


def place(sock: socket.socket, record: DatagramState, subject: str) -> None:
    """Bind and connect a new socket that has its options, join its groups, shut down its halves.

    Raises:
        RebuildError: an address or a group is not to be had here; names it.
    """
    family = record.socket.family
    if record.local is not None:
        inet_address.bind(sock, family, record.local, subject)
    if record.peer is not None:
        inet_address.connect(sock, family, record.peer, subject)
    multicast.join(sock, record.groups, subject)
    halves.shut(sock, record.shut)
