"""Open /dev/net/tun, attached to a device of a network of the tree."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.carry import carry
from tests.harness.networks import engine_in, network, shell, start_in, within
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, engine, said

pytestmark = pytest.mark.root

_TUN, _TAP, _MULTI_QUEUE, _NO_PI, _VNET_HDR = 1, 2, 0x100, 0x1000, 0x4000
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOFFLOAD, _TUNSETSNDBUF = 0x400454CA, 0x400454CB, 0x400454D0, 0x400454D4


def network_of(tree: Tree) -> str:
    return f"/proc/{tree.pids()[-1]}/ns/net"


def attached(where: str, flags: int) -> int:
    """A descriptor of a new device `tun0` of a network."""
    fd = within(where, lambda: os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    if flags:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"tun0", flags))
    return fd


def give(tree: Tree, fd: int) -> None:
    """Give the tree a descriptor, which is then its alone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tree.directory / "give"))
        socket.send_fds(sock, [b"x"], [fd])
        os.close(fd)
        assert sock.recv(1) == b""  # it has it


def answers(where: str) -> bool:
    """Whether a datagram into the tunnel comes back."""

    def ask() -> bool:
        deadline = time.monotonic() + 60
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.3)
            while time.monotonic() < deadline:
                try:
                    sock.sendto(b"there and back", ("10.6.0.2", 7))
                    return sock.recvfrom(100) == (b"there and back", ("10.6.0.2", 7))
                except OSError:
                    time.sleep(0.05)
        return False

    return within(where, ask)


def device(where: str) -> dict[str, Any]:
    (found,) = json.loads(shell(where, "ip -j -d link show tun0"))
    return {name: found[name] for name in ("ifindex", "linkinfo", "mtu", "flags")}


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("flags", "persistent"), [(_TUN | _NO_PI, 0), (_TUN | _NO_PI | _MULTI_QUEUE, 1)], ids=["plain", "queues"]
)
def test_a_tunnel_goes_on(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, flags: int, persistent: int
) -> None:
    tree = start("tunnel", setting)
    fd = attached(network_of(tree), flags)
    fcntl.ioctl(fd, _TUNSETPERSIST, persistent)
    fcntl.ioctl(fd, _TUNSETSNDBUF, struct.pack("i", 123_456))
    give(tree, fd)
    shell(network_of(tree), "ip addr add 10.6.0.1/24 dev tun0 && ip link set tun0 mtu 1380 up")
    assert answers(network_of(tree))
    before = device(network_of(tree))
    assert before["linkinfo"]["info_data"]["persist"] == bool(persistent)
    for name in ("first", "second"):
        carry(tree, tmp_path / name)
        assert answers(network_of(tree))
        assert device(network_of(tree)) == before
    tree.check()


def test_a_descriptor_without_a_device_is_carried(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("tunnel", DEPTH_1)
    give(tree, attached(network_of(tree), 0))
    carry(tree, tmp_path / "image")


def test_a_device_of_the_surroundings_is_refused(start: Callable[..., Tree], tmp_path: Path) -> None:
    with network() as around:
        tree = start_in(around, start, "tunnel", DEPTH_1)
        give(tree, attached(around, _TUN | _NO_PI))
        done = engine_in(around, "dump", "--pid", str(tree.pid), "--to", tmp_path / "image")
        assert done.returncode == 3, said(done)
        assert "a tun device of a network that is not the tree's" in done.stderr
        tree.check()


def test_offloads_are_refused(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("tunnel", DEPTH_1)
    fd = attached(network_of(tree), _TUN | _NO_PI | _VNET_HDR)
    fcntl.ioctl(fd, _TUNSETOFFLOAD, 1)
    give(tree, fd)
    done = engine("dump", "--pid", str(tree.pid), "--to", tmp_path / "image")
    assert done.returncode == 3, said(done)
    assert "offloads (checksums) of its device tun0 are on" in done.stderr
    tree.check()
