"""Sockets of every family and protocol that no other kind carries: always refused, by name, with what could be done.

The state of SCTP associations, MPTCP subflows, vsock, Bluetooth and XDP sockets is in the kernel, or in a device, and
there is no call that gives it or takes it. A program that asks for MPTCP can mostly do without.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.resources import sockets
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.refusing import AlwaysRefused
from pipeline.resources.socket_identity import Identity

_MPTCP = 262
_PROTOCOLS = {33: "DCCP", 132: "SCTP", _MPTCP: "MPTCP"}
_REMEDY_MPTCP = (
    "start the program without MPTCP: not by mptcpize, a Go program with GODEBUG=multipathtcp=0, or by its own "
    "option; it can be forbidden by sysctl net.mptcp.enabled=0 before the program starts"
)
#: families that Python may not know the names of
_FAMILIES = {
    21: "RDS", 29: "CAN", 30: "TIPC", 31: "Bluetooth", 38: "the kernel's cryptography (AF_ALG)", 39: "NFC", 40: "vsock",
    41: "KCM", 42: "QIPCRTR", 43: "SMC", 44: "XDP",
}  # fmt: skip


class OtherSocket(AlwaysRefused):
    """See the module."""

    name = "other-socket"
    refused: Sequence[str] = ("SCTP, MPTCP, vsock, Bluetooth, XDP and other sockets",)
    shown_by: Sequence[str] = ("resources/test_inet_sockets.py",)

    def matches(self, view: FdView) -> bool:
        """Every socket: stands behind the kinds that carry some."""
        return view.is_socket

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Always one blocker."""
        who = sockets.identity_of(view)
        remedy = _REMEDY_MPTCP if who.protocol == _MPTCP else "close it"
        yield Blocker(view.subject, f"{_name(who)} are not carried", remedy)


def _name(who: Identity) -> str:
    if who.family in (socket.AF_INET, socket.AF_INET6):
        return f"{_PROTOCOLS.get(who.protocol, f'IP protocol {who.protocol}')} sockets"
    if who.family in _FAMILIES:
        return f"sockets of {_FAMILIES[who.family]}"
    try:
        return f"sockets of family {socket.AddressFamily(who.family).name}"
    except ValueError:
        return f"sockets of family {who.family}"


KIND = OtherSocket()
