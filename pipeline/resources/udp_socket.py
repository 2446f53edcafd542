"""UDP and UDP-Lite sockets over IPv4 and IPv6.

Kept: local address, peer, options, owner, unread datagrams with their senders (`pipeline.resources.datagrams`),
multicast groups (`pipeline.resources.multicast`), what is shut down. What a person wants to lose may be dropped
(`--udp-queue drop`), by the dump or by the restore. Refused: data that is not sent yet (UDP_CORK), which nobody can
read; a pending error, which reading would take away. Not preserved: a socket without a port that was shut down for
sending (the kernel does not tell), and whether the kernel or the program chose the address of a connected socket.

Source: udp(7), udplite(7), ip(7).
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile
from pipeline.kernel import inetdiag
from pipeline.resources import (
    datagram_state,
    datagrams,
    datagrams_again,
    halves,
    inet_address,
    inet_peer,
    multicast,
    socket_options,
    sockets,
)
from pipeline.resources.datagram_state import DatagramState
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_identity import Identity, borrowed
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated

_UDPLITE = 136
#: UDP_ENCAP: ESP in UDP, with and without IKE; the others are set by tunnels in the kernel
_ENCAP, _ENCAPS_OF_PROGRAMS = 100, (0, 1, 2)
#: options that would keep datagrams from being queued again, or are lost when the socket is disconnected
_HELD_BACK = socket_options.LATE | {"SO_BINDTODEVICE", "SO_RCVBUF", "SO_BUF_LOCK", "UDP_ENCAP", "UDP_CORK"}


class UdpState(DatagramState, frozen=True, kw_only=True):
    """`queue`: what it has not read."""

    queue: datagrams.Queue = []


def _is_udp(who: Identity) -> bool:
    return (
        who.family in (socket.AF_INET, socket.AF_INET6)
        and who.type == socket.SOCK_DGRAM
        and who.protocol in (socket.IPPROTO_UDP, _UDPLITE)
    )


class Udp(CompleteOnceCreated):
    """See the module."""

    name = "udp"
    record: type[UdpState] = UdpState
    carried: Sequence[str] = (
        "UDP and UDP-Lite sockets, bound and connected, with their options and classic filters",
        "unread datagrams with their senders (or dropped: --udp-queue)",
        "multicast groups with their sources",
        "shutdown halves",
    )
    refused: Sequence[str] = (
        "data held back by UDP_CORK",
        "pending errors",
        "unread datagrams with time or device of arrival, or put together by UDP_GRO",
        "for a plain user, unread datagrams of others in the host's network",
        "IPv6 anycast addresses and flow labels",
    )
    shown_by: Sequence[str] = (
        "programs/datagrams.py",
        "resources/test_udp_sockets.py",
        "resources/test_socket_options.py",
    )

    def matches(self, view: FdView) -> bool:
        """A UDP socket of either family."""
        who = view.identity
        return who is not None and _is_udp(who)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """No error, nothing held back, nothing unread that cannot be queued again."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            yield from sockets.check_error(view)
            (unsent,) = struct.unpack("<i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
            if unsent:
                yield Blocker(
                    view.subject, "data was not sent yet", "wait, or clear UDP_CORK", transient=True
                )
            if sock.getsockopt(socket.IPPROTO_UDP, _ENCAP) not in _ENCAPS_OF_PROGRAMS:
                yield Blocker(view.subject, "the kernel runs a tunnel (L2TP, GTP) over it", "end the tunnel")
            netns = sockets.network(sock, scope)
            if netns is None:
                return
            yield from multicast.check(view, sock, netns, scope)
            if scope.policy.udp_queue == "refuse":
                yield from datagrams.refuse_unread(view, sock, scope)
            elif scope.policy.udp_queue == "carry" and datagrams.are_unread(view.local, sock):
                yield from datagrams.check(sock, view.subject)

    def capture(self, view: FdView, scope: CaptureScope) -> UdpState:
        """Options, both addresses, queue, groups.

        Raises:
            Refused: a datagram came with something that cannot come back.
        """
        with view.as_socket() as sock:
            common = sockets.capture(view, sock, scope)
            address = inet_address.local(sock, common.family)
            queue = (
                [] if scope.policy.udp_queue == "drop" else datagrams.peek(sock, view.subject, scope.shield)
            )
            return UdpState(
                socket=common,
                local=address if address.is_set else None,
                peer=inet_peer.remote(view, sock, common.identity, common.netns, scope),
                queue=datagrams.with_senders(queue, common, view.subject, scope),
                groups=multicast.capture(sock, common.netns, scope),
                shut=self._shut(view, common, scope),
            )

    def _shut(self, view: FdView, common: SocketState, scope: CaptureScope) -> int:
        if found := halves.of(view.local):
            return found
        known: dict[int, int] | None = scope.peers().get(key := ("shut down", *_table(common)))
        if known is None:
            try:
                known = inetdiag.shut_down(
                    lambda make: scope.in_network(common.netns, make), common.family, common.protocol
                )
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                known = {}
            scope.peers()[key] = known
        return known.get(view.stat.st_ino, 0)

    def create(self, file: OpenFile, record: UdpState, scope: CreateScope) -> LocalFd:
        """A socket with its options and what it has not read, bound and connected as it was.

        Raises:
            RebuildError: an option, address or group is not to be had here, or a datagram does not come in.
        """
        subject, common = f"open file {file.index} (udp)", record.socket
        if not _is_udp(common.identity):
            raise RebuildError(f"{subject}: is no socket of this kind")
        with scope.new_socket(common.netns, common.identity) as sock:
            sockets.give_owner(sock, common, scope, subject)
            if record.queue and scope.policy.udp_queue != "drop":
                socket_options.apply(sock, common.identity, common.options, subject, _HELD_BACK)
                if not datagrams_again.queue_again(sock, common, record.queue, subject, scope):
                    self._awaiting(scope).append(file.index)
            socket_options.apply(sock, common.identity, common.options, subject)
            datagram_state.place(sock, record, subject)
            return sockets.take(sock)

    @staticmethod
    def _awaiting(scope: CreateScope) -> list[Index]:
        """The sockets whose datagrams the tree's own sockets have to send again."""
        return scope.once(("datagrams to be sent again",), list)

    def connect(self, file: OpenFile, record: UdpState, scope: CreateScope) -> None:
        """Have datagrams sent again by the sockets that have sent them, where nobody could queue them.

        Raises:
            RebuildError: one was sent by nobody of the tree, or does not arrive.
        """
        if file.index in self._awaiting(scope):
            with borrowed(scope.file(file.index)) as sock:
                datagrams_again.send_again(
                    sock, record.local, record.queue, f"open file {file.index} (udp)", scope
                )


def _table(common: SocketState) -> tuple[Index, int, int]:
    return common.netns, common.family, common.protocol


KIND = Udp()
