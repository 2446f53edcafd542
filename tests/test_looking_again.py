"""Looks at a tree that runs: what they tell may be read behind them, and they cost the tree no time to wait."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from pipeline import standstill
from pipeline.errors import Blocker, Refused
from pipeline.ids import HostPid
from pipeline.kernel import ptrace
from pipeline.ledger import LEDGER
from pipeline.remote.tracer import tracer_thread
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.resources.tcp_doors import Doors
from pipeline.stages import freeze, grace
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.live_memory import LiveMemory
from pipeline.stages.observe import FileObserver
from tests.harness.networks import network, within
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, engine, reap, restore, said

pytestmark = pytest.mark.root

_LONG_S = 30.0


class Memory:
    """A `LiveMemory` of nothing that notes when it is asked."""

    def __init__(self, did: list[str], root: HostPid, *, stands_still: bool) -> None:
        self.stands_still = stands_still
        self._did = did
        self._root = root

    def first_look(self) -> None:
        """Noted."""
        self._did.append("first look")

    def look(self) -> int:
        """Noted, and whether the root stands still."""
        self._did.append("look at one that stands" if ptrace.is_stopped(self._root) else "look")
        return 7


@pytest.mark.parametrize(
    ("stands_still", "order"),
    [
        (False, ["first look", "grace period", "look", "grace period"]),
        (True, ["first look", "grace period", "look at one that stands"]),
    ],
)
def test_what_is_told_may_be_read(
    monkeypatch: pytest.MonkeyPatch, stands_still: bool, order: list[str]
) -> None:
    did: list[str] = []

    async def look(memory: Any, pid: int) -> None:
        async with tracer_thread() as tracer:
            await standstill.look_first(tracer, pid, memory)
            assert await standstill.look_again(tracer, pid, memory) == 7

    monkeypatch.setattr(grace, "wait", lambda _: did.append("grace period"))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            trio.run(look, Memory(did, HostPid(program.pid), stands_still=stands_still), program.pid)
        finally:
            program.kill()
    assert did == order


@pytest.mark.parametrize("stands_still", [False, True])
def test_who_waits_for_a_time_waits_no_longer(stands_still: bool) -> None:
    """Each look would begin its time anew."""
    waits = "import select; select.epoll().poll(0.5)"
    looks = 0

    async def look(pid: int) -> None:
        nonlocal looks
        memory: Any = Memory([], HostPid(pid), stands_still=stands_still)
        async with tracer_thread() as tracer:
            while freeze.walk(HostPid(pid)) and program.poll() is None and time.monotonic() < until_s:
                await standstill.look_again(tracer, pid, memory)
                looks += 1
                await trio.sleep(0.05)

    until_s = time.monotonic() + _LONG_S
    with subprocess.Popen([sys.executable, "-c", waits]) as program:
        try:
            trio.run(look, program.pid)
            assert program.poll() == 0
            assert looks > 2
        finally:
            program.kill()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
@pytest.mark.parametrize("way", ["check", "stop", "precopy"])
def test_what_is_closed_by_a_program_that_is_looked_at_is_closed(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, way: str
) -> None:
    tree = start("closing", setting)
    for number in range(3):
        to = ["--to", tmp_path / f"{number}", "--leave-running", "--mode", way]
        done = engine(*(["check"] if way == "check" else ["dump", *to]), "--pid", str(tree.pid))
        assert done.returncode == 0, said(done)
        tree.check()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_what_is_closed_by_a_program_that_was_restored_is_closed(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    """Who restores it has made its open files."""
    tree = start("closing", setting)
    for number in range(3):
        family = tree.pids()
        done = engine("dump", "--pid", str(tree.pid), "--to", tmp_path / f"{number}")
        assert done.returncode == 0, said(done)
        assert not reap(family)
        restore(tree, tmp_path / f"{number}")
        tree.check()


#: accepts the first client when it is told to
_LATE = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 4711))
print(flush=True)
sys.stdin.readline()
first, _ = listener.accept()
print(flush=True)
second, _ = listener.accept()
print(flush=True)
sys.stdin.readline()
"""


def test_a_tree_accepts_who_waits_before_it_is_stopped_again_and_nobody_else() -> None:
    """Nothing of it is held while it does."""
    waited: list[bool] = []
    accepts = threading.Event()
    waits = Doors.wait

    def connecting() -> socket.socket:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", 4711))
        return client

    async def main(path: str, program: subprocess.Popen[bytes]) -> None:
        def wait(doors: Doors) -> None:
            assert not [what for what, _ in LEDGER.held() if what == "duplicate"]
            timer = threading.Timer(0.2, accept)
            timer.start()
            waits(doors)
            waited.append(accepts.is_set())
            timer.join()

        def accept() -> None:
            accepts.set()
            os.write(told.fileno(), b"\n")

        told, heard = program.stdin, program.stdout
        assert told is not None
        assert heard is not None
        heard.readline()
        with within(path, connecting), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Doors, "wait", wait)
            async with tracer_thread() as tracer:
                async with standstill._doors_closed(tracer, program.pid, None, None):
                    assert waited == [True]
                    heard.readline()
                    second = within(path, connecting)
                    assert select.select([], [second], [], 0.3)[1] == []
                with second:
                    assert select.select([], [second], [], 30)[1] == [second]
        told.write(b"\n")
        told.flush()

    with network() as path:
        command = ["nsenter", f"--net={path}", sys.executable, "-c", _LATE]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
            try:
                trio.run(main, path, program)
            finally:
                program.kill()


@pytest.mark.parametrize(("transient", "error"), [(False, Refused), (True, TrackingLost)])
def test_what_is_open_and_stops_a_tree_is_found_before_its_memory_is_sent(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, transient: bool, error: type[Exception]
) -> None:
    """What may go away by itself is asked again when it stands still in the end."""
    tree = start("quiet")
    found = [Blocker("pid 7 fd 3", "cannot be carried", transient=transient)]

    async def main() -> None:
        with Beforehand() as known:
            async with tracer_thread() as tracer:
                await standstill.refuse_early(tree.pid, known=known)
                await standstill.begin_tracking(tracer, tree.pid, None, None, LiveMemory(), known)

    monkeypatch.setattr(FileObserver, "blockers", lambda _: found)
    with pytest.raises(error, match="fd 3"):
        trio.run(main)
    assert not LEDGER.held()
    tree.check()
