"""Freezing: whoever changes while it is stopped is stopped all the same, and goes on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.ledger import LEDGER
from pipeline.resources.tasks import leaders
from pipeline.stages import freeze
from tests.harness.tree import Workshop

pytestmark = pytest.mark.root

_FREEZES = 200
_LONG_S = 10.0


@contextmanager
def restless(workshop: Workshop, how: str) -> Iterator[tuple[HostPid, Path]]:
    """A process that executes a program or ends all the time; and the file that grows by it."""
    directory = workshop.directory()
    count = directory / "count"
    with subprocess.Popen(
        [*workshop.command("restless"), str(directory), how], stdin=subprocess.DEVNULL, start_new_session=True
    ) as program:
        try:
            until_larger(count, 0)
            yield HostPid(program.pid), count
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def until_larger(file: Path, size: int) -> None:
    deadline = time.monotonic() + _LONG_S
    while not file.exists() or file.stat().st_size <= size:
        assert time.monotonic() < deadline, "the program does not go on"
        time.sleep(0.001)


def check_frozen(tree: freeze.FrozenTree) -> None:
    assert set(tree.pids()) == set(freeze.walk(tree.root))
    for process in tree.processes.values():
        assert process.zombie == leaders.has_ended(process.pid)
        states = {tid: procfs.status(tid) for tid in procfs.tasks(process.pid)}
        assert sorted(process.tasks) == [tid for tid, status in states.items() if status.state != "Z"]
        for tid in process.tasks:
            status = states[HostPid(tid)]
            assert (status.state, status.tracer_pid) == ("t", threading.get_native_id())


def freeze_and_release(pid: HostPid, count: Path) -> int:
    """Freeze a restless process, see that it rests, and release it.

    Returns:
        The size of `count` as it was frozen.
    """
    started_s = time.monotonic()
    tree = freeze.freeze(pid, suspend_seccomp=False)
    try:
        check_frozen(tree)
        size = count.stat().st_size
        time.sleep(0.0005)
        assert count.stat().st_size == size
    finally:
        freeze.release(tree)
    assert time.monotonic() - started_s < _LONG_S
    return size


@pytest.mark.parametrize("how", ["thread", "first", "end"])
def test_a_thread_that_executes_a_program_or_ends_its_process(workshop: Workshop, how: str) -> None:
    """It ends its sisters, which their tracer has to collect, and may have the first one's number then."""
    with restless(workshop, how) as (pid, count):
        for _ in range(_FREEZES):
            until_larger(count, freeze_and_release(pid, count))
    assert not LEDGER.held()


def test_a_first_thread_that_ends_alone(workshop: Workshop) -> None:
    """Its end cannot be collected while the others run. The tracer gives it back with its own end."""
    with restless(workshop, "leave") as (pid, count):
        for _ in range(_FREEZES):
            with ThreadPoolExecutor(1) as tracer:
                size = tracer.submit(freeze_and_release, pid, count).result()
            until_larger(count, size)
    assert not LEDGER.held()


def test_a_signal_on_its_way_when_a_freeze_is_given_up() -> None:
    """Of a task that was seized but not waited for yet."""
    with subprocess.Popen(["sleep", "60"]) as program:
        try:
            pid = HostPid(program.pid)
            LEDGER.take("seized task", pid)
            ptrace.seize(pid)
            program.terminate()
            deadline = time.monotonic() + _LONG_S
            while procfs.status(pid).state != "t" and time.monotonic() < deadline:
                time.sleep(0.001)
            process = freeze.FrozenProcess(pid, tasks={pid: freeze.FrozenTask(pid)})
            freeze.release(freeze.FrozenTree(pid, {pid: process}))
            assert program.wait(_LONG_S) == -signal.SIGTERM
        finally:
            program.kill()
    assert not LEDGER.held()
