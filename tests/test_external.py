"""A tree in a network that somebody else keeps: external at the dump, another one takes its place at the restore."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.kernel.syscalls import CLONE, setns
from tests.harness.settings import DEPTH_0, DEPTH_1, Setting
from tests.harness.tree import Tree, engine, reap, said

pytestmark = pytest.mark.root


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


def start_in(path: str, start: Callable[..., Tree], setting: Setting) -> Tree:
    """Start a program in a network: a thread goes there and starts it."""
    found: list[Tree] = []

    def run() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            setns(fd, CLONE.NEWNET)
        finally:
            os.close(fd)
        found.append(start("sockets", setting))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1], ids=lambda s: s.name)
def test_a_network_of_others_is_given_on_both_sides(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    with ExitStack() as stack:
        here, there = (stack.enter_context(network()) for _ in range(2))
        tree = start_in(here, start, setting)
        tree.check()
        family = tree.pids()
        image, pidfile = tmp_path / "image", tmp_path / "pid"
        done = engine("dump", "--pid", str(tree.pid), "--to", image, "--external", f"net={here}")
        assert done.returncode == 0, said(done)
        assert not reap(family)
        options = ["--detach", "--pidfile", pidfile, "--external", f"net={there}"]
        done = engine("restore", "--from", image, *options)
        assert done.returncode == 0, said(done)
        for pid in tree.pids():
            assert os.path.samefile(f"/proc/{pid}/ns/net", there)
        tree.check()
        tree.end()


def test_what_is_no_namespace_is_said(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet")
    for external, words in (
        ("net", "say KIND=PATH"),
        ("mnt=/proc/self/ns/mnt", "say KIND=PATH"),
        ("net=/proc/self/ns/uts", "no net namespace"),
        ("net=/dev/null", "net=/dev/null"),
        ("net=/nowhere", "No such file"),
    ):
        done = engine("dump", "--pid", str(tree.pid), "--to", tmp_path / "image", "--external", external)
        assert done.returncode == 2, said(done)
        assert words in done.stderr
    tree.check()
