"""System calls inside live targets: right answers, nothing left behind, and no harm when we are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import TargetError
from pipeline.ids import HostPid
from pipeline.kernel import ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.smaps import maps
from pipeline.remote.calls import Call, In, Out
from pipeline.remote.live import LiveTask, find_places

COUNTER = """
import sys, time
step = 0
while True:
    begin = time.monotonic()
    time.sleep(0.005)
    assert time.monotonic() - begin >= 0.005, "woken early"
    step += 1
    with open(sys.argv[1], "w") as file:
        file.write(str(step))
"""


@contextmanager
def stopped(pid: int) -> Iterator[LiveTask]:
    """`pid` (one thread) as a live task, released at the end."""
    ptrace.seize(pid)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        pointer = arch.Registers(ptrace.get_regs(pid))["rsp"]
        places = find_places(HostPid(pid), maps(HostPid(pid)), [pointer], memory)
        yield LiveTask(HostPid(pid), places, memory, ~0)
        ptrace.detach(pid)
    finally:
        os.close(memory)


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    steps = tmp_path / "steps"
    process = subprocess.Popen([sys.executable, "-c", COUNTER, str(steps)])
    while not steps.exists() or not steps.read_text():
        time.sleep(0.01)
    try:
        yield process, steps
    finally:
        process.kill()
        process.wait()


def assert_goes_on(process: subprocess.Popen[bytes], steps: Path) -> None:
    for _ in range(500):
        before = steps.read_text()
        time.sleep(0.01)
        if before and steps.read_text() not in ("", before):
            return
        assert process.poll() is None, "the target died"
    raise AssertionError("the target does not go on")


def test_calls_answer_and_leave_no_trace(counter: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, steps = counter
    pid = process.pid
    with stopped(pid) as task:
        before = (ptrace.get_regs(pid), ptrace.get_xstate(pid), ptrace.get_sigmask(pid))
        name = Out(16)
        action = Out(32)
        vector = In([b"abcd", 7, name])
        calls = [
            Call(NR.getpid),
            Call(NR.prctl, (16, name)),
            Call(NR.rt_sigaction, (signal.SIGINT, 0, action, 8)),
            Call(NR.close, (12345,), may_fail=True),
            Call(NR.madvise, (vector, 0, 0), may_fail=True),
        ]
        task.run(calls)
        assert calls[0].result == pid
        assert name.data.startswith(b"python")
        assert any(action.data), "SIGINT is caught by Python"
        assert calls[3].result == -9
        with pytest.raises(OSError, match="EBADF"):
            task.syscall(NR.close, 12345)
        assert (ptrace.get_regs(pid), ptrace.get_xstate(pid), ptrace.get_sigmask(pid)) == before
    assert_goes_on(process, steps)


def test_long_batches_are_cut(counter: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, steps = counter
    with stopped(process.pid) as task:
        calls = [Call(NR.getppid) for _ in range(500)]
        task.run(calls)
        assert {call.result for call in calls} == {os.getpid()}
    assert_goes_on(process, steps)


def test_a_relative_sleep_goes_on_where_it_was() -> None:
    begin = time.monotonic()
    process = subprocess.Popen(["sleep", "0.8"])
    try:
        time.sleep(0.2)
        with stopped(process.pid) as task:
            assert task.syscall(NR.getpid) == process.pid
        assert process.wait() == 0
        assert time.monotonic() - begin >= 0.79
    finally:
        process.kill()
        process.wait()


def test_target_survives_the_death_of_its_examiner(counter: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, steps = counter
    for _ in range(60):
        examiner = os.fork()
        if examiner == 0:
            try:
                while True:
                    with stopped(process.pid) as task:
                        task.run([Call(NR.rt_sigaction, (s, 0, Out(32), 8)) for s in range(1, 64)])
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.001, 0.01))
        os.kill(examiner, signal.SIGKILL)
        os.waitpid(examiner, 0)
        assert process.poll() is None
    assert_goes_on(process, steps)
    for _ in range(200):  # the stub of the last examiner may still be on its way
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "SigBlk:\t0000000000000000" in status:
            break
        time.sleep(0.01)
    assert "SigBlk:\t0000000000000000" in status
    assert "TracerPid:\t0" in status


def test_no_room_is_said(counter: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, _ = counter
    memory = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY)
    try:
        no_code = [r for r in maps(HostPid(process.pid)) if not r.executable]
        with pytest.raises(TargetError, match="executable"):
            find_places(HostPid(process.pid), no_code, [], memory)
        no_stack = [r for r in maps(HostPid(process.pid)) if not r.writable]
        with pytest.raises(TargetError, match="stack"):
            find_places(HostPid(process.pid), no_stack, [], memory)
    finally:
        os.close(memory)
