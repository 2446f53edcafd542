"""Networks of a tree that are connected with the surroundings: the outer end is put where the destination says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hosts import Host, Server, serving, terminate, two_hosts
from tests.harness.networks import (
    MAC,
    THEIRS,
    THEIRS_6,
    bridged_network,
    engine_in,
    plug,
    shell,
    start_in,
    within,
)
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop, engine, reap, said

pytestmark = pytest.mark.root


@pytest.fixture
def around() -> Iterator[str]:
    """The network of a host, with a bridge `br0` that has addresses."""
    with bridged_network() as path:
        yield path


def devices(path: str) -> dict[str, dict[str, Any]]:
    """What there is in a network, by name."""
    return {link["ifname"]: link for link in json.loads(shell(path, "ip -j -d link show"))}


def answers(around: str, address: str = THEIRS, within_s: float = 60.0) -> bool:
    """Whether the tree sends a datagram back."""

    def ask() -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.3)
            deadline = time.monotonic() + within_s
            while time.monotonic() < deadline:
                try:
                    sock.sendto(b"forwards", (address, 7))
                    return sock.recv(100) == b"sdrawrof"
                except OSError:
                    time.sleep(0.05)
        return False

    return within(around, ask)


def dumped(around: str, tree: Tree, image: Path, *options: str) -> None:
    family = tree.pids()
    done = engine_in(around, "dump", "--pid", str(tree.pid), "--to", image, *options)
    assert done.returncode == 0, said(done)
    assert not reap(family)


def restored(around: str, image: Path, *external: str) -> subprocess.CompletedProcess[str]:
    options = [word for one in external for word in ("--external", one)]
    return engine_in(around, "restore", "--from", image, "--detach", *options)


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_the_other_end_of_a_veth_pair_is_put_where_it_was(
    start: Callable[..., Tree], around: str, tmp_path: Path, setting: Setting
) -> None:
    tree = start_in(around, start, "echoing", setting)
    before = devices(around)
    plug(around, tree)
    assert answers(around)
    dumped(around, tree, tmp_path / "image")
    done = restored(around, tmp_path / "image")
    assert done.returncode == 3, said(done)
    assert "its device eth0 has its other end outside of the tree" in done.stderr
    assert "--external veth:eth0=out1@br0" in done.stderr
    assert devices(around).keys() == before.keys()
    done = restored(around, tmp_path / "image", "veth:eth0=out1@br0")
    assert done.returncode == 0, said(done)
    assert answers(around)
    assert answers(around, THEIRS_6)
    assert devices(around)["out1"]["master"] == "br0"
    inside = devices(f"/proc/{tree.pids()[-1]}/ns/net")["eth0"]
    assert (inside["ifindex"], inside["address"], inside["mtu"]) == (33, MAC, 1400)
    tree.check()
    assert tree.end() == 0


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_a_device_lies_on_one_of_the_host(
    start: Callable[..., Tree], around: str, tmp_path: Path, setting: Setting, kind: str
) -> None:
    tree = start_in(around, start, "echoing", setting)
    shell(around, "ip link add wire type veth peer name port && ip link set port master br0 up")
    pid = tree.pids()[-1]
    shell(
        around,
        f"ip link set wire up && ip link add link wire name eth0 address {MAC} netns {pid} type {kind} mode private",
    )
    shell(f"/proc/{pid}/ns/net", f"ip addr add {THEIRS}/24 dev eth0 && ip link set eth0 up")
    assert answers(around)
    before = devices(f"/proc/{pid}/ns/net")["eth0"]
    dumped(around, tree, tmp_path / "image")
    done = restored(around, tmp_path / "image")
    assert done.returncode == 3, said(done)
    assert "its device eth0 lies on one outside of the tree" in done.stderr
    assert f"--external {kind}:eth0=wire" in done.stderr
    done = restored(around, tmp_path / "image", f"{kind}:eth0=no-such")
    assert done.returncode == 3, said(done)
    assert "there is no device no-such here" in done.stderr
    done = restored(around, tmp_path / "image", f"{kind}:eth0=wire@br0")
    assert done.returncode == 2, said(done)
    done = restored(around, tmp_path / "image", f"{kind}:eth0=wire")
    assert done.returncode == 0, said(done)
    after = devices(f"/proc/{tree.pids()[-1]}/ns/net")["eth0"]
    names = ("ifindex", "address", "mtu", "linkinfo", "link_index", "flags")
    assert [after[name] for name in names] == [before[name] for name in names]
    assert answers(around)
    tree.check()


def test_a_tree_that_goes_on_keeps_its_connection(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    tree = start_in(around, start, "echoing", DEPTH_1)
    plug(around, tree)
    before = devices(around)
    done = engine_in(around, "dump", "--pid", str(tree.pid), "--to", tmp_path / "image", "--leave-running")
    assert done.returncode == 0, said(done)
    assert answers(around)
    assert devices(around)["out1"]["ifindex"] == before["out1"]["ifindex"]
    done = engine_in(around, "dump", "--pid", str(tree.pid), "--to", "-", "--external", "veth:eth0=out1")
    assert done.returncode == 2, said(done)
    assert "is said at the destination" in done.stderr
    tree.check()


@pytest.mark.parametrize(
    ("external", "code", "words"),
    [
        (["veth:eth0=br0"], 3, "there is a device br0 here already"),
        (["veth:eth0=lo"], 3, "there is a device lo here already"),
        (["veth:eth0=out1@br1"], 3, "there is no device br1 here"),
        (["veth:eth0=out1@lo"], 3, "lo is no bridge"),
        (
            ["veth:eth0=out1", "veth:eth1=out2"],
            3,
            "no such device that hangs on one outside (it has veth:eth0)",
        ),
        (["veth:99/eth0=out1"], 3, "no such device that hangs on one outside"),
        (["veth:eth0=out1", "veth:eth1=out1"], 2, "another one is to be called out1, too"),
        (["veth:eth0=out1", "veth:eth0=out2"], 2, "is given twice"),
        (["veth:eth0=a/b"], 2, "say KIND:NAME=PEER[@BRIDGE] with names of devices"),
        (["veth:eth0=sixteen-letters-"], 2, "at most 15 characters"),
        (["veth:=out1"], 2, "say KIND:NAME"),
        (["veth=out1"], 2, "say KIND=PATH"),
        (["bridge:eth0=out1"], 2, "say KIND=PATH"),
    ],
)
def test_what_cannot_be_connected_is_refused_and_nothing_is_left(
    start: Callable[..., Tree], around: str, tmp_path: Path, external: list[str], code: int, words: str
) -> None:
    tree = start_in(around, start, "echoing", DEPTH_0)
    plug(around, tree)
    dumped(around, tree, tmp_path / "image")
    before = settled(around)
    done = restored(around, tmp_path / "image", *external)
    assert done.returncode == code, said(done)
    assert words in done.stderr, said(done)
    assert settled(around) == before
    assert not tree.alive()


def settled(around: str) -> set[str]:
    """The names of all devices, once what is on its way out is gone."""
    deadline = time.monotonic() + 60
    while "out1" in (found := set(devices(around))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_nothing_is_left_outside_when_the_pages_do_not_come(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    """The network is made by then, with both ends."""
    tree = start_in(around, start, "echoing", DEPTH_1)
    plug(around, tree)
    dumped(around, tree, tmp_path / "image", "--mode", "stop")
    assert "out1" not in settled(around)
    (stored,) = [path for path in (tmp_path / "image").iterdir() if path.stat().st_size > 1 << 16]
    os.truncate(stored, stored.stat().st_size - 4096)
    done = restored(around, tmp_path / "image", "veth:eth0=out1@br0")
    assert done.returncode == 1, said(done)
    assert "truncated" in done.stderr, said(done)
    assert "out1" not in devices(around)


def test_two_networks_with_a_device_of_one_name(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    """The number of the network says which is meant."""
    tree = start_in(around, start, "two_networks", DEPTH_1)
    for number, pid in enumerate(tree.pids()[:2]):
        pair = f"type veth peer name out{number} netns {around.split('/')[2]}"
        shell(f"/proc/{pid}/ns/net", f"ip link add name eth0 index {40 + number} {pair}")
    dumped(around, tree, tmp_path / "image")
    done = restored(around, tmp_path / "image", "veth:eth0=new0")
    assert done.returncode == 3, said(done)
    assert "2 networks of the image have such a device (say veth:" in done.stderr, said(done)
    words = done.stderr.split("(say veth:")[1].split(")")[0].split(" or veth:")
    done = restored(around, tmp_path / "image", *(f"veth:{word}=new{n}" for n, word in enumerate(words)))
    assert done.returncode == 0, said(done)
    inner = [devices(f"/proc/{pid}/ns/net")["eth0"]["ifindex"] for pid in tree.pids()[:2]]
    assert sorted(inner) == [40, 41]
    outer = devices(around)
    assert {outer[f"new{n}"]["link_index"] for n in range(2)} == {40, 41}
    tree.check()


def test_the_surroundings_may_be_a_network_that_was_given(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    """Both commands run elsewhere: the network of the host is given by path."""
    tree = start_in(around, start, "echoing", DEPTH_1)
    plug(around, tree)
    family, image = tree.pids(), tmp_path / "image"
    here = ["--external", f"net={around}"]
    done = engine("dump", "--pid", str(tree.pid), "--to", image, *here)
    assert done.returncode == 0, said(done)
    assert not reap(family)
    done = engine("restore", "--from", image, "--detach", *here)
    assert done.returncode == 3, said(done)
    assert "--external veth:eth0=out1@br0" in done.stderr
    done = engine("restore", "--from", image, "--detach", *here, "--external", "veth:eth0=again@br0")
    assert done.returncode == 0, said(done)
    assert devices(around)["again"]["master"] == "br0"
    assert answers(around)
    tree.check()


def test_neighbours_hear_where_the_addresses_are_now(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    tree = start_in(around, start, "echoing", DEPTH_1)
    plug(around, tree)
    dumped(around, tree, tmp_path / "image")
    with within(around, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as ears:
        ears.settimeout(5)
        done = restored(around, tmp_path / "image", "veth:eth0=elsewhere@br0")
        assert done.returncode == 0, said(done)
        mac, missing = bytes.fromhex(MAC.replace(":", "")), {"arp", "advertisement"}
        while missing:
            frame = ears.recv(2000)
            if frame[12:14] == b"\x08\x06" and frame[22:32] == mac + socket.inet_aton(THEIRS):
                assert frame[38:42] == socket.inet_aton(THEIRS)
                missing.discard("arp")
            their_6 = socket.inet_pton(socket.AF_INET6, THEIRS_6)
            if frame[12:14] == b"\x86\xdd" and frame[54:55] == b"\x88" and frame[22:38] == their_6:
                missing.discard("advertisement")
    assert "elsewhere" in shell(around, f"bridge fdb show br br0 | grep -i {MAC}")


def migrate(there: list[str], source: Host, server: Server, secret: Path) -> subprocess.CompletedProcess[str]:
    options = ("--pid", "20000", "--to", server.address, "--secret-file", str(secret))
    return subprocess.run(
        [*there, *source.command(sys.executable, "-m", "pipeline", "migrate", *options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refuses_without_a_word(around: str, source: Host, destination: Host, secret: Path) -> None:
    """A destination that was not told where the other end shall be; the tree goes on where it is."""
    there = ["nsenter", f"--net={around}"]
    with serving(destination, secret, within=there) as server:
        done = migrate(there, source, server, secret)
    assert done.returncode == 1, said(done)
    assert "--external veth:eth0=source1@br0" in done.stderr, said(done)


@pytest.mark.parametrize("setting", [DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_a_migration_takes_the_address_along(
    workshop: Workshop, around: str, secret: Path, setting: Setting
) -> None:
    """Both hosts hang on one bridge: for a moment there are two devices with one address, of which one is down."""
    with ExitStack() as stack:
        source, destination = stack.enter_context(two_hosts())
        tree = within(around, lambda: source.start(workshop, "echoing", setting, 20_000))
        stack.callback(tree.kill)
        plug(around, tree, "source1")
        assert answers(around)
        refuses_without_a_word(around, source, destination, secret)
        assert answers(around)
        there = ["nsenter", f"--net={around}"]
        options = ("--once", "--external", "veth:eth0=new1@br0")
        server = stack.enter_context(serving(destination, secret, *options, within=there))
        family = tree.pids()
        done = migrate(there, source, server, secret)
        assert done.returncode == 0, said(done) + str(terminate(server.process))
        assert not reap(family)
        tree.pid = destination.outer_pid(20_000)
        assert answers(around)
        assert answers(around, THEIRS_6)
        assert "new1" in shell(around, f"bridge fdb show br br0 | grep -i {MAC}")
        assert devices(f"/proc/{tree.pids()[-1]}/ns/net")["eth0"]["address"] == MAC
        tree.check()
