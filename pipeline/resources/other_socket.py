"""Sockets of every family and protocol that no other kind carries: always refused, by name."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile, Record
from pipeline.resources import sockets
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_options import Identity
from pipeline.resources.steps import CompleteOnceCreated

_PROTOCOLS = {33: "DCCP", 132: "SCTP", 136: "UDP-Lite", 262: "MPTCP"}
_PING = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)


class NoState(Record, frozen=True):
    """There is never one."""


class OtherSocket(CompleteOnceCreated):
    """See the module."""

    name = "other-socket"
    record: type[NoState] = NoState
    carried: Sequence[str] = ()
    refused: Sequence[str] = ("raw, ping, packet, SCTP, MPTCP, vsock, Bluetooth, XDP and other sockets",)
    shown_by: Sequence[str] = ("resources/test_inet_sockets.py",)

    def matches(self, view: FdView) -> bool:
        """Every socket: stands behind the kinds that carry some."""
        return sockets.is_socket(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Always one blocker."""
        with sockets.borrowed(view.local) as sock:
            who = sockets.identify(sock)
        yield Blocker(view.subject, f"{_name(who)} are not carried", "close it")

    def capture(self, view: FdView, scope: CaptureScope) -> NoState:
        """Never reached: `check` refuses.

        Raises:
            NotImplementedError: it was reached.
        """
        raise NotImplementedError(f"{view.subject} was not refused")

    def create(self, file: OpenFile, record: NoState, scope: CreateScope) -> LocalFd:
        """Never reached with an image of ours.

        Raises:
            RebuildError: the image holds such a file.
        """
        raise RebuildError(f"open file {file.index} is a socket of a kind that cannot be made")


def _name(who: Identity) -> str:
    if who.family in (socket.AF_INET, socket.AF_INET6):
        if who.type == socket.SOCK_RAW:
            return f"raw sockets (IP protocol {who.protocol})"
        if who.type == socket.SOCK_DGRAM and who.protocol in _PING:
            return "ping sockets"
        return f"{_PROTOCOLS.get(who.protocol, f'IP protocol {who.protocol}')} sockets"
    if who.family == socket.AF_PACKET:
        return "packet sockets"
    try:
        return f"sockets of family {socket.AddressFamily(who.family).name}"
    except ValueError:
        return f"sockets of family {who.family}"


KIND = OtherSocket()
