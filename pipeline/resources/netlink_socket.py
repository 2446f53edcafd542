"""Netlink sockets that hold no conversation: route, uevent, sock_diag, generic, xfrm.

Kept: port id, group memberships, default peer, options, owner. Refused: protocols whose
sockets hold state in the kernel that cannot be read back (netfilter queues, audit,
connector), answers or events not read yet, and generic netlink groups, whose
numbers differ from boot to boot.

A port id is often the pid of the process that bound it, but only a name inside the
network namespace; it is kept, as the program knows it.

Source: netlink(7); net/netlink/af_netlink.c.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, OpenFile, Record
from pipeline.resources import socket_options, sockets
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_options import SOL_NETLINK
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated

_ADD_MEMBERSHIP = 1
_LIST_MEMBERSHIPS = 9
#: room for 1024 groups; no protocol has more than a few dozen
_GROUPS_BYTES = 128
_GENERIC = 16
#: protocol number -> name (include/uapi/linux/netlink.h)
_CARRIED = {0: "route", 4: "sock_diag", 6: "xfrm", 15: "kobject_uevent", _GENERIC: "generic"}
_REFUSED = {
    2: "usersock", 5: "nflog", 7: "selinux", 8: "iscsi", 9: "audit", 10: "fib_lookup", 11: "connector",
    12: "netfilter", 18: "scsitransport", 19: "ecryptfs", 20: "rdma", 21: "crypto", 22: "smc",
}  # fmt: skip


class NetlinkState(Record, frozen=True, kw_only=True):
    """`port`: 0 if not bound. `peer`: default destination (port id, group mask), (0, 0) if there is none."""

    socket: SocketState
    port: U32 = 0
    groups: Annotated[list[Annotated[int, Meta(ge=1, le=1024)]], Meta(max_length=1024)] = []
    peer: tuple[U32, U32] = (0, 0)


def _groups(sock: socket.socket) -> list[int]:
    """Numbers of the groups that `sock` has joined, from 1."""
    mask = int.from_bytes(sock.getsockopt(SOL_NETLINK, _LIST_MEMBERSHIPS, _GROUPS_BYTES), "little")
    return [bit + 1 for bit in range(mask.bit_length()) if mask >> bit & 1]


class Netlink(CompleteOnceCreated):
    """See the module."""

    name = "netlink"
    record: type[NetlinkState] = NetlinkState
    carried: Sequence[str] = ("idle netlink sockets of route, uevent, sock_diag, generic and xfrm",)
    refused: Sequence[str] = ("netlink sockets with unread messages", "netfilter, audit and other protocols")
    shown_by: Sequence[str] = ("resources/test_inet_sockets.py",)

    def matches(self, view: FdView) -> bool:
        """A netlink socket."""
        who = sockets.identity_of(view)
        return who is not None and who.family == socket.AF_NETLINK

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """A protocol without hidden state, nothing unread."""
        with sockets.borrowed(view.local) as sock:
            yield from sockets.check(view, sock, scope)
            protocol = sockets.identify(sock).protocol
            if protocol not in _CARRIED:
                name = _REFUSED.get(protocol, f"protocol {protocol}")
                yield Blocker(
                    view.subject,
                    f"a netlink socket of {name} has state in the kernel that is hidden",
                    "close it",
                )
                return
            if protocol == _GENERIC and _groups(sock):
                yield Blocker(
                    view.subject, "generic netlink groups have other numbers on each boot", "leave the groups"
                )
            if sockets.events(view.local, select.POLLIN) & (select.POLLIN | select.POLLERR):
                yield Blocker(
                    view.subject, "netlink messages or errors wait to be read", "wait", transient=True
                )

    def capture(self, view: FdView, scope: CaptureScope) -> NetlinkState:
        """Port, groups, options."""
        with sockets.borrowed(view.local) as sock:
            return NetlinkState(
                socket=sockets.capture(view, sock, scope),
                port=sock.getsockname()[0],
                groups=_groups(sock),
                peer=sock.getpeername(),
            )

    def create(self, file: OpenFile, record: NetlinkState, scope: CreateScope) -> LocalFd:
        """A socket with its options, port and groups.

        Raises:
            RebuildError: the port id is taken in this network namespace, or a group is not allowed here.
        """
        subject, common = f"open file {file.index} (netlink)", record.socket
        with sockets.make_socket(common, scope) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            try:
                if record.port:
                    sock.bind((record.port, 0))
                for group in record.groups:
                    sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
                if record.peer != (0, 0):
                    sock.connect(record.peer)
            except OSError as error:
                raise RebuildError(
                    f"{subject}: port {record.port}, groups {record.groups}: {error.strerror}"
                ) from error
            return sockets.take(sock)


KIND = Netlink()
