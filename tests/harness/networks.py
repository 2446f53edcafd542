"""Networks of hosts, made for a test: what stands around a tree, apart from the network of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.kernel.syscalls import CLONE, setns
from tests.harness.settings import Setting
from tests.harness.tree import ROOT, Tree

T = TypeVar("T")

#: a tree's device, and the addresses of the bridge around it and of the device
MAC = "02:00:00:00:00:55"
OURS, THEIRS = "10.8.0.1", "10.8.0.2"
OURS_6, THEIRS_6 = "2001:db8:8::1", "2001:db8:8::2"


@contextmanager
def network() -> Iterator[str]:
    """A network with a loopback that is up; the path of its namespace file."""
    told, tell = os.pipe()
    script = "/usr/sbin/ip link set lo up && echo && exec sleep 1000"
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=tell, close_fds=True
    )
    os.close(tell)
    try:
        assert os.read(told, 1) == b"\n"
        yield f"/proc/{keeper.pid}/ns/net"
    finally:
        os.close(told)
        keeper.send_signal(signal.SIGKILL)
        keeper.wait()


@contextmanager
def bridged_network() -> Iterator[str]:
    """A network with a bridge `br0` that has the addresses `OURS`."""
    with network() as path:
        shell(
            path,
            # without an address of its own a bridge has that of a port, and another one when that port goes
            f"ip link add br0 address 02:00:00:00:00:01 type bridge && ip addr add {OURS}/24 dev br0 && "
            f"ip addr add {OURS_6}/64 dev br0 nodad && ip link set br0 up",
        )
        yield path


def plug(around: str, tree: Tree, outer: str = "out1") -> None:
    """Give the tree a device eth0 whose other end is under `br0`."""
    inside = f"/proc/{tree.pids()[-1]}/ns/net"
    pair = f"type veth peer name {outer} netns {around.split('/')[2]}"
    shell(inside, f"ip link add name eth0 index 33 address {MAC} mtu 1400 {pair}")
    shell(around, f"ip link set {outer} master br0 up")
    shell(
        inside,
        f"ip link set lo up && ip addr add {THEIRS}/24 dev eth0 && ip addr add {THEIRS_6}/64 dev eth0 nodad && "
        f"ip link set eth0 up && ip route add default via {OURS}",
    )


def within(path: str, act: Callable[[], T]) -> T:
    """Do something in a network: a thread goes there."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                setns(fd, CLONE.NEWNET)
            finally:
                os.close(fd)
            found.append(act())
        except BaseException as error:  # noqa: BLE001 (raised again by who waits)
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def start_in(path: str, start: Callable[..., Tree], program: str, setting: Setting) -> Tree:
    """Start a program in a network."""
    return within(path, lambda: start(program, setting))


def shell(path: str, script: str) -> str:
    """What a shell says that runs a script in a network; AssertionError if a command of it fails."""
    done = subprocess.run(
        ["nsenter", f"--net={path}", "sh", "-ec", script],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout


def engine_in(path: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ARGUMENTS` in a network, with its output."""
    return subprocess.run(
        ["nsenter", f"--net={path}", sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
