"""UDP sockets over IPv4 and IPv6 with nothing in their queues.

Kept: local address, peer, options, owner. Refused: datagrams not read or not sent yet, a
pending error, multicast memberships, a socket that was shut down for reading. Not
preserved: a shutdown for writing alone (the kernel does not tell), and whether the kernel
or the program chose the local address of a connected socket.

Source: udp(7), ip(7).
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile, Record
from pipeline.resources import inet_address, multicast, socket_options, sockets
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated


class UdpState(Record, frozen=True, kw_only=True):
    """`local`: None if not bound. `peer`: None if not connected."""

    socket: SocketState
    local: Address | None = None
    peer: Address | None = None


class Udp(CompleteOnceCreated):
    """See the module."""

    name = "udp"
    record: type[UdpState] = UdpState
    carried: Sequence[str] = ("UDP sockets, bound and connected, with their options",)
    refused: Sequence[str] = ("datagrams in a queue", "multicast memberships", "pending errors")
    shown_by: Sequence[str] = (
        "programs/sockets.py",
        "resources/test_inet_sockets.py",
    )

    def matches(self, view: FdView) -> bool:
        """A UDP socket of either family."""
        who = sockets.identity_of(view)
        return (
            who is not None
            and who.family in (socket.AF_INET, socket.AF_INET6)
            and (who.type, who.protocol) == (socket.SOCK_DGRAM, socket.IPPROTO_UDP)
        )

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Empty queues, no error, no group."""
        with sockets.borrowed(view.local) as sock:
            yield from sockets.check(view, sock, scope)
            found = sockets.events(view.local, select.POLLIN | select.POLLRDHUP)
            if found & select.POLLERR:
                yield Blocker(
                    view.subject, "an error waits to be read", "wait until it is read", transient=True
                )
            if found & select.POLLRDHUP:
                yield Blocker(view.subject, "the socket was shut down for reading", "close it")
            elif found & select.POLLIN:
                yield Blocker(
                    view.subject, "datagrams wait to be read", "wait until they are read", transient=True
                )
            (unsent,) = struct.unpack("<i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
            if unsent:
                yield Blocker(
                    view.subject, "data was not sent yet", "wait, or clear UDP_CORK", transient=True
                )
            if sockets.network(sock, scope) is not None:
                groups = sorted(
                    {group for family in _families(sock) for group in multicast.joined(sock, family)}
                )
                if groups:
                    yield Blocker(
                        view.subject, f"member of multicast group {', '.join(groups)}", "leave the group"
                    )

    def capture(self, view: FdView, scope: CaptureScope) -> UdpState:
        """Options and both addresses."""
        with sockets.borrowed(view.local) as sock:
            common = sockets.capture(view, sock, scope)
            address = inet_address.local(sock, common.family)
            peer = inet_address.remote(sock, common.family)
        return UdpState(socket=common, local=address if address.is_set else None, peer=peer)

    def create(self, file: OpenFile, record: UdpState, scope: CreateScope) -> LocalFd:
        """A socket with its options, bound and connected as it was.

        Raises:
            RebuildError: an option or address is not to be had here.
        """
        subject, common = f"open file {file.index} (udp)", record.socket
        with sockets.make_socket(common, scope) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            if record.local is not None:
                inet_address.bind(sock, common.family, record.local, subject)
            if record.peer is not None:
                inet_address.connect(sock, common.family, record.peer, subject)
            return sockets.take(sock)


def _families(sock: socket.socket) -> Sequence[int]:
    """The protocols under which `sock` can have joined groups: an IPv6 socket may join those of IPv4 too."""
    return (socket.AF_INET,) if sock.family == socket.AF_INET else (socket.AF_INET, socket.AF_INET6)


KIND = Udp()
