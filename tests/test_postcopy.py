"""Trees that run at the destination before their memory is there, and what becomes of them when something fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import smaps
from tests.harness.hosts import Host, Server, kill_guard, kill_inside, serving, terminate
from tests.harness.running import Running
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, reap, said
from tests.harness.wire import Wire

pytestmark = pytest.mark.root

#: descriptors, mappings, MiB of a sparse mapping, MiB of memory
LARGE = ("0", "20", "0", "48")
#: slow enough that the pages take some seconds
SLOW = 8e6
_DEADLINE_S = 40.0


@contextmanager
def migrating(
    source: Host,
    tree: Tree,
    secret: Path,
    address: str,
    directory: Path,
    *options: str,
    tool: Sequence[str] = ("-m", "pipeline"),
) -> Iterator[Running]:
    events = directory / "events"
    command = [
        *("migrate", "--pid", "5000", "--to", address, "--secret-file", secret, "--mode", "postcopy"),
        *("--json", "--events", events),
        *options,
    ]
    process = subprocess.Popen(
        source.command(sys.executable, *tool, *command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(process, events)
    finally:
        terminate(process)


@contextmanager
def under_way(
    hosts: tuple[Host, Host],
    tree: Tree,
    secret: Path,
    directory: Path,
    bytes_per_s: float,
    limits: dict[int, int] | None = None,
    options: tuple[str, ...] = ("--once",),
) -> Iterator[tuple[Server, Wire, Running]]:
    """A tree that runs at the destination already, over a slow network; `options`: of `serve`."""
    source, destination = hosts
    with (
        serving(destination, secret, *options) as server,
        Wire(server.address, bytes_per_s, limits) as wire,
        migrating(source, tree, secret, wire.address, directory) as migration,
    ):
        migration.wait_for("postcopy")
        yield server, wire, migration


def given_up(migration: Running) -> str:
    """Interrupt a migration whose destination is gone, twice; what it said."""
    for _ in range(2):
        assert migration.process.poll() is None
        kill_inside(migration.process, signal.SIGINT)
        time.sleep(0.3)
    _, err = migration.process.communicate(timeout=20)
    assert migration.process.returncode == 4, err
    assert "pages were missing" in err
    return str(err)


def assert_gone(destination: Host) -> None:
    """The tree is not at the destination any more."""
    until = time.monotonic() + _DEADLINE_S
    while time.monotonic() < until:
        try:
            pid = destination.outer_pid(5000)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the tree is still there")


def assert_whole(tree: Tree, destination: Host, family: list[int]) -> None:
    """It is at the destination only, right, and nobody watches its memory any more."""
    assert not reap(family), "the source still runs"
    tree.pid = destination.outer_pid(5000)
    tree.check()
    for pid in tree.pids():
        assert not any("um" in mapping.flags for mapping in smaps.smaps(HostPid(pid)))


@pytest.fixture
def large(hosts: tuple[Host, Host], start_on: Callable[..., Tree]) -> Tree:
    """A tree with much memory, at the source."""
    return start_on(hosts[0], "large", DEPTH_2, LARGE)


def test_a_tree_waits_while_the_network_is_gone(
    hosts: tuple[Host, Host], secret: Path, large: Tree, tmp_path: Path
) -> None:
    source, destination = hosts
    family = large.pids()
    with serving(destination, secret, "--once") as server, Wire(server.address, SLOW) as wire:
        with migrating(source, large, secret, wire.address, tmp_path) as migration:
            for _ in range(2):
                before = migration.phases().count("postcopy")
                until = time.monotonic() + _DEADLINE_S
                while migration.phases().count("postcopy") <= before and time.monotonic() < until:
                    time.sleep(0.02)
                time.sleep(0.5)
                wire.cut()
                migration.wait_for("postcopy-paused")
                assert not reap(family), "the source still runs"
                assert destination.outer_pid(5000)
                wire.mend()
            wire.bytes_per_s = 1e9
            figures = migration.ends_well()
        server.has_served()
    assert figures["postcopy-bytes"] >= 40 << 20
    assert_whole(large, destination, family)


def test_the_destination_builds_before_a_tree_stands_still(
    hosts: tuple[Host, Host], secret: Path, large: Tree, tmp_path: Path
) -> None:
    """By a draft, without the pages that come later."""
    source, destination = hosts
    family = large.pids()
    with serving(destination, secret, "--once") as server:
        with migrating(source, large, secret, server.address, tmp_path) as migration:
            figures = migration.ends_well()
        server.has_served()
    phases = migration.phases()
    assert phases.index("draft") < phases.index("freeze") < phases.index("postcopy")
    assert figures["dirty-sync-count"] == 1
    assert figures["postcopy-bytes"] >= 40 << 20
    assert figures["page-bytes"] < 8 << 20
    assert_whole(large, destination, family)


def test_mappings_change_while_their_pages_are_missing(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    """Memory that nobody has touched before is moved, dropped, unmapped and seen by a child."""
    source, destination = hosts
    tree = start_on(source, "lagging", DEPTH_2)
    family = tree.pids()
    with under_way(hosts, tree, secret, tmp_path, SLOW / 4) as (server, _, migration):
        tree.pid = destination.outer_pid(5000)
        tree.check()
        migration.ends_well()
        server.has_served()
    assert_whole(tree, destination, family)


def test_a_connection_that_somebody_waits_on_breaks(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    """The other one does not; what was on its way is sent once more."""
    source, destination = hosts
    tree = start_on(source, "lagging", DEPTH_1)
    family = tree.pids()
    lossy = dict.fromkeys((1, 2, 3), 100000)
    with under_way(hosts, tree, secret, tmp_path, SLOW / 4, lossy) as (server, _, migration):
        tree.pid = destination.outer_pid(5000)
        tree.check()
        migration.ends_well()
        assert "postcopy-paused" not in migration.phases()
        server.has_served()
    assert_whole(tree, destination, family)


def test_a_program_that_changes_its_mappings_while_pages_are_missing(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    """It moves, drops, unmaps and maps memory, and forks, for as long as the network takes; once that is cut, too."""
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_2, ("forks",))
    family = tree.pids()
    with under_way(hosts, tree, secret, tmp_path, SLOW) as (server, wire, migration):
        time.sleep(1)
        wire.cut()
        migration.wait_for("postcopy-paused")
        wire.mend()
        figures = migration.ends_well()
        server.has_served()
    assert figures["postcopy-requests"] > 0
    assert_whole(tree, destination, family)


def test_a_server_that_is_interrupted_waits_for_missing_pages(
    hosts: tuple[Host, Host], secret: Path, large: Tree, tmp_path: Path
) -> None:
    _, destination = hosts
    family = large.pids()
    with under_way(hosts, large, secret, tmp_path, SLOW, options=()) as (server, wire, migration):
        kill_inside(server.process, signal.SIGINT)
        wire.cut()
        migration.wait_for("postcopy-paused")
        wire.mend()
        migration.ends_well()
        _, err = server.process.communicate(timeout=20)
        assert "waiting for missing pages of the tree of pid 5000" in err
        assert server.process.returncode == 130
    assert_whole(large, destination, family)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_tree_is_ended_rather_than_shown_zeros(
    hosts: tuple[Host, Host], secret: Path, large: Tree, tmp_path: Path, number: signal.Signals
) -> None:
    """Nobody brings the pages any more."""
    _, destination = hosts
    with under_way(hosts, large, secret, tmp_path, SLOW, options=()) as (server, _, migration):
        kill_inside(server.process, number)
        if number == signal.SIGINT:  # it waits, until it is told once more
            time.sleep(0.5)
            assert server.process.poll() is None
            kill_inside(server.process, number)
        assert_gone(destination)
        if number == signal.SIGINT:
            assert "pages of it were missing" in server.process.communicate(timeout=20)[1]
        assert "the destination cannot be reached" in given_up(migration)


@pytest.mark.parametrize(
    ("to_guard", "to_server"),
    [(signal.SIGTERM, signal.SIGKILL), (signal.SIGKILL, signal.SIGINT)],
    ids=["pkill", "guard first"],
)
def test_a_tree_is_ended_whoever_was_killed_of_those_who_bring_its_pages(
    hosts: tuple[Host, Host],
    secret: Path,
    large: Tree,
    tmp_path: Path,
    to_guard: signal.Signals,
    to_server: signal.Signals,
) -> None:
    _, destination = hosts
    with under_way(hosts, large, secret, tmp_path, SLOW, options=()) as (server, _, migration):
        kill_guard(server, to_guard)
        time.sleep(0.2)
        if to_guard == signal.SIGTERM:
            kill_guard(server, 0)  # it is still there
        assert destination.outer_pid(5000)
        for _ in range(1 if to_server == signal.SIGKILL else 2):
            assert server.process.poll() is None
            kill_inside(server.process, to_server)
            time.sleep(0.5)
        assert_gone(destination)
        given_up(migration)


def test_a_source_that_is_killed_leaves_a_tree_that_waits(
    hosts: tuple[Host, Host], secret: Path, large: Tree, tmp_path: Path
) -> None:
    _, destination = hosts
    family = large.pids()
    with under_way(hosts, large, secret, tmp_path, SLOW, options=()) as (server, _, migration):
        kill_inside(migration.process, signal.SIGKILL)
        migration.process.wait(_DEADLINE_S)
        assert not reap(family), "the source still runs"
        time.sleep(0.5)
        assert destination.outer_pid(5000)
        refused = destination.engine("dump", "--pid", "5000", "--to", tmp_path / "image")
        assert refused.returncode == 3, said(refused)
        assert "userfaultfd" in refused.stderr
        kill_inside(server.process, signal.SIGTERM)
        time.sleep(0.5)
        assert destination.outer_pid(5000), "it waits on, until it is told once more"


def test_a_host_that_cannot_answer_page_faults_refuses(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    source, destination = hosts
    tree = start_on(source, "anonymous", DEPTH_1)
    assert destination.run("mount", "--bind", "/dev/null", "/dev/userfaultfd").returncode == 0
    try:
        with serving(destination, secret) as server:
            options = ("--to", server.address, "--secret-file", str(secret), "--mode", "postcopy")
            done = source.engine("migrate", "--pid", "5000", *options)
    finally:
        assert destination.run("umount", "/dev/userfaultfd").returncode == 0
    assert done.returncode == 1, said(done)
    assert "page faults of programs cannot be answered here" in done.stderr
    tree.check()


@pytest.mark.parametrize("options", [("--mode", "hybrid"), ("--mode", "precopy", "--on-timeout", "postcopy")])
def test_what_is_left_after_the_rounds_comes_later(
    hosts: tuple[Host, Host],
    secret: Path,
    start_on: Callable[..., Tree],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret, "--once") as server:
        options = (*options, "--max-downtime", "1us", "--max-rounds", "3")
        with migrating(source, tree, secret, server.address, tmp_path, *options) as migration:
            figures = migration.ends_well()
        server.has_served()
    assert figures["dirty-sync-count"] >= 1
    assert figures["postcopy-bytes"] > 0
    assert_whole(tree, destination, family)


#: what has changed of a tree cannot be told in the end: it is sent whole
_LOST = """
import sys
from pipeline.cli.main import main
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.stages.live_memory import LiveMemory

def finish(*_):
    raise TrackingLost("nobody knows")

LiveMemory.finish = finish
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda setting: setting.name)
def test_pages_of_a_tree_that_is_sent_whole_come_later_too(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    source, destination = hosts
    tree = start_on(source, "anonymous", setting)
    family = tree.pids()
    with serving(destination, secret, "--once") as server:
        with migrating(source, tree, secret, server.address, tmp_path, tool=("-c", _LOST)) as migration:
            assert migration.ends_well()["postcopy-bytes"] > 0
        server.has_served()
    assert_whole(tree, destination, family)


def test_what_does_not_come_later_needs_nobody(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    """Rounds that end in time, although more was allowed."""
    source, destination = hosts
    tree = start_on(source, "anonymous", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret, "--once") as server:
        options = ("--mode", "precopy", "--on-timeout", "postcopy")
        with migrating(source, tree, secret, server.address, tmp_path, *options) as migration:
            assert migration.ends_well()["postcopy-bytes"] == 0
        server.has_served()
    assert_whole(tree, destination, family)
