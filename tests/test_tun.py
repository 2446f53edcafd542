"""Persistent tun and tap devices of a tree's network, and who may attach to them."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.networks import shell, within
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, engine, restore, said

pytestmark = pytest.mark.root

DEVICES = """
ip link add gone type bridge && ip link del gone
ip tuntap add tap0 mode tap user {uid} group {gid} multi_queue
ip tuntap add dev tun0 mode tun pi vnet_hdr user {uid}
ip tuntap add tap1 mode tap
ip link set tap0 address 02:00:00:00:00:77 mtu 1300 alias 'for a machine' up
ip address add 10.5.0.1/24 dev tap0
"""


def devices(tree: Tree) -> list[dict[str, Any]]:
    """What `ip` says of the devices of the tree, without what is counted."""
    found = json.loads(shell(f"/proc/{tree.pid}/ns/net", "ip -j -d address show"))
    for device in found:
        device.pop("operstate", None)
        # that there is no carrier is noticed a moment later
        device["flags"] = [flag for flag in device["flags"] if flag != "NO-CARRIER"]
        for address in device["addr_info"]:
            address.pop("valid_life_time", None)
    return list(found)


def lowest_ids(tree: Tree) -> tuple[int, int]:
    """The uid and gid here that are 0 inside."""
    uid, gid = (int(Path(f"/proc/{tree.pid}/{kind}_map").read_text().split()[1]) for kind in ("uid", "gid"))
    return uid, gid


def make_devices(tree: Tree) -> tuple[int, int]:
    uid, gid = (first + 71 for first in lowest_ids(tree))
    shell(f"/proc/{tree.pid}/ns/net", DEVICES.format(uid=uid, gid=gid))
    return uid, gid


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_persistent_devices_are_carried(start: Callable[..., Tree], tmp_path: Path, setting: Setting) -> None:
    tree = start("echoing", setting)
    uid, gid = make_devices(tree)
    before = devices(tree)
    data = {device["ifname"]: device.get("linkinfo", {}).get("info_data") for device in before}
    assert (data["tap0"]["user"], data["tap0"]["group"]) == (uid, gid)
    dump(tree, tmp_path / "image")
    restore(tree, tmp_path / "image")
    assert devices(tree) == before
    tree.check()


def test_who_may_attach_moves_with_the_tree(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("echoing", DEPTH_2)
    make_devices(tree)
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--map", "3000000:65536")
    assert done.returncode == 0, said(done)
    data = {device["ifname"]: device.get("linkinfo", {}).get("info_data") for device in devices(tree)}
    assert (data["tap0"]["user"], data["tap0"]["group"]) == (3_001_071, 3_002_071)
    tree.check()


def test_somebody_without_a_place_is_named(start: Callable[..., Tree], tmp_path: Path) -> None:
    """A uid of the host, which no user namespace of the tree maps."""
    tree = start("echoing", DEPTH_1)
    shell(f"/proc/{tree.pid}/ns/net", "ip tuntap add tap0 mode tap user 44")
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--map", "3000000:65536")
    assert done.returncode == 3, said(done)
    assert "its device tap0 is for uid 44 of user namespace 0, who has no place here" in done.stderr
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.parametrize(("queues", "flags"), [("", 0x1002), ("multi_queue", 0x1102)])
def test_a_device_that_somebody_has_attached_to_is_refused(
    start: Callable[..., Tree], tmp_path: Path, queues: str, flags: int
) -> None:
    tree = start("echoing", DEPTH_1)
    network = f"/proc/{tree.pid}/ns/net"
    shell(network, f"ip tuntap add tap0 mode tap {queues}")
    fd = within(network, lambda: os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    try:
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tap0", flags))
        done = engine("dump", "--pid", str(tree.pid), "--to", tmp_path / "image")
        assert done.returncode == 3, said(done)
        assert "a process outside of the tree is attached to its device tap0" in done.stderr
    finally:
        os.close(fd)
    tree.check()
    dump(tree, tmp_path / "image")
