"""Trees that are sent while they run: every test program, right inside and in /proc, and sent as far as can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import smaps
from tests.harness.hosts import Host, Server, migrate, serving
from tests.harness.settings import CONTAINER_2, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, children_of, said
from tests.test_carried_states import NAMES

pytestmark = pytest.mark.root

#: both hosts share files, the network and terminals: what only one can have is in the way of any migration here
_HAVE_WHAT_ONE_CAN_HAVE = {
    "pipes",
    "connections",
    "datagrams",
    "file_states",
    "socket_places",
    "sockets",
    "terminal",
    "watching",
    "namespaced",
}
#: migrations of a program that never rests
TIMES = 6
#: rounds without an end that counts
ENDLESS = ("--max-rounds", "1000")
#: they change their namespaces, or what these hold, between two looks
_CHANGE = {"mounted", "sysv", "firewalled"}


@pytest.mark.parametrize("setting", [DEPTH_1, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", [name for name in NAMES if name not in _HAVE_WHAT_ONE_CAN_HAVE])
def test_state_is_carried_live(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], program: str, setting: Setting
) -> None:
    source, destination = hosts
    tree = start_on(source, program, setting)
    result = migrate(source, destination, tree, secret, "--mode", "precopy")
    assert not result["notes"] or program in _CHANGE
    tree.check()


@pytest.mark.parametrize("arguments", [(), ("forks",)], ids=["alone", "forks"])
def test_no_page_is_ever_wrong(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], arguments: tuple[str, ...]
) -> None:
    """There and back again, while threads write, drop, move, unmap and map their memory."""
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_2, arguments)
    for _ in range(TIMES):
        migrate(source, destination, tree, secret, "--mode", "precopy", compare=False)
        tree.check()
        source, destination = destination, source


def assert_untouched(tree: Tree) -> None:
    """It runs, is right, and nothing is left in it of whoever has watched it."""
    tree.check()
    for pid in tree.pids():
        assert not any("uw" in mapping.flags for mapping in smaps.smaps(HostPid(pid)))
        assert not [link for link in Path(f"/proc/{pid}/fd").iterdir() if "userfaultfd" in os.readlink(link)]


def precopy(server: Server, secret: Path) -> list[str]:
    """Arguments that send the tree of `start_on` to a server while it runs."""
    return [
        *("migrate", "--pid", "5000", "--to", server.address, "--secret-file", str(secret)),
        *("--mode", "precopy"),
    ]


def test_a_tree_that_cannot_be_kept_up_with_stays_if_that_is_wished(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_1)
    with serving(destination, secret) as server:
        options = ("--max-downtime", "1us", "--on-timeout", "cancel")
        done = source.engine(*precopy(server, secret), *options)
        assert done.returncode == 1, said(done)
        assert "writes faster than it can be sent" in done.stderr
        assert_untouched(tree)


@pytest.mark.parametrize("after_s", [0.2, 0.5, 1.0])
def test_an_interrupt_leaves_the_tree_as_it_was(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], after_s: float
) -> None:
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_1)
    with serving(destination, secret) as server:
        command = source.command(sys.executable, "-m", "pipeline", *precopy(server, secret))
        running = subprocess.Popen(
            [*command, "--max-downtime", "1us", *ENDLESS],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(after_s)
        for child in children_of(running.pid):
            os.kill(child, signal.SIGINT)
        _, err = running.communicate(timeout=20)
        if running.returncode:
            assert running.returncode in (130, -signal.SIGINT), err
            assert_untouched(tree)
        else:  # it was past the decision
            tree.pid = destination.outer_pid(5000)
            tree.check()


def test_processes_come_and_go_meanwhile(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    source, destination = hosts
    tree = start_on(source, "forking", DEPTH_1)
    migrate(source, destination, tree, secret, "--mode", "precopy", compare=False)
    tree.check()
