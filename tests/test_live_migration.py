"""Trees that are sent while they run: every test program, right inside and in /proc, and sent as far as can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import smaps
from tests.harness.hosts import Host, migrate, terminate
from tests.harness.settings import CONTAINER_2, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop, children_of, said
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


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts for all, one after the other."""
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(Host())
            stack.callback(found[-1].close)
        yield found[0], found[1]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text("a secret that is long enough for both sides\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("setting", [DEPTH_1, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", [name for name in NAMES if name not in _HAVE_WHAT_ONE_CAN_HAVE])
def test_state_is_carried_live(
    hosts: tuple[Host, Host],
    secret: Path,
    nothing_left_behind: None,
    workshop: Workshop,
    program: str,
    setting: Setting,
) -> None:
    source, destination = hosts
    tree = source.start(workshop, program, setting, 5000)
    try:
        result = migrate(source, destination, tree, secret, "--mode", "precopy")
        assert not result["notes"] or program in _CHANGE
        tree.check()
    finally:
        tree.kill()


@pytest.mark.parametrize("arguments", [(), ("forks",)], ids=["alone", "forks"])
def test_no_page_is_ever_wrong(
    hosts: tuple[Host, Host],
    secret: Path,
    nothing_left_behind: None,
    workshop: Workshop,
    arguments: tuple[str, ...],
) -> None:
    """There and back again, while threads write, drop, move, unmap and map their memory."""
    source, destination = hosts
    tree = source.start(workshop, "rewriting", DEPTH_2, 5000, arguments)
    try:
        for _ in range(TIMES):
            migrate(source, destination, tree, secret, "--mode", "precopy", compare=False)
            tree.check()
            source, destination = destination, source
    finally:
        tree.kill()


def assert_untouched(tree: Tree) -> None:
    """It runs, is right, and nothing is left in it of whoever has watched it."""
    tree.check()
    for pid in tree.pids():
        assert not any("uw" in mapping.flags for mapping in smaps.smaps(HostPid(pid)))
        assert not [link for link in Path(f"/proc/{pid}/fd").iterdir() if "userfaultfd" in os.readlink(link)]


@contextmanager
def serving(host: Host, secret: Path) -> Iterator[str]:
    """Where a `serve` listens in a host."""
    server = subprocess.Popen(
        host.command(
            sys.executable, "-m", "pipeline", "serve", "--listen", "127.0.0.1:0", "--secret-file", secret
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("listening on ")
        yield line.split()[-1]
    finally:
        terminate(server)


def test_a_tree_that_cannot_be_kept_up_with_stays_if_that_is_wished(
    hosts: tuple[Host, Host], secret: Path, nothing_left_behind: None, workshop: Workshop
) -> None:
    source, destination = hosts
    tree = source.start(workshop, "rewriting", DEPTH_1, 5000)
    try:
        with serving(destination, secret) as to:
            command = ["migrate", "--pid", "5000", "--to", to, "--secret-file", secret, "--mode", "precopy"]
            done = source.engine(*command, "--max-downtime", "1us", "--on-timeout", "cancel")
            assert done.returncode == 1, said(done)
            assert "writes faster than it can be sent" in done.stderr
            assert_untouched(tree)
    finally:
        tree.kill()


@pytest.mark.parametrize("after_s", [0.2, 0.5, 1.0])
def test_an_interrupt_leaves_the_tree_as_it_was(
    hosts: tuple[Host, Host], secret: Path, nothing_left_behind: None, workshop: Workshop, after_s: float
) -> None:
    source, destination = hosts
    tree = source.start(workshop, "rewriting", DEPTH_1, 5000)
    try:
        with serving(destination, secret) as to:
            command = [
                "migrate",
                "--pid",
                "5000",
                "--to",
                to,
                "--secret-file",
                str(secret),
                "--mode",
                "precopy",
            ]
            running = subprocess.Popen(
                source.command(sys.executable, "-m", "pipeline", *command, "--max-downtime", "1us", *ENDLESS),
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
    finally:
        tree.kill()


def test_processes_come_and_go_meanwhile(
    hosts: tuple[Host, Host], secret: Path, nothing_left_behind: None, workshop: Workshop
) -> None:
    source, destination = hosts
    tree = source.start(workshop, "forking", DEPTH_1, 5000)
    try:
        migrate(source, destination, tree, secret, "--mode", "precopy", compare=False)
        tree.check()
    finally:
        tree.kill()
