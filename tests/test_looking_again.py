"""Looks at a tree that runs: what they tell may be read behind them, and they cost the tree no time to wait."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import trio

from pipeline import standstill
from pipeline.ids import HostPid
from pipeline.kernel import ptrace
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import freeze, grace

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
