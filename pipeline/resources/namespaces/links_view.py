"""Looking at the devices of a network of the tree; `pipeline.resources.namespaces.links` makes them again.

Sources: rtnetlink(7), veth(4); net/core/net_namespace.c (RTM_GETNSID).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping

from pipeline.errors import raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.image.schema import Id
from pipeline.kernel import rtnetlink
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attribute, attributes
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import tun
from pipeline.resources.namespaces.links import DATA, HANGING, PORT_DATA, Link, Place, head_of
from pipeline.userns.forest import IdKind
from pipeline.userns.visit import fetch

_UP = 1
_BRIDGE_VLAN_FILTERING = 7
_BACKUP_NEXTHOP = 44
_NETNSA_NSID, _NETNSA_FD = 1, 3
_NOT_ASSIGNED = b"\xff" * 4
#: devices that a network namespace is born with where their module is loaded; they are down until somebody uses them
_BORN_WITH = {
    b"tunl0", b"sit0", b"ip6tnl0", b"gre0", b"gretap0", b"erspan0", b"ip_vti0", b"ip6_vti0", b"ip6gre0",
}  # fmt: skip


class LinksView:
    """The devices of a network.

    Args:
        route: a netlink socket in it.
        index: its `Namespace` index.
        networks: opens the network namespaces of the tree, and the external one, by their index.
        external: the index of that.
        refuse: is told what is not carried, and what can be done.
        identify: an id as we know it, in the forest.
    """

    def __init__(
        self,
        route: Netlink,
        index: int,
        networks: Mapping[int, Callable[[], LocalFd]],
        external: int,
        refuse: Callable[[str, str], None],
        identify: Callable[[int, IdKind], Id],
    ) -> None:
        self._route = route
        self._index = index
        self._networks = networks
        self._external = external
        self._refuse = refuse
        self._identify = identify
        #: to how many descriptors tun and tap devices are attached, by name
        self.attached: dict[bytes, int] = {}

    def links(self) -> list[Link]:
        """All that are carried, by index."""
        contents = list(self._route.dump(RTM.GETLINK, bytes(16)))
        found = [self._link(content) for content in sorted(contents, key=_index_of)]
        return [link for link in found if link is not None]

    def _link(self, content: bytes) -> Link | None:
        index, flags = _index_of(content), struct.unpack_from("<I", content, 8)[0]
        told = attributes(content[16:])
        info = attributes(told.get(IFLA.LINKINFO, b""))
        name = told[IFLA.IFNAME].rstrip(b"\0")
        kind = "lo" if name == b"lo" else info.get(IFLA_INFO.KIND, b"").rstrip(b"\0").decode()
        if name in _BORN_WITH and not flags & _UP:
            return None
        if kind not in DATA:
            what = f"device {name.decode()} of kind {kind or 'hardware'}, which is not carried"
            self._refuse(what, "remove it")
            return None
        data = attributes(info.get(IFLA_INFO.DATA, b""))
        if kind == "bridge" and data.get(_BRIDGE_VLAN_FILTERING, b"\0") != b"\0":
            self._refuse(f"bridge {name.decode()} that filters VLANs, which is not carried", "")
        uid, gid = tun.ids(data) if kind == "tun" else (None, None)
        if kind == "tun":
            link_type = int(struct.unpack_from("<H", content, 2)[0])
            for what, remedy in tun.blockers(name.decode(), link_type, data):
                self._refuse(what, remedy)
            if count := tun.attached(told.get(IFLA.CARRIER) == b"\1", data):
                self.attached[name] = count
        peer, outside = self._other(told, kind) if kind in HANGING else (None, None)
        if kind == "vxlan" and outside is not None:
            self._refuse(
                f"vxlan device {name.decode()}, whose packets go through a network outside of the tree", ""
            )
        return Link(
            index=index,
            name=name,
            kind=kind,
            flags=flags,
            mtu=number(told.get(IFLA.MTU)),
            txqlen=number(told.get(IFLA.TXQLEN)),
            address=told.get(IFLA.ADDRESS, b""),
            master=number(told.get(IFLA.MASTER)),
            group=number(told.get(IFLA.GROUP)),
            alias=told.get(IFLA.IFALIAS, b"").rstrip(b"\0"),
            data=[(one, value) for one, value in data.items() if one in DATA[kind]],
            peer=peer,
            outside=outside,
            uid=None if uid is None else self._identify(uid, "uid"),
            gid=None if gid is None else self._identify(gid, "gid"),
            port=self._port(name.decode(), info),
        )

    def _port(self, name: str, info: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
        """How a device is set as a port of a bridge."""
        if info.get(IFLA_INFO.SLAVE_KIND, b"").rstrip(b"\0") != b"bridge":
            return []
        told = attributes(info.get(IFLA_INFO.SLAVE_DATA, b""))
        if any(told.get(_BACKUP_NEXTHOP, b"")):
            self._refuse(
                f"device {name}, a port of a bridge with a next-hop object, which is not carried", ""
            )
        return [(kind, value) for kind, value in told.items() if kind in PORT_DATA]

    def _other(self, told: Mapping[int, bytes], kind: str) -> tuple[Place | None, bytes | None]:
        """What a device hangs on: its place in the tree, or what it is called outside."""
        other = number(told.get(IFLA.LINK))
        if IFLA.LINK_NETNSID not in told:
            return (self._index, other), None
        wanted = told[IFLA.LINK_NETNSID]
        for index, opened in self._networks.items():
            fd = opened()
            try:
                answer = self._route.ask(RTM.GETNSID, bytes(4) + attribute(_NETNSA_FD, fd))
                nsid = attributes(answer[4:]).get(_NETNSA_NSID, _NOT_ASSIGNED)
                if nsid != wanted or wanted == _NOT_ASSIGNED:
                    continue
                if index != self._external:
                    return (index, other), None
                return None, _called(fd, other, with_bridge=kind == "veth")
            finally:
                os.close(fd)
        return None, b""


def _called(network: LocalFd, index: int, with_bridge: bool) -> bytes:
    """What a device of another network is called: NAME, or NAME@BRIDGE if it is a port of one."""
    try:
        with route_in(network) as route:
            told = attributes(route.ask(RTM.GETLINK, head_of(index))[16:])
            name = told[IFLA.IFNAME].rstrip(b"\0")
            if not with_bridge or IFLA.MASTER not in told:
                return name
            above = attributes(route.ask(RTM.GETLINK, head_of(number(told[IFLA.MASTER])))[16:])
            return name + b"@" + above[IFLA.IFNAME].rstrip(b"\0")
    except OSError as error:
        raise_if_exhausted(error)
    return b""


def route_in(network: LocalFd) -> Netlink:
    """A netlink socket in a network; the caller closes it. OSError: it may not be joined."""
    if os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        return Netlink(rtnetlink.socket_of())  # setns(2) wants capabilities even for the own network
    made = fetch([(network, CLONE.NEWNET)], lambda: rtnetlink.socket_of().detach())
    return Netlink(socket.socket(fileno=made))


def _index_of(content: bytes) -> int:
    return int(struct.unpack_from("<i", content, 4)[0])


def number(value: bytes | None) -> int:
    """An attribute that is a number, 0 where it is not there."""
    return int.from_bytes(value, "little") if value else 0
