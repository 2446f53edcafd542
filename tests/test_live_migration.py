"""Trees that are sent while they run: every test program, right inside and in /proc, and sent as far as can be."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import events
from pipeline.ids import HostPid
from pipeline.kernel import procfs, smaps, userfaultfd
from pipeline.kernel.syscalls import pidfd_getfd
from tests.harness import firsts
from tests.harness.building import BUILT, GO_ON
from tests.harness.hosts import Host, Server, assert_same_tree, inner_pid, migrate, serving
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.telling_late import LATE_S
from tests.harness.tree import PATIENCE_S, Tree, children_of, reap, said
from tests.harness.valve import Valve
from tests.test_carried_states import KINDS_OF_MEMORY, NAMES

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
MODES = ["precopy", "postcopy", "hybrid"]
#: migrations of a program that never rests
TIMES = 6
#: rounds without an end that counts
ENDLESS = ("--max-rounds", "1000")
#: they change their namespaces, or what these hold, between two looks
_CHANGE = {"mounted", "sysv", "firewalled"}
#: is told not to be tracked
_UNTRACKED = {"answering", "asleep"}


def _moves() -> Iterator[tuple[str, str, Setting]]:
    """Each program in each mode; in rounds, kinds of memory in each setting, the others in one after the other."""
    turns = itertools.cycle([DEPTH_0, DEPTH_1, CONTAINER_2])
    for program in NAMES:
        if program in _HAVE_WHAT_ONE_CAN_HAVE:
            continue
        for setting in itertools.islice(turns, 3 if program in KINDS_OF_MEMORY else 1):
            yield program, "precopy", setting
        yield program, "postcopy", CONTAINER_2
        yield program, "hybrid", DEPTH_2


@pytest.mark.parametrize(
    ("program", "mode", "setting"), list(_moves()), ids=lambda one: one if isinstance(one, str) else one.name
)
def test_state_is_carried_live(
    hosts: tuple[Host, Host],
    secret: Path,
    start_on: Callable[..., Tree],
    program: str,
    mode: str,
    setting: Setting,
) -> None:
    source, destination = hosts
    tree = start_on(source, program, setting)
    result = migrate(source, destination, tree, secret, "--mode", mode)
    remarks = [one for one in result["notes"] if "answers page faults by userfaultfd itself" in one]
    assert bool(remarks) == (program in _UNTRACKED)
    assert result["notes"] == remarks or program in _CHANGE
    tree.check()


@contextmanager
def _built_meanwhile(
    hosts: tuple[Host, Host], secret: Path, tree: Tree, directory: Path, mode: str
) -> Iterator[None]:
    """Behind the block `tree` goes on at the destination; in it that has built the draft, and the tree runs."""
    source, destination = hosts
    family = tree.pids()
    with serving(destination, secret, "--once", tool=("tests.harness.building", str(directory))) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        command = source.command(sys.executable, "-m", "pipeline", "migrate", "--pid", "5000", *options)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                tree.wait_for(directory / BUILT)
                yield
            finally:
                (directory / GO_ON).touch()
                _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        server.has_served()
    assert not reap(family)
    tree.pid = destination.outer_pid(5000)


def test_the_downtime_is_over_when_the_tree_runs(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    """However long it takes to tell that."""
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    result = migrate(source, destination, tree, secret, tool=("tests.harness.telling_late",))
    figures = result["figures"]
    assert figures["total-time"] > figures["downtime"] + 1e3 * LATE_S
    assert figures["thaw-time"] > 0
    tree.check()


@pytest.mark.parametrize("mode", MODES)
def test_a_tree_does_not_stand_still_for_the_draft(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path, mode: str
) -> None:
    """Who builds it takes a second longer than there is to send; in that the tree runs."""
    tree = start_on(hosts[0], "anonymous", DEPTH_1)
    family = tree.pids()
    tracers = []
    with _built_meanwhile(hosts, secret, tree, tmp_path, mode):
        for _ in range(100):
            tracers += [procfs.status(HostPid(pid)).tracer_pid for pid in family]
            time.sleep(0.01)
    assert not any(tracers), "it was stopped before it was awaited there"
    tree.check()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda one: one.name)
@pytest.mark.parametrize("leads", [False, True], ids=["stays", "leads"])
@pytest.mark.parametrize("mode", MODES)
def test_threads_come_and_go_behind_the_draft(
    hosts: tuple[Host, Host],
    secret: Path,
    start_on: Callable[..., Tree],
    tmp_path: Path,
    mode: str,
    setting: Setting,
    leads: bool,
) -> None:
    """Those that it has in the draft are made before it stands still, but for one with a directory of its own.

    A child that `leads` a process group by then is ended there, and born anew with threads of the same numbers.
    """
    tree = start_on(hosts[0], "relays", setting)
    before = procfs.tasks(HostPid(tree.pid))
    with _built_meanwhile(hosts, secret, tree, tmp_path, mode):
        made = procfs.tasks(HostPid(hosts[1].outer_pid(5000)))
        for what in ("change", "lead") if leads else ("change",):
            (tree.directory / what).touch()
            tree.wait_for(tree.directory / f"{what}-done")
    assert len(made) == len(before) - 1
    tree.check()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_imported_where_a_tree_comes_to_rest(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], mode: str
) -> None:
    """Nor evaluated, in a `serve` that takes its first tree."""
    source, destination = hosts
    tree = start_on(source, "files", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret, "--once", tool=("tests.harness.firsts",)) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        done = source.engine("migrate", "--pid", str(inner_pid(tree.pid)), *options)
        assert done.returncode == 0, said(done)
        out, _ = server.has_served()
    assert firsts.NONE in out
    assert not reap(family)
    tree.pid = destination.outer_pid(5000)
    tree.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [(), ("forks",), ("huge",)], ids=["alone", "forks", "huge"])
def test_no_page_is_ever_wrong(
    hosts: tuple[Host, Host],
    secret: Path,
    start_on: Callable[..., Tree],
    arguments: tuple[str, ...],
    mode: str,
) -> None:
    """There and back again, while threads write, drop, move, unmap and map their memory."""
    source, destination = hosts
    tree = start_on(source, "rewriting", DEPTH_2, arguments)
    for _ in range(TIMES):
        migrate(source, destination, tree, secret, "--mode", mode, compare=False)
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
        wait_until("it is started", lambda: bool(children_of(running.pid)))
        time.sleep(after_s)
        for child in children_of(running.pid):
            os.kill(child, signal.SIGINT)
        _, err = running.communicate(timeout=PATIENCE_S)
        if running.returncode:
            assert running.returncode in (130, -signal.SIGINT), err
            assert_untouched(tree)
        else:  # it was past the decision
            tree.pid = destination.outer_pid(5000)
            tree.check()


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_tree_that_has_changed_when_its_draft_is_built_is_sent_anew(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path, mode: str
) -> None:
    """Each time a working directory is gone; in the end it stands still for it, where pages do not come later."""
    source, destination = hosts
    tree = start_on(source, "wandering", DEPTH_1)
    log = tmp_path / "events"
    with serving(destination, secret, "--once") as server:
        arguments = precopy(server, secret)
        arguments[arguments.index("precopy")] = mode
        done = source.engine(*arguments, "--json", "--events", log)
        told = [event for line in log.read_text().splitlines() if (event := events.parse(line))]
        phases = [event.name for event in told if isinstance(event, events.Phase)]
        if mode == "precopy":
            assert done.returncode == 0, said(done)
            notes = json.loads(done.stdout)["notes"]
            assert ["sent anew" in note and "working directory" in note for note in notes] == [True] * 2
            assert phases.count("draft") == 2
            server.has_served()
            tree.pid = destination.outer_pid(5000)
        else:
            assert done.returncode == 1, said(done)
            assert "is not here" in said(done)
            assert phases.count("draft") == 3
            assert "freeze" not in phases
    tree.check()


def test_what_is_refused_twice_for_the_same_reason_is_refused(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], tmp_path: Path
) -> None:
    """And has not stood still for it."""
    source, destination = hosts
    tree = start_on(source, "quiet", DEPTH_1)
    log = tmp_path / "events"
    with serving(destination, secret, "--map", "200000:1") as server:
        done = source.engine(*precopy(server, secret), "--events", log)
        told = [event for line in log.read_text().splitlines() if (event := events.parse(line))]
    phases = [event.name for event in told if isinstance(event, events.Phase)]
    assert done.returncode == 1, said(done)
    assert phases.count("draft") == 2
    assert "freeze" not in phases
    assert_untouched(tree)


#: MiB of the process whose pages are sent before those of its child; more than all buffers on the way hold
MUCH = 96


@contextmanager
def migration_on_its_way(
    source: Host, server: Server, secret: Path, tree: Tree, mode: str = "precopy"
) -> Iterator[tuple[subprocess.Popen[str], Valve]]:
    """A migration that sends its draft, and has read nothing yet of the last process of the tree."""
    with Valve(server.address, 1 << 20) as valve:
        arguments = precopy(server, secret)
        arguments[arguments.index(server.address)] = valve.address
        arguments[arguments.index("precopy")] = mode
        with subprocess.Popen(
            source.command(sys.executable, "-m", "pipeline", *arguments, "--progress", "json", "--json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            try:
                valve.wait_until_shut()
                yield running, valve
            finally:
                for child in children_of(running.pid):
                    os.kill(child, signal.SIGTERM)


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def has_become(pid: int, word: str) -> bool:
    """What `changing` says: it is a zombie, or another program."""
    if word == "leave":
        return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0] == "Z"
    return Path(f"/proc/{pid}/comm").read_text() == "sleep\n"


@contextmanager
def meanwhile(
    source: Host, destination: Host, secret: Path, tree: Tree, mode: str = "precopy"
) -> Iterator[None]:
    """What is done in the block is done while the draft of a tree is sent; then the tree arrives, by this one draft."""
    family = set(tree.pids())
    with (
        serving(destination, secret, "--once") as server,
        migration_on_its_way(source, server, secret, tree, mode) as (running, valve),
    ):
        yield
        family |= set(tree.pids())
        valve.open()
        out, err = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 0, err
        server.has_served()
    assert not reap(sorted(family)), "the source still runs"
    tree.pid = destination.outer_pid(5000)
    assert json.loads(out)["notes"] == []
    told = [event for line in err.splitlines() if (event := events.parse(line))]
    assert [event.name for event in told if isinstance(event, events.Phase)].count("draft") == 1


@pytest.mark.parametrize("word", ["leave", "execute"])
def test_a_process_becomes_another_while_its_draft_is_sent(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], word: str
) -> None:
    """The draft is mended in the end: by a process that has ended, or one of another program."""
    tree = start_on(hosts[0], "changing", DEPTH_1, [str(MUCH)])
    child = tree.pids()[-1]
    with meanwhile(*hosts, secret, tree):
        (tree.directory / word).touch()
        wait_until(word, lambda: has_become(child, word))
    tree.check()


@pytest.mark.parametrize("mode", ["precopy", "hybrid"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda one: one.name)
def test_a_family_changes_while_its_draft_is_sent(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], setting: Setting, mode: str
) -> None:
    """Who has ended, is ended at the destination; who was born, or became another one, is born there in the end."""
    source, destination = hosts
    tree = start_on(source, "budding", setting, [str(MUCH)])
    with meanwhile(source, destination, secret, tree, mode):
        (tree.directory / "change").touch()
        wait_until("changed", (tree.directory / "changed").exists)
        tree.roles += ["gardener", "bud", "budlet"]
        before = {
            key: [line.replace(" uw]", "]") for line in value] if key.endswith(" maps") else value
            for key, value in source.snapshot(5000).items()
        }
    assert_same_tree(before, destination.snapshot(5000), 5000)
    tree.check()


def test_memory_that_somebody_else_begins_to_watch_is_refused_in_the_end(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    """Whoever watches it is not in the tree, so that nothing but the kernel's refusal to watch it, too, tells it."""
    source, destination = hosts
    tree = start_on(source, "changing", DEPTH_1, [str(MUCH)])
    child = tree.pids()[-1]
    with (
        serving(destination, secret) as server,
        migration_on_its_way(source, server, secret, tree) as (running, valve),
    ):
        (tree.directory / "watch").touch()
        wait_until("watching", (tree.directory / "watching").exists)
        process = os.pidfd_open(child)
        watch = pidfd_getfd(process, int((tree.directory / "watching").read_text()))
        try:
            (tree.directory / "taken").touch()
            wait_until("given", (tree.directory / "given").exists)
            valve.open()
            _, err = running.communicate(timeout=PATIENCE_S)
        finally:
            os.close(watch)
            os.close(process)
        assert running.returncode == 3, err
        assert "is watched by a userfaultfd (write protection)" in err
        assert_untouched(tree)


@pytest.mark.parametrize("mode", ["precopy", "hybrid"])
def test_a_process_that_begins_to_watch_its_own_memory_is_carried(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "changing", DEPTH_1, [str(MUCH)])
    with meanwhile(source, destination, secret, tree, mode):
        (tree.directory / "watch").touch()
        wait_until("watching", (tree.directory / "watching").exists)
    tree.check()
    (child,) = children_of(tree.pid)
    number = (tree.directory / "watching").read_text()
    assert os.readlink(f"/proc/{child}/fd/{number}") == userfaultfd.LINK
    assert [mapping for mapping in smaps.smaps(HostPid(child)) if "uw" in mapping.flags]


def test_processes_come_and_go_meanwhile(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    source, destination = hosts
    tree = start_on(source, "forking", DEPTH_1)
    migrate(source, destination, tree, secret, "--mode", "precopy", compare=False)
    tree.check()
