"""The ends of veth pairs outside of the tree: down until they are connected, and gone if they never are."""

from __future__ import annotations

import json
import os
import struct
import subprocess

import pytest
from msgspec import convert, to_builtins
from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.image.schema import Id, Namespace
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attributes, socket_of
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, unshare
from pipeline.resources.namespaces import announce, links, outside_links
from pipeline.resources.namespaces.network import NetState
from pipeline.userns import cradle
from pipeline.userns.externals import GivenDevice
from pipeline.userns.forest import Forest
from tests.harness.networks import shell
from tests.userns.making import captured, held, in_child, making, other_keepers, own_namespace

pytestmark = pytest.mark.root

#: of `IFLA_INFO.SLAVE_DATA` of a port of a bridge (IFLA_BRPORT_STATE)
_STATE, _FORWARDING = 1, 3


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def outer() -> dict[str, list[str]]:
    """The devices of our network and their flags."""
    return {link["ifname"]: link["flags"] for link in json.loads(ip("-j", "link", "show"))}


def states_of_ports() -> dict[int, int]:
    """By index; a list of all devices makes the kernel look after none of them."""
    with Netlink(socket_of()) as route:
        found = {}
        for answer in list(route.dump(RTM.GETLINK, links.head_of(0))):
            info = attributes(attributes(answer[16:]).get(IFLA.LINKINFO, b""))
            if IFLA_INFO.SLAVE_DATA in info:
                (index,) = struct.unpack_from("<i", answer, 4)
                found[index] = attributes(info[IFLA_INFO.SLAVE_DATA])[_STATE][0]
        return found


def network_with_a_device(id_map: str | None) -> tuple[Forest, Namespace]:
    """A network that was connected with ours, and is gone."""
    with held(lambda: unshare(CLONE.NEWNET), id_map) as pid:
        ip("link", "add", "outer", "type", "veth", "peer", "name", "inner", "netns", str(pid))
        shell(f"/proc/{pid}/ns/net", "ip link set inner up")
        capture, forest = captured(pid)
        assert not capture.blockers
        return forest, own_namespace(capture, "net")


@pytest.mark.parametrize("id_map", [None, "0 100000 65536"])
def test_an_end_outside_is_down_until_the_tree_runs(id_map: str | None) -> None:
    def body() -> None:
        unshare(CLONE.NEWNET)
        forest, network = network_with_a_device(id_map)
        given = [GivenDevice("veth", "inner", None, "again")]
        with making(forest, {network.index: network}, given=given) as keepers:
            assert "UP" not in outer()["again"]
        assert "again" not in outer()
        before = os.listdir("/proc/self/fd")
        with making(forest, {network.index: network}, given=given) as keepers:
            keepers.connect_networks()
            assert {"UP", "LOWER_UP"} <= set(outer()["again"])
        assert os.listdir("/proc/self/fd") == before

    in_child(body)


def test_a_bridge_lets_packets_pass_at_once() -> None:
    """The kernel looks after a pair whose ends have the same index within a second, unless it is asked."""

    def body() -> None:
        for _ in range(5):
            unshare(CLONE.NEWNET)
            ip("link", "add", "index", "2", "br0", "type", "bridge")
            ip("link", "set", "br0", "up")
            with held(lambda: unshare(CLONE.NEWNET)) as pid:
                inner = f"/proc/{pid}/ns/net"
                shell(inner, f"ip link add index 4 name inner type veth peer name outer netns {os.getpid()}")
                shell(inner, "ip link set inner up")
                capture, forest = captured(pid)
                network = own_namespace(capture, "net")
            given = [GivenDevice("veth", "inner", None, "again", "br0")]
            with making(forest, {network.index: network}, given=given) as keepers:
                keepers.connect_networks()
                assert states_of_ports() == {4: _FORWARDING}

    in_child(body)


def test_an_end_that_does_not_come_up_stays_the_trees() -> None:
    """The tree runs by then; who looks after its connections does not give them up a second time."""

    def body() -> None:
        unshare(CLONE.NEWNET)
        forest, network = network_with_a_device(None)
        given = [GivenDevice("veth", "inner", None, "again")]

        def fails(*_: object) -> None:
            raise RebuildError("no such cable")

        with making(forest, {network.index: network}, given=given) as keepers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(outside_links, "_bring_up", fails)
                with pytest.raises(RebuildError, match="no such cable"):
                    keepers.connect_networks()
            keepers._outside.close()
            assert "again" in outer()

    in_child(body)


def test_what_lies_on_a_device_outside_says_nothing_until_the_tree_runs() -> None:
    def body() -> None:
        unshare(CLONE.NEWNET)
        ip("link", "add", "wire", "type", "veth", "peer", "name", "port")
        for name in ("wire", "port"):
            ip("link", "set", name, "up")
        with held(lambda: unshare(CLONE.NEWNET)) as pid:
            ip("link", "add", "link", "wire", "name", "inner", "netns", str(pid), "type", "macvlan")
            shell(f"/proc/{pid}/ns/net", "ip link set inner up")
            capture, forest = captured(pid)
            network = own_namespace(capture, "net")
        given = [GivenDevice("macvlan", "inner", None, "wire")]
        with making(forest, {network.index: network}, given=given) as keepers:
            inside = f"/proc/{other_keepers(keepers)[network.index].pid}/ns/net"
            assert "NO-CARRIER" in shell(inside, "ip link show inner")
            keepers.connect_networks()
            assert "LOWER_UP" in shell(inside, "ip link show inner")

    in_child(body)


@pytest.mark.parametrize(
    ("place", "words"),
    [((7, 99), "lies on one that is not in the image"), (None, "lies on nothing in the image")],
)
def test_a_device_that_lies_on_nothing_is_named(place: tuple[int, int] | None, words: str) -> None:
    """No image of ours says so."""

    def body() -> None:
        unshare(CLONE.NEWNET)

        def act() -> None:
            unshare(CLONE.NEWNET)
            ip("link", "add", "lower", "type", "veth", "peer", "name", "other")
            ip("link", "add", "link", "lower", "name", "over", "type", "macvlan")

        with held(act) as pid:
            capture, forest = captured(pid)
            network = own_namespace(capture, "net")
        state = convert(network.state, NetState)
        wrong = [replace(link, peer=place) if link.name == b"over" else link for link in state.links]
        built = to_builtins(replace(state, links=wrong), builtin_types=(bytes,))
        with pytest.raises(RebuildError, match=words), making(forest, {7: replace(network, state=built)}):
            pass

    in_child(body)


def test_an_end_outside_is_no_place_in_the_image() -> None:
    """No image of ours says so: what lies there lies on nothing."""

    def body() -> None:
        unshare(CLONE.NEWNET)

        def act() -> None:
            unshare(CLONE.NEWNET)
            ip("link", "add", "lower", "type", "veth", "peer", "name", "other")
            ip("link", "add", "link", "lower", "name", "over", "type", "macvlan")

        with held(act) as pid:
            capture, forest = captured(pid)
            network = own_namespace(capture, "net")
        state = convert(network.state, NetState)
        wrong = {
            b"lower": {"outside": b"there", "peer": (99, 5)},
            b"over": {"peer": (99, 5)},
        }
        changed = [replace(link, **wrong.get(link.name, {})) for link in state.links]
        kept = [link for link in changed if link.name != b"other"]
        built = to_builtins(replace(state, links=kept), builtin_types=(bytes,))
        given = [GivenDevice("veth", "lower", None, "again")]
        with (
            pytest.raises(RebuildError, match="over lies on one that is not in the image"),
            making(forest, {7: replace(network, state=built)}, given=given),
        ):
            pass
        assert "again" not in outer()

    in_child(body)


def test_a_name_that_is_taken_meanwhile_stays_its_owner_s() -> None:
    def body() -> None:
        unshare(CLONE.NEWNET)
        forest, network = network_with_a_device(None)
        ip("link", "add", "again", "type", "bridge")
        given = [GivenDevice("veth", "inner", None, "again")]
        with (
            pytest.raises(RebuildError, match="there is a device again here already"),
            making(forest, {network.index: network}, given=given),
        ):
            pass
        assert "again" in outer()

    in_child(body)


def test_a_plain_user_may_not_connect_with_the_host() -> None:
    user = 61_234

    def body() -> None:
        unshare(CLONE.NEWNET)
        forest, network = network_with_a_device(f"0 {user} 1")

        def plain() -> None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            prctl(PRCTL.SET_DUMPABLE, 1)
            cradle.enter()
            one = forest.namespaces[1]
            denied = Forest([forest.namespaces[0], replace(one, owner=Id(0, user), setgroups="deny")])
            given = [GivenDevice("veth", "inner", None, "again")]
            with (
                pytest.raises(
                    RebuildError, match="this user may not make devices in the network of this command"
                ),
                making(denied, {network.index: network}, given=given),
            ):
                pass

        in_child(plain)
        assert "again" not in outer()

    in_child(body)


def test_announcements_are_what_the_documents_say() -> None:
    mac, address = bytes.fromhex("020000000055"), bytes([10, 8, 0, 2])
    assert announce.gratuitous_arp(mac, address).hex() == (
        "ffffffffffff" "020000000055" "0806"
        "0001" "0800" "06" "04" "0001" "020000000055" "0a080002" "000000000000" "0a080002"
    )  # fmt: skip
    frame = announce.unsolicited_advertisement(mac, bytes.fromhex("20010db8000800000000000000000002"))
    words = frame[14 + 8 : 14 + 40] + (32).to_bytes(4, "big") + (58).to_bytes(4, "big") + frame[14 + 40 :]
    total = sum(int.from_bytes(words[at : at + 2], "big") for at in range(0, len(words), 2))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF  # with its checksum, as a receiver adds it up
