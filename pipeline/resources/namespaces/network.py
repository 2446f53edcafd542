"""Network namespaces: devices, addresses, routes, rules, neighbours and sysctls of a tree's own networks.

Carried: lo; dummy, bridge and veth devices with name, index, MAC, MTU, queue length, alias, group and
master; both ends of a veth pair in the tree, in one network or two. Addresses, permanent
neighbours, routes and rules are kept as the kernel's own messages and given back as such: the indexes in
them are the same. Sysctls that differ from those of a fresh namespace. nftables rules
(`pipeline.resources.namespaces.nftables`).

Refused by name: other kinds of devices, a veth whose other end is outside the tree, iptables rules,
queueing disciplines that were set, next-hop objects, rules for ids, VLAN filtering of a bridge.
Not kept: statistics, learned neighbours, the connection tracking table.

The order: devices of all networks, lower before upper; masters; sysctls; nftables rules; up; addresses,
neighbours, routes (those without a gateway first), rules.

`pipeline.resources.namespaces.network_view` looks at them.

Sources: network_namespaces(7), rtnetlink(7), veth(4), ip-sysctl in the kernel's documentation.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import I32, U16, U32, Index, Record, Small
from pipeline.kernel import rtnetlink
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attribute
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import nftables
from pipeline.resources.namespaces.support import Support
from pipeline.userns.visit import fetch, read_file, visit

SUPPORT = Support(
    "net",
    carried=(
        "lo, dummy, bridge and veth devices with names, indexes and addresses",
        "addresses, routes, rules, permanent neighbours, sysctls, nftables rules",
        "sockets in the network that they were made in",
    ),
    refused=(
        "devices of other kinds, a veth to the outside",
        "iptables rules, queueing disciplines that were set, next-hop objects, rules for ranges of uids, VLAN filtering",
    ),
)

_VETH_PEER = 1
#: IFF_UP, NOARP, PROMISC, ALLMULTI, MULTICAST: what can be set
_SETTABLE_FLAGS = 0x1 | 0x80 | 0x100 | 0x200 | 0x1000
SYSCTLS = "/proc/sys/net"

Raw = Annotated[list[Small], Meta(max_length=1 << 16)]


class Link(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A device. `flags`: IFF_*. `peer`: of a veth, (`Namespace` index, device index) of its other end."""

    index: Annotated[int, Meta(ge=1, le=0x7FFF_FFFF)]
    name: Annotated[bytes, Meta(max_length=15)]
    kind: Annotated[str, Meta(max_length=15)]
    flags: U32
    mtu: U32
    txqlen: U32
    address: Annotated[bytes, Meta(max_length=32)]
    master: U32 = 0
    group: U32 = 0
    alias: Annotated[bytes, Meta(max_length=256)] = b""
    data: Annotated[list[tuple[U16, Small]], Meta(max_length=64)] = []
    peer: tuple[Index, I32] | None = None


class NetState(Record, frozen=True, kw_only=True):
    """A network. Messages are payloads of RTM_NEW*; `sysctls` by their path below /proc/sys/net.

    `ruleset`: of nftables, as nft prints it.
    """

    links: Annotated[list[Link], Meta(max_length=4096)] = []
    addresses: Raw = []
    neighbours: Raw = []
    routes: Raw = []
    rules: Raw = []
    sysctls: Annotated[dict[str, Small], Meta(max_length=1 << 16)] = {}
    ruleset: Annotated[bytes, Meta(max_length=1 << 24)] = b""


def create(states: Mapping[int, NetState], opened: Callable[[int], LocalFd]) -> None:
    """Furnish the networks of the tree, which exist and are empty.

    Args:
        states: by `Namespace` index.
        opened: opens one of them; the caller owns the result.

    Raises:
        RebuildError: the kernel refuses a step; says which.
    """
    with ExitStack() as stack:
        fds: dict[int, LocalFd] = {}
        routes: dict[int, Netlink] = {}
        for index in states:
            fds[index] = opened(index)
            stack.callback(os.close, fds[index])
            made = fetch([(fds[index], CLONE.NEWNET)], _detached)
            routes[index] = stack.enter_context(Netlink(socket.socket(fileno=made)))
        there: set[tuple[int, int]] = set()
        for index, state in states.items():
            for link in state.links:
                if link.kind != "lo" and (index, link.index) not in there:
                    with _step(index, f"device {os.fsdecode(link.name)}"):
                        _make(index, link, states, fds, routes)
                    there |= {(index, link.index)} | ({link.peer} if link.peer is not None else set())
        for index, state in states.items():
            _furnish(index, state, fds[index], routes[index])


def _detached() -> int:
    return rtnetlink.socket_of().detach()


@contextmanager
def _step(index: int, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RebuildError(f"network namespace {index}: {what}: {error.strerror}") from error


def _described(link: Link) -> bytes:
    """The attributes that a device is made with."""
    found = (
        attribute(IFLA.IFNAME, link.name + b"\0")
        + attribute(IFLA.MTU, link.mtu)
        + attribute(IFLA.TXQLEN, link.txqlen)
    )
    if link.address:
        found += attribute(IFLA.ADDRESS, link.address)
    return found + (attribute(IFLA.GROUP, link.group) if link.group else b"")


def _head(link: Link, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("<BxHiII", 0, 0, link.index, flags, change)


def _make(
    index: int,
    link: Link,
    states: Mapping[int, NetState],
    fds: Mapping[int, int],
    routes: Mapping[int, Netlink],
) -> None:
    info = attribute(IFLA_INFO.KIND, link.kind.encode() + b"\0")
    if link.kind == "bridge":
        info += attribute(IFLA_INFO.DATA, b"".join(attribute(kind, value) for kind, value in link.data))
    elif link.kind == "veth":
        other = _other_end(link, states)
        assert link.peer is not None
        peer = _head(other) + _described(other) + attribute(IFLA.NET_NS_FD, fds[link.peer[0]])
        info += attribute(IFLA_INFO.DATA, attribute(_VETH_PEER, peer))
    routes[index].do(
        RTM.NEWLINK,
        _head(link) + _described(link) + attribute(IFLA.LINKINFO, info),
        rtnetlink.CREATE | rtnetlink.EXCLUSIVE,
    )


def _other_end(link: Link, states: Mapping[int, NetState]) -> Link:
    where = link.peer or (-1, 0)
    for other in states[where[0]].links if where[0] in states else ():
        if other.index == where[1] and other.kind == "veth":
            return other
    raise RebuildError(f"device {link.name!r} has no other end in the image")


def _furnish(index: int, state: NetState, fd: LocalFd, route: Netlink) -> None:
    for link in state.links:
        extra = attribute(IFLA.MASTER, link.master) if link.master else b""
        extra += attribute(IFLA.IFALIAS, link.alias) if link.alias else b""
        extra += attribute(IFLA.MTU, link.mtu) if link.kind == "lo" else b""
        if extra:
            with _step(index, f"device {os.fsdecode(link.name)}"):
                route.do(RTM.SETLINK, _head(link) + extra)
    with _step(index, "sysctls"):
        visit([(fd, CLONE.NEWNET)], lambda: _set_sysctls(state))
    if state.ruleset:
        complaint = nftables.create(state.ruleset, [(fd, CLONE.NEWNET)])
        if complaint:
            raise RebuildError(f"network namespace {index}: nftables rules cannot be loaded: {complaint}")
    for link in state.links:
        with _step(index, f"flags of {os.fsdecode(link.name)}"):
            route.do(RTM.SETLINK, _head(link, link.flags & _SETTABLE_FLAGS, _SETTABLE_FLAGS))
    for what, message, contents, flags in (
        ("an address", RTM.NEWADDR, state.addresses, rtnetlink.CREATE | rtnetlink.REPLACE),
        ("a neighbour", RTM.NEWNEIGH, state.neighbours, rtnetlink.CREATE | rtnetlink.REPLACE),
        ("a route", RTM.NEWROUTE, state.routes, rtnetlink.CREATE | rtnetlink.REPLACE),
        ("a rule", RTM.NEWRULE, state.rules, rtnetlink.CREATE | rtnetlink.EXCLUSIVE),
    ):
        for content in contents:
            with _step(index, what):
                route.do(message, content, flags)


def _set_sysctls(state: NetState) -> bytes:
    for name, value in state.sysctls.items():
        path = os.path.join(SYSCTLS, name)
        try:
            if os.path.normpath(path) != path:
                raise OSError(errno.EINVAL, name)  # an image of ours has no such name
            if read_file(path).strip() != value:
                set_sysctl(name, value)
        except OSError as error:
            code = error.errno or 0
            raise OSError(code, f"/proc/sys/net/{name} to {value!r}: {os.strerror(code)}") from error
    return b""


def set_sysctl(name: str, value: bytes) -> None:
    """Set a sysctl of the network namespace of the caller; OSError: it is not taken."""
    fd = os.open(os.path.join(SYSCTLS, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
