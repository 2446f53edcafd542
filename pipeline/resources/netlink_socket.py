"""Netlink sockets that hold no conversation: protocol, port id, groups, default peer, options, filter, owner.

Groups of generic netlink are kept by family and name: a kernel gives them numbers as they register. The families
have such numbers, too, and a program knows those it has asked for; so a rebuild where one has another number
is refused. Refused by a dump: answers, events or errors not read yet (messages of the kernel cannot be sent
by anybody else); sockets that something in the kernel hangs on: a queue or log of netfilter, a table of
nftables, the audit daemon's; protocols whose sockets hold what cannot be read (connector, iSCSI, SCSI, RDMA, ...).

A port id is often the pid of the process that bound it, but only a name inside the
network namespace; it is kept, as the program knows it.

Source: netlink(7); net/netlink/af_netlink.c, net/netlink/genetlink.c, net/netfilter/nfnetlink_queue.c,
net/netfilter/nf_tables_api.c (nft_rcv_nl_event), kernel/audit.c.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U16, U32, Index, OpenFile, Record
from pipeline.kernel import genetlink
from pipeline.kernel.genetlink import Family
from pipeline.kernel.rtnetlink import Netlink as Link
from pipeline.kernel.rtnetlink import attributes, socket_of
from pipeline.resources import socket_options, sockets
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_options import SOL_NETLINK
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.userns.visit import read_file

_ADD_MEMBERSHIP = 1
_LIST_MEMBERSHIPS = 9
#: room for 1024 groups; no protocol has more than a few dozen
_GROUPS_BYTES = 128
_AUDIT, _NETFILTER, _GENERIC = 9, 12, 16
#: protocol number -> name (include/uapi/linux/netlink.h)
_CARRIED = {
    0: "route", 2: "usersock", 4: "sock_diag", 6: "xfrm", 7: "selinux", _AUDIT: "audit", 10: "fib_lookup",
    _NETFILTER: "netfilter", 15: "kobject_uevent", _GENERIC: "generic", 21: "crypto",
}  # fmt: skip
_REFUSED = {
    5: "nflog", 8: "iscsi", 11: "connector", 18: "scsitransport", 19: "ecryptfs", 20: "rdma", 22: "smc",
}  # fmt: skip
_BINDINGS = ("nfnetlink_queue", "nfnetlink_log")
#: NFT_MSG_GETTABLE, and the attribute that names the port of the socket whose end is the table's
_GET_TABLE, _TABLE_NAME, _TABLE_OWNER = 10 << 8 | 1, 1, 7
_AUDIT_GET, _AUDIT_PID_OFFSET = 1000, 12

Name = Annotated[str, Meta(max_length=64)]


class NetlinkState(Record, frozen=True, kw_only=True):
    """`port`: 0 if not bound. `peer`: default destination (port id, group mask), (0, 0) if there is none.

    Of generic netlink: `named`: groups as (family, group); `families`: number of each family.
    """

    socket: SocketState
    port: U32 = 0
    groups: Annotated[list[Annotated[int, Meta(ge=1, le=1024)]], Meta(max_length=1024)] = []
    named: Annotated[list[tuple[Name, Name]], Meta(max_length=1024)] = []
    families: Annotated[dict[Name, U16], Meta(max_length=1024)] = {}
    peer: tuple[U32, U32] = (0, 0)


def _groups(sock: socket.socket) -> list[int]:
    """Numbers of the groups that `sock` has joined, from 1."""
    mask = int.from_bytes(sock.getsockopt(SOL_NETLINK, _LIST_MEMBERSHIPS, _GROUPS_BYTES), "little")
    return [bit + 1 for bit in range(mask.bit_length()) if mask >> bit & 1]


class Netlink(CompleteOnceCreated):
    """See the module."""

    name = "netlink"
    record: type[NetlinkState] = NetlinkState
    carried: Sequence[str] = (
        "idle netlink sockets of route, uevent, sock_diag, generic, netfilter, xfrm, audit, usersock, selinux, crypto",
        "groups, those of generic netlink by name",
    )
    refused: Sequence[str] = (
        "netlink sockets with unread messages",
        "those of netfilter queues and logs, of owned nftables and of the audit daemon",
        "connector, iSCSI, SCSI, RDMA and other protocols",
    )
    shown_by: Sequence[str] = ("programs/datagrams.py", "resources/test_netlink_sockets.py")

    def matches(self, view: FdView) -> bool:
        """A netlink socket."""
        who = view.identity
        return who is not None and who.family == socket.AF_NETLINK

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """A protocol without hidden state, nothing unread."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            protocol = sockets.identity_of(view).protocol
            if protocol not in _CARRIED:
                name = _REFUSED.get(protocol, f"protocol {protocol}")
                yield Blocker(
                    view.subject,
                    f"a netlink socket of {name} has state in the kernel that is hidden",
                    "close it",
                )
                return
            if sockets.events(view.local, select.POLLIN) & (select.POLLIN | select.POLLERR):
                yield Blocker(
                    view.subject, "netlink messages or errors wait to be read", "wait", transient=True
                )
            netns = sockets.network(sock, scope)
            if netns is None:
                return
            port = sock.getsockname()[0]
            if protocol == _NETFILTER and port:
                yield from _check_netfilter(view, port, netns, scope)
            if protocol == _AUDIT:
                yield from _check_audit(view, netns, scope)
            if protocol == _GENERIC:
                known = {n for family in _families(netns, scope).values() for n in family.groups.values()}
                for group in sorted(set(_groups(sock)) - known):
                    yield Blocker(view.subject, f"group {group} of generic netlink has no name", "leave it")

    def capture(self, view: FdView, scope: CaptureScope) -> NetlinkState:
        """Port, groups, options."""
        with view.as_socket() as sock:
            common = sockets.capture(view, sock, scope)
            groups = _groups(sock)
            families: dict[str, Family] = {}
            if common.protocol == _GENERIC:
                families = _families(common.netns, scope)
            named = [
                (family, group)
                for family, told in families.items()
                for group, number in told.groups.items()
                if number in groups
            ]
            return NetlinkState(
                socket=common,
                port=sock.getsockname()[0],
                groups=[] if families else groups,
                named=named,
                families={name: family.number for name, family in families.items()},
                peer=sock.getpeername(),
            )

    def create(self, file: OpenFile, record: NetlinkState, scope: CreateScope) -> LocalFd:
        """A socket with its options, port and groups.

        Raises:
            RebuildError: the port id is taken in this network namespace, or a group is not allowed here.
        """
        subject, common = f"open file {file.index} (netlink)", record.socket
        if common.family != socket.AF_NETLINK:
            raise RebuildError(f"{subject}: is no socket of this kind")
        groups = [*record.groups, *_numbers(record, subject, scope)]
        with sockets.make_socket(common, scope) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            try:
                if record.port:
                    sock.bind((record.port, 0))
                for group in groups:
                    sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
                if record.peer != (0, 0):
                    sock.connect(record.peer)
            except OSError as error:
                raise RebuildError(
                    f"{subject}: port {record.port}, groups {groups}: {error.strerror}"
                ) from error
            return sockets.take(sock)


def _families(netns: Index, scope: CaptureScope) -> dict[str, Family]:
    known: dict[str, Family] | None = scope.peers().get(("generic netlink", netns))
    if known is None:
        known = genetlink.families(lambda make: scope.in_network(netns, make))
        scope.peers()["generic netlink", netns] = known
    return known


def _numbers(record: NetlinkState, subject: str, scope: CreateScope) -> list[int]:
    """What the recorded groups of generic netlink are called here."""
    if not record.families:
        return []
    netns = record.socket.netns
    here = scope.once(
        ("generic netlink", netns),
        lambda: genetlink.families(lambda make: scope.in_network(netns, make)),
    )
    for name, number in record.families.items():
        if name in here and here[name].number != number:
            raise RebuildError(
                f"{subject}: generic netlink family {name} has number {here[name].number} in this kernel, and the "
                f"program may know it by {number}: load the modules that have families in the same order"
            )
    found = []
    for family, group in record.named:
        if family not in here or group not in here[family].groups:
            raise RebuildError(
                f"{subject}: this kernel has no group {group} of generic netlink family {family} (load its module)"
            )
        found.append(here[family].groups[group])
    return found


def _check_netfilter(view: FdView, port: int, netns: Index, scope: CaptureScope) -> Iterator[Blocker]:
    """Whether something hangs on a socket of netfilter with this port."""

    def look() -> bytes:
        texts = []
        for name in _BINDINGS:
            try:
                texts.append(read_file(f"/proc/thread-self/net/netfilter/{name}"))
            except FileNotFoundError:
                texts.append(b"")
        return b"\0".join(texts)

    for name, text in zip(_BINDINGS, scope.look_in_network(netns, look).split(b"\0"), strict=True):
        for words in map(bytes.split, text.splitlines()):
            if len(words) > 1 and int(words[1]) == port:
                yield Blocker(view.subject, f"reads {name} {int(words[0])}", "unbind it")
    try:
        with Link(scope.in_network(netns, lambda: socket_of(_NETFILTER))) as link:
            tables = [attributes(message[4:]) for message in link.dump(_GET_TABLE, bytes(4))]
    except PermissionError:
        return  # who may not ask may not own one either
    for table in tables:
        if int.from_bytes(table.get(_TABLE_OWNER, b""), "big") == port:
            name = table[_TABLE_NAME].rstrip(b"\0").decode(errors="replace")
            yield Blocker(view.subject, f"owns table {name} of nftables, which ends with it", "close it")


def _check_audit(view: FdView, netns: Index, scope: CaptureScope) -> Iterator[Blocker]:
    """Whether it may be the audit daemon's: the kernel says which process that is, not which socket."""
    try:
        with Link(scope.in_network(netns, lambda: socket_of(_AUDIT))) as link:
            status = link.ask(_AUDIT_GET, b"")
    except (PermissionError, ConnectionRefusedError):
        return  # who may not ask, being in a container or no root, rules over nobody who may become it
    (pid,) = struct.unpack_from("<I", status, _AUDIT_PID_OFFSET)
    if pid and scope.member(pid):
        yield Blocker(view.subject, f"pid {pid} is the audit daemon", "end it")


KIND = Netlink()
