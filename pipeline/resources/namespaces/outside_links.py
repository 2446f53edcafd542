"""Devices of the tree's networks that hang on one outside of the tree.

An image says that the other end of a veth pair, or what a macvlan device lies on, is outside, and what it was called
there: a hint, no more. What it shall be here the destination decides (`--external veth:NAME=PEER[@BRIDGE]`,
`--external macvlan:NAME=LOWER`); without that word nothing is made.

The other end of a pair is made together with the device, in the surroundings' network, and put under its bridge, but
it stays down until the tree runs: in a migration the source's is still there, with the same addresses. A macvlan
device is up, because its addresses and routes need that, but without a carrier (`protodown`): it says nothing.
Then the connection comes up, and what stands around hears where the addresses of the network are now
(`pipeline.resources.namespaces.announce`).

Whatever fails before that, the other end of a pair is deleted; afterwards it is gone when the tree's network is.

Source: veth(4), rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attribute, attributes
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.resources.namespaces import announce, links
from pipeline.resources.namespaces.links import Link, Place
from pipeline.resources.namespaces.links_view import route_in
from pipeline.resources.namespaces.network import NetState
from pipeline.userns.externals import DEVICES, GivenDevice
from pipeline.userns.visit import fetch

_UP = 0x1
#: of `IFLA.OPERSTATE`
_OPER_UP = b"\6"
#: how long the kernel may take to notice that both ends are up
_CARRIER_S = 0.5
_ENTRY = "end of a veth pair outside"


def check_here(
    states: Mapping[int, NetState], given: Sequence[GivenDevice], surroundings: LocalFd
) -> Iterator[Blocker]:
    """What stands in the way of hanging the devices of an image where they shall hang.

    Args:
        states: of the tree's networks, by `Namespace` index.
        given: what was said at the destination.
        surroundings: the network that they shall hang in; stays the caller's.
    """
    wanted = [(n, link) for n, state in states.items() for link in state.links if link.outside is not None]
    matched: set[Place] = set()
    for one in given:
        found = [(n, link) for n, link in wanted if _is_meant(one, n, link)]
        matched |= {(n, link.index) for n, link in found}
        if not found:
            there = ", ".join(f"{link.kind}:{os.fsdecode(link.name)}" for _, link in wanted)
            yield Blocker(
                str(one),
                "the image has no such device that hangs on one outside",
                there and f"it has {there}",
            )
        elif len(found) > 1:
            forms = " or ".join(f"{link.kind}:{n}/{os.fsdecode(link.name)}" for n, link in found)
            yield Blocker(str(one), f"{len(found)} networks of the image have such a device", f"say {forms}")
    names = [link.name for _, link in wanted]
    for n, link in wanted:
        if (n, link.index) not in matched:
            name = os.fsdecode(link.name)
            which = name if names.count(link.name) == 1 else f"{n}/{name}"
            hint = os.fsdecode(link.outside or b"") or DEVICES.get(link.kind, "OTHER")
            how = "lies on one outside" if link.kind in links.LYING else "has its other end outside"
            yield Blocker(
                f"network namespace {n}",
                f"its device {name} {how} of the tree, and nobody says what that shall be here",
                f"--external {link.kind}:{which}={hint}",
            )
    if given:
        with route_in(surroundings) as route:
            for one in given:
                yield from _check_one(one, route)


def _check_one(given: GivenDevice, route: Netlink) -> Iterator[Blocker]:
    deadline = time.monotonic() + links.GOING_S
    there = _look_up(route, given.other)
    while there is not None and given.kind == "veth" and time.monotonic() < deadline:
        time.sleep(0.01)
        there = _look_up(route, given.other)
    if given.kind in links.LYING:
        if there is None:
            yield Blocker(str(given), f"there is no device {given.other} here", "name one that is there")
        return
    if there is not None:
        yield Blocker(
            str(given), f"there is a device {given.other} here already", "delete it, or give another name"
        )
    if given.bridge is not None:
        bridge = _look_up(route, given.bridge)
        if bridge is None:
            yield Blocker(str(given), f"there is no device {given.bridge} here", "make the bridge first")
        elif bridge[1] != "bridge":
            yield Blocker(str(given), f"{given.bridge} is no bridge, but {bridge[1] or 'hardware'}")


class OutsideLinks:
    """The ends outside of the tree that are made for it; `close` takes them away unless they were connected.

    Args:
        given: checked by `check_here`.
        surroundings: opens the network that they are made in; the caller of it owns the result.
    """

    def __init__(self, given: Sequence[GivenDevice], surroundings: Callable[[], LocalFd]) -> None:
        self._given = given
        self._surroundings = surroundings
        self._stack = ExitStack()
        self._network: tuple[LocalFd, Netlink] | None = None
        #: device of the tree -> index of its other end
        self._ends: dict[Place, int] = {}
        #: devices of the tree that lie on one outside, and say nothing yet
        self._silent: set[Place] = set()

    def _open(self) -> tuple[LocalFd, Netlink]:
        if self._network is None:
            fd = self._surroundings()
            self._stack.callback(os.close, fd)
            self._network = fd, self._stack.enter_context(route_in(fd))
        return self._network

    def make(self, place: Place, described: bytes, link: Link, network: int, route: Netlink) -> None:
        """See `links.Outside`.

        Raises:
            RebuildError: nobody says what it shall hang on, or that cannot be.
        """
        found = [one for one in self._given if _is_meant(one, place[0], link)]
        if len(found) != 1:
            raise RebuildError(f"device {os.fsdecode(link.name)}: nobody says what it shall hang on")
        try:
            if link.kind in links.LYING:
                self._lay(found[0], place, described, link, network, route)
            else:
                self._pair(found[0], place, described, link, route)
        except OSError as error:
            reason = {
                errno.EEXIST: f"there is a device {found[0].other} here already",
                errno.EPERM: "this user may not make devices in the network of this command",
            }.get(error.errno or 0, error.strerror)
            raise RebuildError(f"{found[0]}: {reason}") from error

    def _lay(
        self, given: GivenDevice, place: Place, described: bytes, link: Link, network: int, route: Netlink
    ) -> None:
        _, outer = self._open()
        lower = _index_of(outer, given.other)
        links.create(outer, described + links.lies_on(lower, network), link.kind, links.data_of(link))
        self._silent.add(place)
        route.do(RTM.SETLINK, links.head(link) + attribute(IFLA.PROTO_DOWN, b"\1"))

    def _pair(self, given: GivenDevice, place: Place, described: bytes, link: Link, route: Netlink) -> None:
        fd, outer = self._open()
        peer = links.head_of(0) + attribute(IFLA.IFNAME, given.other.encode() + b"\0")
        peer += attribute(IFLA.MTU, link.mtu) + attribute(IFLA.NET_NS_FD, fd)
        links.create(route, described, link.kind, links.veth_to(peer))
        self._ends[place] = _index_of(outer, given.other)
        LEDGER.take(_ENTRY, (id(self), place))
        if given.bridge is not None:
            try:
                master = attribute(IFLA.MASTER, _index_of(outer, given.bridge))
                outer.do(RTM.SETLINK, links.head_of(self._ends[place]) + master)
            except OSError as error:
                raise RebuildError(
                    f"{given}: it cannot be put under {given.bridge}: {error.strerror}"
                ) from error

    def connect(self, states: Mapping[int, NetState], opened: Callable[[int], LocalFd]) -> None:
        """Bring the connections up and tell the surroundings; from now on they belong to the tree.

        Args:
            states: of the tree's networks.
            opened: opens one of them; the caller of it owns the result.

        Raises:
            RebuildError: the kernel does not bring one up.
        """
        try:
            for index in self._ends.values():
                _bring_up(self._open()[1], links.head_of(index, _UP, _UP))
            for network in {network for network, _ in [*self._ends, *self._silent]}:
                fd = opened(network)
                try:
                    with route_in(fd) as route:
                        for _, index in [place for place in self._silent if place[0] == network]:
                            _bring_up(route, links.head_of(index) + attribute(IFLA.PROTO_DOWN, b"\0"))
                        self._announce(network, states[network], fd, route)
                finally:
                    os.close(fd)
        finally:
            self._silent.clear()
            while self._ends:
                LEDGER.give_back(_ENTRY, (id(self), self._ends.popitem()[0]))

    def _announce(self, network: int, state: NetState, fd: LocalFd, route: Netlink) -> None:
        places = {*self._ends, *self._silent}
        connected = [link for link in state.links if (network, link.index) in places]
        up = [link.index for link in connected if link.flags & _UP]
        ends = [self._ends[network, index] for index in up if (network, index) in self._ends]
        deadline = time.monotonic() + _CARRIER_S
        for asked, index in [*((route, index) for index in up), *((self._open()[1], end) for end in ends)]:
            while not _lets_packets_pass(asked, index) and time.monotonic() < deadline:
                time.sleep(0.001)
        # where a device is a port of a bridge, the addresses are the bridge's
        indexes = {link.index for link in connected} | {link.master for link in connected}
        speakers = [link for link in state.links if link.index in indexes]
        packets = announce.packets(speakers, state.addresses)
        # closed when the tree runs
        self._stack.callback(os.close, fetch([(fd, CLONE.NEWNET)], lambda: announce.send(packets)))

    def close(self) -> None:
        """Delete the ends that were not connected; idempotent."""
        try:
            while self._ends:
                place, index = self._ends.popitem()
                LEDGER.give_back(_ENTRY, (id(self), place))
                try:
                    self._open()[1].do(RTM.DELLINK, links.head_of(index))
                except OSError as error:
                    if error.errno != errno.ENODEV:
                        raise
        finally:
            self._network = None
            self._stack.close()


def _is_meant(given: GivenDevice, network: int, link: Link) -> bool:
    return (
        link.outside is not None
        and (given.kind, given.name) == (link.kind, os.fsdecode(link.name))
        and given.network in (None, network)
    )


def _bring_up(route: Netlink, message: bytes) -> None:
    try:
        route.do(RTM.SETLINK, message)
    except OSError as error:
        if error.errno != errno.ENODEV:  # somebody has cut the connection already
            raise RebuildError(f"a connection with the surroundings: {error.strerror}") from error


def _index_of(route: Netlink, name: str) -> int:
    found = _look_up(route, name)
    if found is None:
        raise OSError(errno.ENODEV, f"there is no device {name}")
    return found[0]


def _look_up(route: Netlink, name: str) -> tuple[int, str] | None:
    """Index and kind of the device of a name; None if there is none."""
    try:
        answer = route.ask(RTM.GETLINK, links.head_of(0) + attribute(IFLA.IFNAME, name.encode() + b"\0"))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    (index,) = struct.unpack_from("<i", answer, 4)
    info = attributes(attributes(answer[16:]).get(IFLA.LINKINFO, b""))
    return index, info.get(IFLA_INFO.KIND, b"").rstrip(b"\0").decode()


def _lets_packets_pass(route: Netlink, index: int) -> bool:
    """Whether the kernel has noticed that a device has a carrier; also once somebody has taken the device away.

    Before, a device's own packets are dropped, and so are those that arrive at it as a port of a bridge. The kernel
    looks at once where it sees something urgent, else once a second; and a port is nothing urgent to it if the other
    end of its pair, in another network, has the same index. Since linux 6.8 it looks when a device is asked for, at
    that one.

    Source: linux net/core/link_watch.c, net/core/rtnetlink.c.
    """
    try:
        answer = route.ask(RTM.GETLINK, links.head_of(index))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return True
        raise
    return attributes(answer[16:])[IFLA.OPERSTATE] == _OPER_UP
