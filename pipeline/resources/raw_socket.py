"""Raw sockets over IPv4 and IPv6, and ping sockets (SOCK_DGRAM of ICMP).

Kept: protocol, addresses, a ping socket's identifier, options (IP_HDRINCL, ICMP_FILTER, IPV6_CHECKSUM, ...) with
classic filters, multicast groups, halves that are shut down, owner. Refused: messages not read yet, unless a person
lets them be dropped (what a raw socket gets, others and the kernel get, too: nothing can be queued in one of them
alone); pending errors; the socket of a multicast router, whose tables the kernel drops with it. Not preserved: a socket
that is shut down for writing alone (the kernel does not tell).

A raw socket is made by who has CAP_NET_RAW in its network, a ping socket by who is of a group of
net.ipv4.ping_group_range: as one of the group that owned it, if need be.

Source: raw(7), icmp(7); net/ipv4/ping.c (ping_init_sock), net/ipv4/ipmr.c.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile
from pipeline.resources import (
    datagram_state,
    datagrams,
    halves,
    inet_address,
    inet_peer,
    multicast,
    socket_options,
    sockets,
)
from pipeline.resources.acting import UNCHANGED, acting_as
from pipeline.resources.datagram_state import DatagramState
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_identity import Identity
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.userns.visit import read_file

_PING = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
#: protocol of the sockets that can be a multicast router's -> the sysctl that tells that there is one
_ROUTER = {
    socket.IPPROTO_IGMP: "/proc/sys/net/ipv4/conf/all/mc_forwarding",
    socket.IPPROTO_ICMPV6: "/proc/sys/net/ipv6/conf/all/mc_forwarding",
}


def is_ping(who: Identity) -> bool:
    """Whether it is a ping socket, among those of IPv4 and IPv6."""
    return who.type == socket.SOCK_DGRAM and who.protocol in _PING


def _is_raw_or_ping(who: Identity) -> bool:
    return who.family in (socket.AF_INET, socket.AF_INET6) and (who.type == socket.SOCK_RAW or is_ping(who))


class Raw(CompleteOnceCreated):
    """See the module."""

    name = "raw"
    record: type[DatagramState] = DatagramState
    carried: Sequence[str] = (
        "raw sockets of IPv4 and IPv6, and ping sockets: addresses, options, classic filters",
        "their multicast groups and shutdown halves",
    )
    refused: Sequence[str] = (
        "messages not read yet (or dropped: --udp-queue drop)",
        "pending errors",
        "multicast routers",
    )
    shown_by: Sequence[str] = (
        "programs/datagrams.py",
        "resources/test_raw_sockets.py",
        "resources/test_socket_options.py",
    )

    def matches(self, view: FdView) -> bool:
        """A raw or ping socket of either family."""
        who = view.identity
        return who is not None and _is_raw_or_ping(who)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Nothing unread, no error, no router, and somebody like ourselves may make it."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            yield from sockets.check_error(view)
            netns = sockets.network(sock, scope)
            if netns is None:
                return
            who = sockets.identity_of(view)
            yield from multicast.check(view, sock, netns, scope)
            yield from datagrams.refuse_unread(view, sock, scope)
            if who.type == socket.SOCK_RAW:
                yield from _check_raw(view, who, netns, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> DatagramState:
        """Options, addresses, groups."""
        with view.as_socket() as sock:
            common = sockets.capture(view, sock, scope)
            address = inet_address.local(sock, common.family)
            # The port of a raw socket is its protocol, whether it is bound or not.
            bound = address.is_set if is_ping(common.identity) else any(address.host)
            return DatagramState(
                socket=common,
                local=address if bound else None,
                peer=inet_peer.remote(view, sock, common.identity, common.netns, scope),
                groups=multicast.capture(sock, common.netns, scope),
                shut=halves.of(view.local),
            )

    def create(self, file: OpenFile, record: DatagramState, scope: CreateScope) -> LocalFd:
        """A socket with its options, bound and connected as it was.

        Raises:
            RebuildError: the socket, an option, an address or a group is not to be had here.
        """
        subject, common = f"open file {file.index} (raw)", record.socket
        if not _is_raw_or_ping(common.identity):
            raise RebuildError(f"{subject}: is no socket of this kind")
        with _make(common, scope, subject) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            datagram_state.place(sock, record, subject)
            return sockets.take(sock)


def _check_raw(view: FdView, who: Identity, netns: Index, scope: CaptureScope) -> Iterator[Blocker]:
    try:
        scope.in_network(netns, lambda: socket.socket(who.family, who.type, who.protocol)).close()
    except PermissionError:
        yield Blocker(
            view.subject,
            "a raw socket can be made only by who has CAP_NET_RAW in its network",
            "run the pipeline as root",
        )
    path = _ROUTER.get(who.protocol)
    if path is None:
        return

    def look() -> bytes:
        try:
            return read_file(path)
        except FileNotFoundError:
            return b"0"

    if scope.look_in_network(netns, look).strip() != b"0":
        yield Blocker(
            view.subject,
            "a multicast router runs in its network, whose tables are bound to one of such sockets",
            "end the router",
        )


def _make(common: SocketState, scope: CreateScope, subject: str) -> socket.socket:
    try:
        return sockets.make_socket(common, scope)
    except PermissionError as error:
        if not is_ping(common.identity):
            raise RebuildError(
                f"{subject}: a raw socket cannot be made here: {error.strerror}; restore as root"
            ) from error
    gid = scope.group(common.gid)
    try:
        return acting_as(lambda: sockets.make_socket(common, scope), euid=UNCHANGED, egid=gid)
    except PermissionError as error:
        raise RebuildError(
            f"{subject}: a ping socket cannot be made here: neither our group nor group {gid} is within "
            "net.ipv4.ping_group_range"
        ) from error


KIND = Raw()
