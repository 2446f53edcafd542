"""Packet sockets (AF_PACKET): protocol, device, options, classic filter, memberships, fanout group, owner.

Refused: rings (memory that is shared with the kernel), frames not read yet, unless a person lets them be dropped;
fanout by a program; a device that is gone; pending errors; obsolete SOCK_PACKET. Not preserved: the counters of
PACKET_STATISTICS, which begin anew, and the number of members that the first one of a fanout group allowed.

A socket is filtered before it is bound, so it gets nothing that it would not have got. What its device
says while it is not up yet (ENETDOWN) is taken away again.

Source: packet(7); net/packet/af_packet.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U16, U32, OpenFile, Record
from pipeline.kernel import interfaces, packetdiag
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import datagrams, socket_options, sockets
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_table import SOL_PACKET
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated

_ADD_MEMBERSHIP, _FANOUT = 1, 18
_COPY_THRESHOLD = "PACKET_COPY_THRESH"
#: PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF
_BY_PROGRAM = (6, 7)
_GONE = -1

Device = Annotated[bytes, Meta(max_length=15)]


class Member(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One PACKET_ADD_MEMBERSHIP: device, how many times, PACKET_MR_*, hardware address."""

    device: Device
    count: Annotated[int, Meta(ge=1, le=4096)]
    kind: U16
    address: Annotated[bytes, Meta(max_length=32)]


class PacketState(Record, frozen=True, kw_only=True):
    """`protocol`: ETH_P_*, 0 for none. `device`: empty for all. `fanout`: as PACKET_FANOUT says it; None without."""

    socket: SocketState
    protocol: U16
    device: Device = b""
    members: Annotated[list[Member], Meta(max_length=4096)] = []
    fanout: U32 | None = None


class Packet(CompleteOnceCreated):
    """See the module."""

    name = "packet"
    record: type[PacketState] = PacketState
    carried: Sequence[str] = (
        "packet sockets: protocol, device, options, classic filter, memberships, fanout group",
    )
    refused: Sequence[str] = (
        "rings (PACKET_RX_RING, PACKET_TX_RING)",
        "frames not read yet (or dropped: --udp-queue drop)",
        "fanout by a program",
        "pending errors",
    )
    shown_by: Sequence[str] = (
        "programs/datagrams.py",
        "resources/test_packet_sockets.py",
        "resources/test_socket_options.py",
    )

    def matches(self, view: FdView) -> bool:
        """A packet socket."""
        who = view.identity
        return who is not None and who.family == socket.AF_PACKET

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """No rings, nothing unread, and somebody like ourselves may make it."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            yield from sockets.check_error(view)
            netns = sockets.network(sock, scope)
            if netns is None:
                return
            if sock.type not in (socket.SOCK_RAW, socket.SOCK_DGRAM):
                yield Blocker(view.subject, "a socket of the obsolete type SOCK_PACKET", "close it")
            try:
                scope.in_network(netns, lambda: socket.socket(socket.AF_PACKET, sock.type, 0)).close()
                told = self._told(view, sock, scope)
            except PermissionError:
                yield Blocker(
                    view.subject,
                    "a packet socket can be made only by who has CAP_NET_RAW in its network",
                    "run the pipeline as root",
                )
                return
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                yield Blocker(
                    view.subject, "this kernel does not tell of packet sockets (CONFIG_PACKET_DIAG)"
                )
                return
            if told.rings:
                yield Blocker(
                    view.subject, "a packet socket with a ring (PACKET_RX_RING or PACKET_TX_RING)", "close it"
                )
                return
            if told.interface == _GONE:
                yield Blocker(view.subject, "bound to a device that is gone", "close it")
            if told.fanout and sock.getsockopt(SOL_PACKET, _FANOUT) >> 16 & 0xFF in _BY_PROGRAM:
                yield Blocker(view.subject, "a program chooses among its fanout group", "leave the group")
            values = socket_options.capture(sock, sockets.identity_of(view))
            if told.copy_threshold and _COPY_THRESHOLD not in values:
                yield Blocker(view.subject, f"{_COPY_THRESHOLD} is set", "clear the option")
            yield from datagrams.refuse_unread(view, sock, scope)

    def _told(self, view: FdView, sock: socket.socket, scope: CaptureScope) -> packetdiag.PacketSocket:
        netns = sockets.network(sock, scope)
        assert netns is not None, "`check` refuses sockets of other network namespaces"
        found = packetdiag.find(lambda make: scope.in_network(netns, make), view.stat.st_ino)
        if found is None:
            raise OSError(errno.ENOENT, "no such packet socket")
        return found

    def capture(self, view: FdView, scope: CaptureScope) -> PacketState:
        """Options, protocol, device, memberships."""
        with view.as_socket() as sock:
            told = self._told(view, sock, scope)
            return PacketState(
                socket=sockets.capture(view, sock, scope),
                protocol=sock.getsockname()[1],
                device=interfaces.name_of(sock, told.interface) if told.interface else b"",
                members=[
                    Member(interfaces.name_of(sock, one.interface), one.count, one.kind, one.address)
                    for one in told.members
                ],
                fanout=sock.getsockopt(SOL_PACKET, _FANOUT) & 0xFFFF_FFFF if told.fanout else None,
            )

    def create(self, file: OpenFile, record: PacketState, scope: CreateScope) -> LocalFd:
        """A socket with its options and filter, bound, a member as it was.

        Raises:
            RebuildError: the socket, an option or a device is not to be had here.
        """
        subject, common = f"open file {file.index} (packet)", record.socket
        if common.family != socket.AF_PACKET:
            raise RebuildError(f"{subject}: is no socket of this kind")
        with sockets.make_socket(common, scope) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            try:
                if record.protocol or record.device:
                    index = interfaces.number_of(sock, record.device) if record.device else 0
                    address = struct.pack(
                        "<H2si12x", socket.AF_PACKET, record.protocol.to_bytes(2, "big"), index
                    )
                    syscall(NR.bind, sock.fileno(), address, len(address))
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                for member in record.members:
                    index = interfaces.number_of(sock, member.device)
                    request = struct.pack("<iHH", index, member.kind, len(member.address))
                    for _ in range(member.count):
                        sock.setsockopt(SOL_PACKET, _ADD_MEMBERSHIP, request + member.address.ljust(8, b"\0"))
                if record.fanout is not None:
                    sock.setsockopt(SOL_PACKET, _FANOUT, struct.pack("<I", record.fanout))
            except OSError as error:
                device = os.fsdecode(record.device) or "all devices"
                raise RebuildError(
                    f"{subject}: protocol {record.protocol:#06x} on {device}: {error.strerror}"
                ) from error
            return sockets.take(sock)


KIND = Packet()
