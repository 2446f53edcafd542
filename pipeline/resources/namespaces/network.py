"""Network namespaces: devices, addresses, routes, rules, neighbours and sysctls of a tree's own networks.

Carried: devices of the kinds in `pipeline.resources.namespaces.links`, with name, index, MAC, MTU, queue length,
alias, group and master; both ends of a veth pair in the tree, in one network or two, or one of them
(`pipeline.resources.namespaces.outside_links`). Addresses, permanent neighbours, routes and rules are kept as the
kernel's own messages and given back as such: the indexes in them are the same. Sysctls that differ from those of
a fresh namespace. nftables rules (`pipeline.resources.namespaces.nftables`).

Refused by name: other kinds of devices, iptables rules, queueing disciplines that were set, next-hop objects,
VLAN filtering of a bridge.
Not kept: statistics, learned neighbours, the connection tracking table.

The order: devices of all networks, lower before upper; masters; sysctls; nftables rules; up; addresses,
neighbours, routes (those without a gateway first), rules.

`pipeline.resources.namespaces.network_view` looks at them.

Sources: network_namespaces(7), rtnetlink(7), veth(4), ip-sysctl in the kernel's documentation.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Annotated

from msgspec import Meta

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Record, Small
from pipeline.kernel import rtnetlink
from pipeline.kernel.rtnetlink import IFLA, RTM, Netlink, attribute, attributes
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import nftables
from pipeline.resources.namespaces.links import (
    GOING_S,
    SETTABLE_FLAGS,
    Link,
    Making,
    Outside,
    head,
    port_of,
    step,
)
from pipeline.resources.namespaces.links_view import route_in
from pipeline.resources.namespaces.tun import Number
from pipeline.resources.support import Support
from pipeline.userns.visit import Way, read_file, visit

SUPPORT = Support(
    "net",
    carried=(
        "lo, dummy, bridge, veth, macvlan, macvtap, vxlan, tun and tap devices with names, indexes and MACs",
        "veth, macvlan and macvtap devices that hang on one outside: at the destination on the one that is said there",
        "addresses, routes, rules, permanent neighbours, sysctls, nftables rules",
        "sockets in the network that they were made in",
    ),
    refused=(
        "devices of other kinds",
        "iptables rules, queueing disciplines that were set, next-hop objects, VLAN filtering",
    ),
    shown_by=(
        "programs/networks.py",
        "resources/test_namespaces_outside_links.py",
    ),
)

SYSCTLS = "/proc/sys/net"
#: the sysctl whose numbers are gids in the user namespace that owns the network
PING_GROUPS = "ipv4/ping_group_range"
FRA_UID_RANGE = 20

Raw = Annotated[list[Small], Meta(max_length=1 << 16)]


class NetState(Record, frozen=True, kw_only=True):
    """A network. Messages are payloads of RTM_NEW*; `sysctls` by their path below /proc/sys/net.

    `forwarding`: what bridges and vxlan devices were told of MACs. `ruleset`: of nftables, as nft prints it.
    """

    links: Annotated[list[Link], Meta(max_length=4096)] = []
    addresses: Raw = []
    neighbours: Raw = []
    forwarding: Raw = []
    routes: Raw = []
    rules: Raw = []
    sysctls: Annotated[dict[str, Small], Meta(max_length=1 << 16)] = {}
    ruleset: Annotated[bytes, Meta(max_length=1 << 24)] = b""


def create(
    states: Mapping[int, NetState],
    opened: Callable[[int], LocalFd],
    way_into: Callable[[int], AbstractContextManager[Way]],
    outside: Outside,
    number: Number,
) -> None:
    """Furnish the networks of the tree, which exist and are empty.

    Args:
        states: by `Namespace` index.
        opened: opens one of them; the caller owns the result.
        way_into: what a visitor joins to be in one with the ids of its owner.
        outside: makes what hangs on devices outside of the tree.
        number: what an id is called here.

    Raises:
        RebuildError: the kernel refuses a step; says which.
    """
    with ExitStack() as stack:
        fds: dict[int, LocalFd] = {}
        routes: dict[int, Netlink] = {}
        for index in states:
            fds[index] = opened(index)
            stack.callback(os.close, fds[index])
            routes[index] = stack.enter_context(route_in(fds[index]))
        Making(
            {index: state.links for index, state in states.items()}, fds, routes, outside, number
        ).make_all()
        for index, state in states.items():
            _furnish(index, state, fds[index], routes[index])
            if PING_GROUPS in state.sysctls:
                with step(index, f"/proc/sys/net/{PING_GROUPS}"), way_into(index) as way:
                    visit(way, partial(_set_ping_groups_here, state.sysctls[PING_GROUPS]))
            with step(index, "a rule"):
                if any(FRA_UID_RANGE in attributes(rule[12:]) for rule in state.rules):
                    with way_into(index) as way:
                        visit(way, partial(_add_rules_here, state))
                else:
                    _add_rules(state, routes[index])


def _furnish(index: int, state: NetState, fd: LocalFd, route: Netlink) -> None:
    for link in state.links:
        extra = attribute(IFLA.MASTER, link.master) if link.master else b""
        extra += attribute(IFLA.IFALIAS, link.alias) if link.alias else b""
        extra += attribute(IFLA.MTU, link.mtu) if link.kind == "lo" else b""
        if extra:
            with step(index, f"device {os.fsdecode(link.name)}"):
                route.do(RTM.SETLINK, head(link) + extra)
    for link in state.links:
        if link.port:
            with step(index, f"port {os.fsdecode(link.name)} of a bridge"):
                route.do(RTM.NEWLINK, head(link) + port_of(link))
    with step(index, "sysctls"):
        visit([(fd, CLONE.NEWNET)], lambda: _set_sysctls(state))
    if state.ruleset:
        complaint = nftables.create(state.ruleset, [(fd, CLONE.NEWNET)])
        if complaint:
            raise RebuildError(f"network namespace {index}: nftables rules cannot be loaded: {complaint}")
    for link in state.links:
        with step(index, f"flags of {os.fsdecode(link.name)}"):
            _set_flags(link, route)
    for what, message, contents, flags in (
        ("an address", RTM.NEWADDR, state.addresses, rtnetlink.CREATE | rtnetlink.REPLACE),
        ("a neighbour", RTM.NEWNEIGH, state.neighbours, rtnetlink.CREATE | rtnetlink.REPLACE),
        ("a forwarding entry", RTM.NEWNEIGH, state.forwarding, rtnetlink.CREATE | rtnetlink.APPEND),
        ("a route", RTM.NEWROUTE, state.routes, rtnetlink.CREATE | rtnetlink.REPLACE),
    ):
        for content in contents:
            with step(index, what):
                route.do(message, content, flags)


def _add_rules(state: NetState, route: Netlink) -> None:
    for rule in state.rules:
        route.do(RTM.NEWRULE, rule, rtnetlink.CREATE | rtnetlink.EXCLUSIVE)


def _add_rules_here(state: NetState) -> bytes:
    """Uids of rules are taken only from the user namespace that owns the network, and as it knows them."""
    with Netlink(rtnetlink.socket_of()) as route:
        _add_rules(state, route)
    return b""


def _set_flags(link: Link, route: Netlink) -> None:
    deadline = time.monotonic() + GOING_S
    while True:
        try:
            route.do(RTM.SETLINK, head(link, link.flags & SETTABLE_FLAGS, SETTABLE_FLAGS))
        except OSError as error:
            # the tree was dumped here a moment ago, and its own device with this MAC still lies on the same one
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _set_sysctls(state: NetState) -> bytes:
    for name, value in state.sysctls.items():
        if name == PING_GROUPS:
            continue
        path = os.path.join(SYSCTLS, name)
        try:
            if os.path.normpath(path) != path or not path.startswith(SYSCTLS + "/"):
                raise OSError(errno.EINVAL, name)  # an image of ours has no such name
            if read_file(path).strip() != value:
                set_sysctl(name, value)
        except OSError as error:
            code = error.errno or 0
            raise OSError(code, f"/proc/sys/net/{name} to {value!r}: {os.strerror(code)}") from error
    return b""


def _set_ping_groups_here(value: bytes) -> bytes:
    set_sysctl(PING_GROUPS, value)
    return b""


def set_sysctl(name: str, value: bytes) -> None:
    """Set a sysctl of the network namespace of the caller; OSError: it is not taken."""
    fd = os.open(os.path.join(SYSCTLS, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
