"""What sock_diag(7) says about packet sockets: memberships, rings, fanout.

A netlink socket answers for the network namespace it was made in.

Source: sock_diag(7), include/uapi/linux/packet_diag.h; net/packet/diag.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import msgspec

from pipeline.kernel.rtnetlink import Netlink, attributes, socket_of

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
#: struct packet_diag_req: family, protocol, inode, what to show, cookie
_REQUEST = struct.Struct("<BBxxII8x")
#: struct packet_diag_msg: family, type, protocol, inode, cookie
_MESSAGE = struct.Struct("<BBHI8x")
_SHOW_ALL = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3
_INFO, _MCLIST, _RX_RING, _TX_RING, _FANOUT = range(5)
#: struct packet_diag_mclist: interface, count, type, length, address
_MEMBERSHIP = struct.Struct("<IIHH32s")


class Member(msgspec.Struct, frozen=True):
    """A PACKET_ADD_MEMBERSHIP: interface index, how many times, PACKET_MR_*, hardware address."""

    interface: int
    count: int
    kind: int
    address: bytes


class PacketSocket(msgspec.Struct, frozen=True):
    """One packet socket. `interface`: 0 for all, -1 for one that is gone. `fanout`: whether it shares with others."""

    interface: int
    copy_threshold: int
    members: tuple[Member, ...]
    rings: bool
    fanout: bool


def find(made: Callable[[Callable[[], socket.socket]], socket.socket], inode: int) -> PacketSocket | None:
    """The packet socket with this inode; None if there is none in this network namespace.

    Raises:
        OSError: ENOENT: this kernel has no such tables.
    """
    found = None
    with Netlink(made(lambda: socket_of(_NETLINK_SOCK_DIAG))) as link:
        for message in link.dump(_BY_FAMILY, _REQUEST.pack(socket.AF_PACKET, 0, 0, _SHOW_ALL)):
            if _MESSAGE.unpack_from(message)[3] == inode:
                found = _typed(attributes(message[_MESSAGE.size :]))
    return found


def _typed(told: dict[int, bytes]) -> PacketSocket:
    interface, _, _, copy_threshold = struct.unpack_from("<iIII", told[_INFO])
    members = []
    for index, count, kind, length, address in _MEMBERSHIP.iter_unpack(told.get(_MCLIST, b"")):
        members.append(Member(index, count, kind, address[:length]))
    return PacketSocket(
        interface, copy_threshold, tuple(members), bool(told.keys() & {_RX_RING, _TX_RING}), _FANOUT in told
    )
