"""Looking at a network of the tree: what is carried of it, and what is refused.

Everything is asked by rtnetlink on a socket that a visitor has made in the network; messages are kept
as the kernel gives them, without what says how things are at the moment.
`pipeline.resources.namespaces.network` has the records, and makes them again.

Sources: network_namespaces(7), rtnetlink(7), veth(4), ip-sysctl in the kernel's documentation.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import msgpack

from pipeline.errors import Blocker, passed_over
from pipeline.ids import LocalFd
from pipeline.image.schema import Id
from pipeline.kernel import rtnetlink
from pipeline.kernel.rtnetlink import IFLA, RTM, Netlink, attribute, attributes
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.resources.namespaces import nftables
from pipeline.resources.namespaces.kept_networks import KeptNetworks, walk
from pipeline.resources.namespaces.links import Link
from pipeline.resources.namespaces.links_view import LinksView, number
from pipeline.resources.namespaces.network import FRA_UID_RANGE, PING_GROUPS, SYSCTLS, NetState, set_sysctl
from pipeline.userns.forest import OVERFLOW_ID, IdKind
from pipeline.userns.visit import Way, read_file, visit

_NETLINK_NETFILTER = 12
_DEFAULT_QDISCS = {b"noqueue", b"pfifo_fast", b"fq_codel", b"fq", b"mq", b"pfifo", b"sfq"}
_DEFAULT_RULES = {
    socket.AF_INET: {(0, 255), (32766, 254), (32767, 253)},
    socket.AF_INET6: {(0, 255), (32766, 254)},
}
_IFA_KEPT = {1, 2, 3, 4, 6, 8, 9}
_IFA_FLAGS, _NODAD, _OF_THE_KERNEL = 8, 0x02, 0x40 | 0x80 | 0x08
_RTA_GATEWAY, _RTA_CACHEINFO, _RTA_NH_ID = 5, 12, 30
_FRA_PRIORITY, _FRA_TABLE = 6, 15
_PROTO_REDIRECT, _PROTO_KERNEL, _CLONED = 1, 2, 0x200
#: RTNH_F_PERVASIVE and ONLINK; the others say how the device is
_ROUTE_FLAGS = 2 | 4
_PERMANENT, _NOARP = 0x80, 0x40
_AF_BRIDGE = 7
_NTF_SELF, _NTF_MASTER, _NTF_STICKY = 0x02, 0x04, 0x40
_NDA_COUNTED = {3, 4}
_NDA_LLADDR, _NDA_MASTER, _NDA_NH_ID = 2, 9, 13
#: cache information, master, link-netnsid, nexthop: what the kernel says of an entry
_NDA_NOT_KEPT = {3, _NDA_MASTER, 10, _NDA_NH_ID}
_LOOPBACK_INDEX = 1
#: sysctls that say what is, not what shall be; mtu is the device's
_NOT_KEPT = {"mtu", "nf_conntrack_count", "stable_secret", "flush", "tcp_fastopen_key"}
#: names and values that a fresh network namespace of ours is known to take
_TAKEN: set[tuple[str, bytes]] = set()
#: who may make ping sockets: gids of whoever reads it, so it is read as the owner
_PING_GROUPS = os.path.basename(PING_GROUPS)


class NetworkView:
    """A network of the tree; `state` and `blockers` are complete when it is made.

    Args:
        subject: a process that is in it.
        way: what a visitor joins to be in it.
        networks: opens the network namespaces of the tree, and the external one, by their index.
        index: its own.
        identify: an id as we know it, in the forest.
        as_owner: what a visitor joins to be in it with the ids of the user namespace that owns it.
        kept: who is in it already.
    """

    def __init__(
        self,
        subject: str,
        way: Way,
        networks: Mapping[int, Callable[[], LocalFd]],
        index: int,
        external: int,
        identify: Callable[[int, IdKind], Id],
        as_owner: Way,
        kept: KeptNetworks,
    ) -> None:
        self._subject = subject
        self._kept = kept
        self._way = way
        self._as_owner = as_owner
        self.blockers: list[Blocker] = []
        with self._netlink() as route:
            self._route = route
            devices = LinksView(route, index, networks, external, self._refuse, identify)
            links = devices.links()
            #: see `LinksView`
            self.attached = devices.attached
            self.state = NetState(
                links=links,
                addresses=[
                    _kept_address(a) for a in route.dump(RTM.GETADDR, bytes(8)) if not _is_born_with(a)
                ],
                neighbours=[
                    _kept_neighbour(one)
                    for one in route.dump(RTM.GETNEIGH, bytes(12))
                    if _state_of(one) & _PERMANENT
                ],
                forwarding=self._forwarding(links),
                routes=self._routes(),
                rules=self._rules(),
                sysctls=self._sysctls([link.name.decode() for link in links]),
                ruleset=self._ruleset(links),
            )
            self._check_qdiscs(links)
        self._check_iptables()

    def _netlink(self, protocol: int = socket.NETLINK_ROUTE) -> Netlink:
        return Netlink(self._kept.socket(self._way, partial(rtnetlink.socket_of, protocol)))

    def _refuse(self, what: str, remedy: str = "") -> None:
        self.blockers.append(Blocker(self._subject, f"its network namespace has {what}", remedy))

    def _forwarding(self, links: list[Link]) -> list[bytes]:
        """What bridges and vxlan devices were told: where a MAC is. What they learned they learn again."""
        vxlans = {link.index for link in links if link.kind == "vxlan"}
        own = {link.address for link in links}
        kept = []
        for content in self._route.dump(RTM.GETNEIGH, bytes([_AF_BRIDGE]) + bytes(11)):
            index, state, flags, kind = struct.unpack_from("<iHBB", content, 4)
            told = attributes(content[12:])
            master = number(told.get(_NDA_MASTER))
            if master and (state & _NOARP or (state & _PERMANENT and told.get(_NDA_LLADDR) not in own)):
                flags = flags & _NTF_STICKY | (_NTF_SELF if index == master else _NTF_MASTER)
            elif not master and index in vxlans and state & (_NOARP | _PERMANENT):
                flags = flags & _NTF_STICKY | _NTF_SELF
            else:
                continue
            if _NDA_NH_ID in told:
                self._refuse("forwarding by next-hop objects, which is not carried")
            head = struct.pack("<B3xiHBB", _AF_BRIDGE, index, state, flags, kind)
            wanted = [(one, value) for one, value in told.items() if one not in _NDA_NOT_KEPT]
            kept.append(head + b"".join(attribute(one, value) for one, value in wanted))
        return kept

    def _routes(self) -> list[bytes]:
        kept = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for content in self._route.dump(RTM.GETROUTE, bytes([family]) + bytes(11)):
                protocol, flags = content[5], struct.unpack_from("<I", content, 8)[0]
                if protocol in {_PROTO_KERNEL, _PROTO_REDIRECT} or flags & _CLONED:
                    continue
                told = attributes(content[12:])
                if _RTA_NH_ID in told:
                    self._refuse("routes by next-hop objects, which are not carried")
                told.pop(_RTA_CACHEINFO, None)
                head = content[:8] + struct.pack("<I", flags & _ROUTE_FLAGS)
                kept.append(head + b"".join(attribute(kind, value) for kind, value in told.items()))
        return sorted(kept, key=lambda content: _RTA_GATEWAY in attributes(content[12:]))

    def _rules(self) -> list[bytes]:
        kept = []
        for family, defaults in _DEFAULT_RULES.items():
            missing = set(defaults)
            contents = list(_rules_of(family, self._route))
            if any(FRA_UID_RANGE in attributes(content[12:]) for content in contents):
                # uids are told as who asks knows them, and will be taken only from the owner's user namespace
                contents = msgpack.unpackb(visit(self._as_owner, partial(_packed_rules_here, family)))
            for content in contents:
                told = attributes(content[12:])
                key = number(told.get(_FRA_PRIORITY)), number(told.get(_FRA_TABLE))
                if key in missing:
                    missing.remove(key)
                    continue
                kept.append(content)
            if missing:
                self._refuse("a routing rule less than every namespace is born with, which is not carried")
        return kept

    def _check_qdiscs(self, links: list[Link]) -> None:
        names = {link.index: link.name.decode() for link in links}
        for content in self._route.dump(RTM.GETQDISC, bytes(20)):
            _, index, handle, _, _ = struct.unpack_from("<B3xiIII", content)
            kind = attributes(content[20:]).get(1, b"").rstrip(b"\0")
            if index in names and (kind not in _DEFAULT_QDISCS or handle):
                self._refuse(
                    f"a queueing discipline ({kind.decode()}) on {names[index]}, which is not carried"
                )

    def _ruleset(self, links: list[Link]) -> bytes:
        with self._netlink(_NETLINK_NETFILTER) as filters:
            try:
                return nftables.capture(filters, self._way, [(link.index, link.name) for link in links])
            except nftables.NotCarriedError as error:
                self._refuse(error.reason, error.remedy)
                return b""

    def _check_iptables(self) -> None:
        def look() -> bytes:
            found = []
            for name in ("ip_tables_names", "ip6_tables_names", "arp_tables_names"):
                with passed_over():
                    found.append(read_file(f"/proc/thread-self/net/{name}").strip())
            return b" ".join(filter(None, found))

        if tables := self._kept.look(self._way, look):
            self._refuse(f"iptables rules ({tables.decode()}), which are not carried", "flush them")

    def _sysctls(self, devices: list[str]) -> dict[str, bytes]:
        """What differs from a fresh namespace; a device's from what a fresh device gets."""
        # what another user namespace owns shows less, and takes less
        of_others = any(flag & CLONE.NEWUSER for _, flag in self._way)
        differ, refused = self._of_others(devices) if of_others else self._of_ours(devices)
        for name in refused:
            self._refuse(f"/proc/sys/net/{name} set to a value that cannot be set again")
        groups = b"" if not of_others and self._has_fresh_ping_groups() else self._ping_groups()
        return differ | ({PING_GROUPS: groups} if groups else {})

    def _of_ours(self, devices: list[str]) -> tuple[dict[str, bytes], list[str]]:
        """What differs, and which of it a fresh namespace does not take, where it is owned by our user namespace."""
        fresh = _fresh_sysctls()

        def is_wanted(name: str) -> bool:
            return _is_kept(name) and _of_a_fresh_device(name, devices, fresh) in fresh

        here = self._kept.sysctls(self._way, devices, is_wanted)
        if here is None:
            here = msgpack.unpackb(visit(self._way, lambda: _packed(dict(walk(is_wanted)))))
        differ = _differing(here, fresh, devices)
        tried = {name: value for name, value in differ.items() if (name, value) not in _TAKEN}

        def try_them() -> bytes:
            unshare(CLONE.NEWNET)
            return _packed(_refused_values(tried, fresh))

        refused: list[str] = msgpack.unpackb(visit(self._way, try_them)) if tried else []
        _TAKEN.update((name, value) for name, value in differ.items() if name not in refused)
        return differ, refused

    def _of_others(self, devices: list[str]) -> tuple[dict[str, bytes], list[str]]:
        """Likewise; what another user namespace owns shows less, and takes less."""

        def look() -> bytes:
            here = dict(walk(_is_written))
            unshare(CLONE.NEWNET)
            fresh = dict(walk(_is_written))
            differ = _differing(here, fresh, devices)
            return _packed((differ, _refused_values(differ, fresh)))

        differ, refused = msgpack.unpackb(visit(self._way, look))
        return differ, refused

    def _has_fresh_ping_groups(self) -> bool:
        """Whether they are those of a fresh one, as we read them, and we have a number for these."""
        fresh = _fresh_ping_groups()
        here = self._kept.look(self._way, lambda: read_file(os.path.join(SYSCTLS, PING_GROUPS)))
        return here == fresh and b"%d" % OVERFLOW_ID not in fresh

    def _ping_groups(self) -> bytes:
        """As its owner reads them; empty if they are those of a fresh one."""
        return visit(self._as_owner, _ping_groups_here)


def _rules_of(family: int, route: Netlink) -> Iterator[bytes]:
    return route.dump(RTM.GETRULE, bytes([family]) + bytes(11))


def _packed_rules_here(family: int) -> bytes:
    with Netlink(rtnetlink.socket_of()) as route:
        packed: bytes = msgpack.packb(list(_rules_of(family, route)))
    return packed


def _state_of(neighbour: bytes) -> int:
    return int(struct.unpack_from("<H", neighbour, 8)[0])


def _is_born_with(address: bytes) -> bool:
    """Whether it is one of those that lo gets whenever it comes up."""
    family, length, index = address[0], address[1], struct.unpack_from("<I", address, 4)[0]
    value = attributes(address[8:]).get(IFLA.ADDRESS)
    return index == _LOOPBACK_INDEX and (family, length, value) in {
        (socket.AF_INET, 8, bytes([127, 0, 0, 1])),
        (socket.AF_INET6, 128, bytes(15) + b"\1"),
    }


def _kept_neighbour(content: bytes) -> bytes:
    """A neighbour without what the kernel counts of it (NDA_CACHEINFO, NDA_PROBES)."""
    kept = ((kind, value) for kind, value in attributes(content[12:]).items() if kind not in _NDA_COUNTED)
    return content[:12] + b"".join(attribute(kind, value) for kind, value in kept)


def _kept_address(content: bytes) -> bytes:
    """An address as it is added: without what the kernel says of it, and not probed for once more."""
    told = {kind: value for kind, value in attributes(content[8:]).items() if kind in _IFA_KEPT}
    flags = (number(told.get(_IFA_FLAGS)) or content[2]) & ~_OF_THE_KERNEL
    if content[0] == socket.AF_INET6:
        flags |= _NODAD
    told[_IFA_FLAGS] = struct.pack("<I", flags)
    head = content[:2] + bytes([flags & 0xFF]) + content[3:8]
    return head + b"".join(attribute(kind, value) for kind, value in told.items())


def _packed(found: object) -> bytes:
    packed: bytes = msgpack.packb(found)
    return packed


def _is_kept(name: str) -> bool:
    last = os.path.basename(name)
    return last not in _NOT_KEPT and last != _PING_GROUPS


def _is_written(name: str) -> bool:
    """Whether a sysctl is kept, and can be set."""
    return _is_kept(name) and bool(os.stat(os.path.join(SYSCTLS, name)).st_mode & 0o200)


@functools.cache
def _fresh_sysctls() -> dict[str, bytes]:
    """Those of a fresh namespace of ours; it takes longer to make one than to do all else with a network."""

    def look() -> bytes:
        unshare(CLONE.NEWNET)
        return _packed(dict(walk(_is_written)))

    found: dict[str, bytes] = msgpack.unpackb(visit([], look))
    return found


@functools.cache
def _fresh_ping_groups() -> bytes:
    """The gids that may make ping sockets in a fresh namespace of ours, as we read them."""

    def look() -> bytes:
        unshare(CLONE.NEWNET)
        return read_file(os.path.join(SYSCTLS, PING_GROUPS))

    return visit([], look)


def _differing(here: Mapping[str, bytes], fresh: Mapping[str, bytes], devices: list[str]) -> dict[str, bytes]:
    differ = {}
    for name, value in here.items():
        default = fresh.get(_of_a_fresh_device(name, devices, fresh))
        if default is not None and default != value:
            differ[name] = value
    return differ


def _ping_groups_here() -> bytes:
    """The gids that may make ping sockets in the network of the caller; empty if they are those of a fresh one."""
    path = os.path.join(SYSCTLS, PING_GROUPS)
    here = read_file(path).strip()
    unshare(CLONE.NEWNET)
    return b"" if read_file(path).strip() == here else here


def _of_a_fresh_device(name: str, devices: list[str], fresh: Mapping[str, bytes]) -> str:
    """The sysctl of a fresh namespace that says what `name` is born with."""
    if name in fresh:
        return name
    parts = name.split("/")
    if len(parts) == 4 and parts[1] in {"conf", "neigh"} and parts[2] in devices:
        parts[2] = "default"
    return "/".join(parts)


def _refused_values(differ: Mapping[str, bytes], fresh: Mapping[str, bytes]) -> list[str]:
    """Which values the caller's network namespace, a fresh one, does not take."""
    refused = []
    for name, value in differ.items():
        if name in fresh:
            try:
                set_sysctl(name, value)
            except OSError:
                refused.append(name)
    return refused
