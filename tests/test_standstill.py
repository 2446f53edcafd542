"""What shows only when the tree stands still: waited for if it may go away by itself, refused if not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import pipeline
from pipeline import blocking
from pipeline.errors import Blocker, Refused, StorageError
from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.statfs import Magic
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.remote import tracer
from pipeline.remote.tracer import tracer_thread
from pipeline.resources import identity
from pipeline.resources.memory import objects
from pipeline.resources.tasks.refusals import check_task
from pipeline.stages import capture, ending, freeze
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.capture import Capture
from pipeline.standstill import refuse_early, standstill
from pipeline.transport.storage import DirectoryStorage
from tests.harness import firsts
from tests.harness.settings import DEPTH_1
from tests.harness.tree import PATIENCE_S, ROOT, Tree

pytestmark = pytest.mark.root


def looks_until_still(pid: int, patch: pytest.MonkeyPatch, blocker: Blocker, times: int) -> int:
    """Stop a tree while `blocker` is found the first `times` times; returns how often it was looked at."""
    looks = 0
    take = Capture.take

    def found(capture: Capture, tree: Any) -> Any:
        nonlocal looks
        looks += 1
        return ([], [], [blocker]) if looks <= times else take(capture, tree)

    async def main() -> None:
        async with tracer_thread() as tracer, standstill(tracer, pid) as still:
            assert still.records
            assert still.processes == 1

    patch.setattr(Capture, "take", found)
    trio.run(main)
    return looks


def test_what_goes_away_by_itself_is_looked_at_again(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = start("quiet")
    blocker = Blocker("pid 1", "a connection is being made", "", transient=True)
    assert looks_until_still(tree.pid, monkeypatch, blocker, 2) == 3
    assert not LEDGER.held()
    tree.check()


@pytest.mark.parametrize("stays", [[], ["a mapping", "an open file"]], ids=["is gone", "stays"])
def test_what_seems_to_stop_a_running_tree_is_looked_at_when_it_stands_still(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, stays: list[str]
) -> None:
    """Such as a directory that it makes and removes all the time. If it is there, all is told that stops the tree."""
    tree = start("quiet")
    found = [Blocker("pid 1", reason) for reason in stays]

    def blockers(capture: Capture) -> list[Blocker]:
        assert all(ptrace.is_stopped(pid) for pid in capture.living)
        return found

    monkeypatch.setattr(Capture, "blockers_besides_files", lambda _: [Blocker("pid 1", "a mapping")])
    monkeypatch.setattr(Capture, "blockers", blockers)
    if stays:
        with pytest.raises(Refused) as refused:
            trio.run(refuse_early, tree.pid)
        assert list(refused.value.blockers) == found
    else:
        trio.run(refuse_early, tree.pid)
    assert not LEDGER.held()
    tree.check()


def test_nobody_of_us_is_in_a_network_of_the_tree_when_it_ends(start: Callable[..., Tree]) -> None:
    """It would keep the addresses that are those of the tree elsewhere."""
    tree = start("quiet", DEPTH_1.with_kinds("network", CLONE.NEWNET))

    def inside() -> int:
        own = os.stat("/proc/self/ns/net").st_ino
        found = [os.stat(f"/proc/self/task/{tid}/ns/net").st_ino for tid in os.listdir("/proc/self/task")]
        return sum(one != own for one in found)

    async def main() -> None:
        with Beforehand() as known:
            await refuse_early(tree.pid, known=known)
            assert inside() == 1
            async with tracer_thread() as tracer:
                async with standstill(tracer, tree.pid, known=known):
                    assert inside() == 1
                async with standstill(tracer, tree.pid, known=known) as still:
                    await still.let_go_of_files()
                    assert inside() == 0
                    assert {what for what, _ in LEDGER.held()}.isdisjoint({"sysctl", "visitor"})

    trio.run(main)
    assert not LEDGER.held()
    tree.check()


@pytest.mark.parametrize(("program", "has_sockets"), [("sockets", True), ("quiet", False)])
def test_who_borrows_of_sockets_is_there_before(
    start: Callable[..., Tree], program: str, *, has_sockets: bool
) -> None:
    tree = start(program, DEPTH_1)

    async def main() -> None:
        with Beforehand() as known:
            await refuse_early(tree.pid, known=known)
            assert ("shield" in {what for what, _ in LEDGER.held()}) == has_sockets

    trio.run(main)
    assert not LEDGER.held()
    tree.check()


@pytest.mark.parametrize("program", ["files", "mappings"])
@pytest.mark.parametrize("far", ["nothing", "its open files", "its mapped files"])
def test_it_is_known_whether_its_end_may_be_seen(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, program: str, far: str
) -> None:
    """By its open files, and its mapped ones; both programs write to their output, and one to a mapped file."""
    tree = start(program, DEPTH_1)
    if far == "its open files":
        monkeypatch.setattr(ending, "filesystem", lambda _: Magic.NFS)
    elif far == "its mapped files":
        monkeypatch.setattr(objects, "filesystem", lambda _: Magic.NFS)

    async def main() -> bool:
        async with tracer_thread() as tracer, standstill(tracer, tree.pid) as still:
            assert still.end_may_be_seen, "nobody has looked"
            await still.prepare_end()
            await still.let_go_of_files()
            return still.end_may_be_seen

    seen = trio.run(main)
    assert seen == (far == "its open files" or (far == "its mapped files" and program == "mappings"))
    tree.check()


@pytest.mark.parametrize("transient", [True, False])
def test_what_stays_is_refused_and_the_tree_runs_on(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, transient: bool
) -> None:
    tree = start("quiet")
    with pytest.raises(Refused):
        looks_until_still(tree.pid, monkeypatch, Blocker("pid 1", "stays", "", transient=transient), 100)
    assert not LEDGER.held()
    tree.check()


def test_a_dump_that_is_refused_while_the_tree_stands_still_leaves_no_image(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it was to go is open by then."""
    tree = start("quiet")
    blocker = Blocker("pid 1", "stays")
    monkeypatch.setattr(Capture, "take", lambda *_: ([], [], [blocker]))
    with pytest.raises(Refused):
        blocking.dump(tree.pid, str(tmp_path / "image"))
    assert not list(tmp_path.iterdir())
    assert not LEDGER.held()
    tree.check()


def test_a_place_that_takes_no_image_is_found_before_the_tree_stands_still(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = start("quiet")
    stops: list[int] = []
    monkeypatch.setattr(freeze, "freeze", lambda pid, _: stops.append(pid))
    above = tmp_path / "above"
    above.mkdir()
    free = DirectoryStorage.require_free

    async def freed(storage: DirectoryStorage) -> None:
        await free(storage)
        above.rmdir()
        above.write_bytes(b"")

    monkeypatch.setattr(DirectoryStorage, "require_free", freed)
    with pytest.raises(StorageError, match="Not a directory"):
        blocking.dump(tree.pid, str(above / "image"), mode="stop")
    assert not stops
    assert not LEDGER.held()
    tree.check()


def test_the_table_of_locks_is_read_before_it(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it waits for a grace period of RCU. It is asked for a mapped file that was just written."""
    tree = start("mappings", DEPTH_1)
    states: list[str] = []
    asked: list[int] = []
    genuine_read, genuine_lines = identity._Leases._read, identity._Leases.lines

    def read(leases: identity._Leases) -> list[bytes]:
        states.append(procfs.stat(HostPid(tree.pid)).state)
        return genuine_read(leases)

    def lines(leases: identity._Leases) -> list[bytes]:
        asked.append(len(states))
        return genuine_lines(leases)

    monkeypatch.setattr(identity, "_AHEAD_S", 60.0)
    monkeypatch.setattr(identity._Leases, "_read", read)
    monkeypatch.setattr(identity._Leases, "lines", lines)
    trio.run(lambda: pipeline.dump(tree.pid, str(tmp_path / "image"), leave="running"))
    assert asked
    assert states
    assert "t" not in states
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy"])
@pytest.mark.parametrize("program", ["files", "connections"])
def test_nothing_is_imported_while_it_stands_still(
    start: Callable[..., Tree], tmp_path: Path, program: str, mode: str
) -> None:
    tree = start(program, DEPTH_1)
    command = [
        "dump",
        "--pid",
        str(tree.pid),
        "--to",
        str(tmp_path / "image"),
        "--mode",
        mode,
        "--leave-running",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.firsts", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert firsts.NONE in done.stdout
    tree.check()


@pytest.mark.parametrize(("mode", "look"), [("stop", 1), ("precopy", 1), ("precopy", 2)])
def test_whoever_cancels_does_not_wait_for_a_whole_look(
    start: Callable[..., Tree],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: pipeline.Mode,
    look: int,
) -> None:
    """A tree of hundreds of processes stands still for seconds while it is looked at."""
    tree = start("processes", DEPTH_1)
    checked: list[HostPid] = []
    scope = trio.CancelScope()

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()

        def check(pid: HostPid, *rest: Any) -> Any:
            if rest:  # it stands still
                checked.append(pid)
                if len(checked) == (look - 1) * len(living) + 1:
                    token.run_sync_soon(scope.cancel)
                    until = time.monotonic() + PATIENCE_S
                    while not tracer._here.given_up.is_set():
                        assert time.monotonic() < until
                        time.sleep(0.001)
            return check_task(pid, *rest)

        monkeypatch.setattr(capture, "check_task", check)
        with scope:
            await pipeline.dump(tree.pid, str(tmp_path / "image"), mode=mode)

    living = [pid for pid in tree.pids() if not procfs.is_exiting(HostPid(pid))]
    trio.run(main)
    assert scope.cancelled_caught
    assert len(checked) == (look - 1) * len(living) + 1
    assert not LEDGER.held()
    tree.check()
