"""Devices of the tree's networks: what is kept of each, and making them again.

A device is made with its name, index, MAC, MTU, queue length and group, and with the attributes of its
kind that `DATA` lists; masters, aliases and flags come when all devices are there. A device may hang on another:
the two ends of a veth pair are made in one step, and a device that lies on another one (macvlan) is made when
that is there, by a netlink socket of the other's network. The other may be outside of the tree
(`pipeline.resources.namespaces.outside_links`).

Sources: rtnetlink(7), veth(4); include/uapi/linux/if_link.h, drivers/net/veth.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import I32, U16, U32, Id, Index, Small
from pipeline.kernel import rtnetlink
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attribute
from pipeline.resources.namespaces import tun
from pipeline.userns.forest import IdKind

_VETH_PEER = 1
#: IFF_UP, NOARP, PROMISC, ALLMULTI, MULTICAST: what can be set
SETTABLE_FLAGS = 0x1 | 0x80 | 0x100 | 0x200 | 0x1000

#: by kind, the attributes of IFLA_INFO_DATA that are set again; a kind that is not here is refused
DATA: Mapping[str, frozenset[int]] = {
    "lo": frozenset(),
    "dummy": frozenset(),
    "veth": frozenset(),
    # timers, STP, priority, VLAN protocol, group address, netfilter calls, multicast, IGMP and MLD, switches
    "bridge": frozenset({1, 2, 3, 4, 5, 6, 8, 9, 20, 22, 23, 24, 25, *range(27, 40), 42, 43, 44, 46}),
    # mode, flags, MACs of mode source, length of the broadcast queue, cutoff
    "macvlan": frozenset({1, 2, 5, 7, 9}),
    "macvtap": frozenset({1, 2, 5, 7, 9}),
    # all that there are (to IFLA_VXLAN_MC_ROUTE)
    "vxlan": frozenset(range(1, 35)),
    "tun": tun.KEPT,
}
#: attributes of a port of a bridge that are set again: all but its STP state, and what is only told
PORT_DATA = frozenset({2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 27, 28, 30, 31, 32, 33, 34, 39, 40, 42, 43})
#: how long a network that nobody is in any more may take to go, with its devices
GOING_S = 1.0
#: kinds that lie on another device
LYING = frozenset({"macvlan", "macvtap"})
#: kinds that hang on another device, or whose packets go through another network
HANGING = LYING | {"veth", "vxlan"}
_BRIDGE_SWITCHES = 46
_MACVLAN_MAC_MODE, _MACVLAN_MACS, _MACVLAN_SET_MACS = 3, 5, 3
_VXLAN_LINK = 3
#: taken as set if they are there at all (remote checksum offload, TTL inherited); the last one is then without a value
_VXLAN_SWITCHES, _VXLAN_TTL_INHERIT = frozenset({21, 22, 28}), 28

_UID: IdKind = "uid"
_GID: IdKind = "gid"

#: a device: its network's `Namespace` index, and its own index there
Place = tuple[int, int]


class Link(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A device. `flags`: IFF_*.

    `peer`: the (`Namespace` index, device index) of the other end of a veth, of what a macvlan lies on; of a
    vxlan the network is the one that its packets go through.
    `outside`: that is outside of the tree, and was called so (NAME or NAME@BRIDGE, empty if it could not be seen).
    `uid`, `gid`: who may attach to a tun or tap device. `port`: how it is set as a port of a bridge.
    """

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
    outside: Annotated[bytes, Meta(max_length=64)] | None = None
    uid: Id | None = None
    gid: Id | None = None
    port: Annotated[list[tuple[U16, Small]], Meta(max_length=64)] = []


class Outside(Protocol):
    """Who makes devices that hang on one outside of the tree; see `pipeline.resources.namespaces.outside_links`."""

    def make(self, place: Place, described: bytes, link: Link, network: int, route: Netlink) -> None:
        """Make a device.

        Args:
            place: where in the tree.
            described: its head, and its attributes but IFLA_LINKINFO.
            link: the device.
            network: a descriptor of its network; `route` is a netlink socket in it.
        """


class Making(msgspec.Struct, frozen=True):
    """Makes the devices of all networks of the tree.

    Args:
        links: by `Namespace` index.
        fds: the networks.
        routes: a netlink socket in each.
        outside: makes those that hang on a device outside.
        number: what an id is called here.
    """

    links: Mapping[int, list[Link]]
    fds: Mapping[int, int]
    routes: Mapping[int, Netlink]
    outside: Outside
    number: tun.Number

    def make_all(self) -> None:
        """Make every device but lo, each when what it lies on is there.

        Raises:
            RebuildError: the kernel refuses one, or it hangs on a device that is not in the image.
        """
        there: set[Place] = set()
        waiting = [(index, link) for index, links in self.links.items() for link in links]
        while waiting:
            later = []
            for index, link in waiting:
                below = _below(link)
                if below is not None and below not in there:
                    later.append((index, link))
                    continue
                if link.kind != "lo" and (index, link.index) not in there:
                    with step(index, f"device {os.fsdecode(link.name)}"):
                        self._make(index, link)
                there.add((index, link.index))
                if link.kind == "veth" and link.peer is not None and link.outside is None:
                    there.add(link.peer)
            if len(later) == len(waiting):
                index, link = later[0]
                raise RebuildError(
                    f"network namespace {index}: device {os.fsdecode(link.name)} lies on one that is not in the image"
                )
            waiting = later

    def _make(self, index: int, link: Link) -> None:
        described = head(link) + _described(link)
        if link.outside is not None:
            self.outside.make((index, link.index), described, link, self.fds[index], self.routes[index])
            return
        if link.kind == "tun":
            self._make_tun(index, link)
            return
        if link.kind in LYING:
            if link.peer is None:
                raise RebuildError(f"device {os.fsdecode(link.name)} lies on nothing in the image")
            network, lower = link.peer
            described += lies_on(lower, self.fds[index])
            create(self.routes[network], described, link.kind, data_of(link))
            return
        data = data_of(link)
        if link.kind == "vxlan":
            if link.peer is None or link.peer[0] not in self.routes:
                raise RebuildError(f"device {link.name!r}: the network of its packets is not in the image")
            described += attribute(IFLA.NET_NS_FD, self.fds[index])
            create(self.routes[link.peer[0]], described, link.kind, data)
            return
        if link.kind == "veth":
            other = self._other_end(link)
            assert link.peer is not None
            data = veth_to(
                head(other) + _described(other) + attribute(IFLA.NET_NS_FD, self.fds[link.peer[0]])
            )
        create(self.routes[index], described, link.kind, data)

    def _make_tun(self, index: int, link: Link) -> None:
        numbers = []
        for one, kind in ((link.uid, _UID), (link.gid, _GID)):
            numbers.append(None if one is None else self.number(one, kind))
            if one is not None and numbers[-1] is None:
                raise RebuildError(f"device {os.fsdecode(link.name)}: {kind} {one.id} has no number here")
        tun.make(LocalFd(self.fds[index]), link.name, link.index, dict(link.data), *numbers)
        self.routes[index].do(RTM.SETLINK, head(link) + _described(link))

    def _other_end(self, link: Link) -> Link:
        where = link.peer or (-1, 0)
        for other in self.links.get(where[0], ()):
            if other.index == where[1] and other.kind == "veth":
                return other
        raise RebuildError(f"device {link.name!r} has no other end in the image")


def port_of(link: Link) -> bytes:
    """How a device is set as a port of a bridge, as an attribute of the device."""
    data = b"".join(attribute(kind, value) for kind, value in link.port)
    info = attribute(IFLA_INFO.SLAVE_KIND, b"bridge\0") + attribute(IFLA_INFO.SLAVE_DATA, data)
    return attribute(IFLA.LINKINFO, info)


def _below(link: Link) -> Place | None:
    """What has to be there before a device can be made."""
    if link.outside is not None or link.peer is None:
        return None
    if link.kind == "vxlan":
        lower = int.from_bytes(dict(link.data).get(_VXLAN_LINK, b""), "little")
        return (link.peer[0], lower) if lower else None
    return link.peer if link.kind in LYING else None


def create(route: Netlink, described: bytes, kind: str, data: bytes) -> None:
    """Have a new device made. OSError: what the kernel says."""
    info = attribute(IFLA_INFO.KIND, kind.encode() + b"\0") + (
        attribute(IFLA_INFO.DATA, data) if data else b""
    )
    route.do(RTM.NEWLINK, described + attribute(IFLA.LINKINFO, info), rtnetlink.CREATE | rtnetlink.EXCLUSIVE)


def data_of(link: Link) -> bytes:
    """The attributes of a device's kind, as they are set."""
    data = link.data
    if link.kind == "bridge":  # switches are values and a mask: those that are off may not be known here
        data = [(kind, value[:4] * 2 if kind == _BRIDGE_SWITCHES else value) for kind, value in data]
    if link.kind == "vxlan":
        data = [(kind, value) for kind, value in data if kind not in _VXLAN_SWITCHES or any(value)]
        data = [(kind, b"" if kind == _VXLAN_TTL_INHERIT else value) for kind, value in data]
    found = b"".join(attribute(kind, value) for kind, value in data)
    if link.kind in LYING and any(kind == _MACVLAN_MACS for kind, _ in link.data):
        found += attribute(_MACVLAN_MAC_MODE, _MACVLAN_SET_MACS)
    return found


def lies_on(lower: int, network: int) -> bytes:
    """That a device lies on another one, of the network that the message is sent in, and lives in `network`."""
    return attribute(IFLA.LINK, lower) + attribute(IFLA.NET_NS_FD, network)


def veth_to(peer: bytes) -> bytes:
    """The data of a veth device whose other end is described by `peer`: head and attributes."""
    return attribute(_VETH_PEER, peer)


@contextmanager
def step(index: int, what: str) -> Iterator[None]:
    """What fails inside is said to be a step of furnishing network namespace `index`."""
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


def head(link: Link, flags: int = 0, change: int = 0) -> bytes:
    """The fixed part of a message about a device."""
    return head_of(link.index, flags, change)


def head_of(index: int, flags: int = 0, change: int = 0) -> bytes:
    """The fixed part of a message about the device of an index; 0: any."""
    return struct.pack("<BxHiII", 0, 0, index, flags, change)
