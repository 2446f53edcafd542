"""A grace period stops whoever may be writing through pinned pages, once, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import TargetError
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.ledger import LEDGER
from pipeline.stages import freeze, grace

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("in_its_own_folder")]

_LONG_S = 30.0
#: from a file with a path: whether that pins pages is up to its file system
_READS = "import os; os.read(os.open('fifo', os.O_RDWR), 1)"


@pytest.fixture
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")


@contextmanager
def running(body: str) -> Iterator[HostPid]:
    """A program, and its children; nobody traces it behind the block."""
    with subprocess.Popen([sys.executable, "-c", body], start_new_session=True) as program:
        try:
            yield HostPid(program.pid)
            for pid in freeze.walk(HostPid(program.pid)):
                assert not any(procfs.status(tid).tracer_pid for tid in procfs.tasks(pid))
            assert not LEDGER.held()
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LONG_S
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def until_asleep(pid: HostPid, *calls: int) -> None:
    until(lambda: procfs.read_file(pid, "syscall").split()[0].decode() in map(str, calls))


def naps(pid: HostPid) -> int:
    """How often it has gone to sleep."""
    return int(procfs.read_file(pid, "status").split(b"\nvoluntary_ctxt_switches:")[1].split()[0])


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ("import time; time.sleep(1000)", [NR.clock_nanosleep]),
        ("import select; select.epoll().poll(1000)", [NR.epoll_wait, NR.epoll_pwait]),
        ("import select; select.poll().poll(1_000_000)", [NR.poll, NR.ppoll]),
        ("import threading; one = threading.Lock(); one.acquire(); one.acquire()", [NR.futex]),
        ("import socket; a, b = socket.socketpair(); a.recv(1)", [NR.recvfrom]),
        ("import os, time; os.fork() or time.sleep(1000); os.wait()", [NR.wait4]),
        ("import os; os.read(os.pipe()[0], 1)", [NR.read]),
        ("import os, socket; a, b = socket.socketpair(); os.read(a.fileno(), 1)", [NR.read]),
        ("import os; a, b = os.pipe(); os.write(b, bytes(1 << 20))", [NR.write]),
    ],
    ids=["nap", "epoll", "poll", "futex", "receive", "child", "pipe", "socket", "full pipe"],
)
def test_who_sleeps_with_nothing_pinned_is_not_woken(body: str, calls: list[int]) -> None:
    with running(body) as pid:
        until_asleep(pid, *calls)
        before = naps(pid)
        grace.wait(pid)
        assert naps(pid) == before


def test_who_reads_from_a_file_is_stopped_once_and_goes_on_reading() -> None:
    with running(_READS) as pid:
        until_asleep(pid, NR.read)
        before = naps(pid)
        grace.wait(pid)
        until_asleep(pid, NR.read)
        assert naps(pid) > before


def test_who_computes_is_waited_for_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    halt = freeze.halt

    def noted(tree: freeze.FrozenTree, pid: HostPid, tids: list[HostPid], *rest: object) -> None:
        halt(tree, pid, tids, *rest)  # type: ignore[arg-type]
        stopped.append([task.tid for task in tree.processes[pid].tasks.values() if task.stopped])

    monkeypatch.setattr(freeze, "halt", noted)
    with running("while True: pass") as pid:
        until(lambda: procfs.state(pid, pid) == "R")
        grace.wait(pid)
        assert stopped == [[pid]]
        assert procfs.state(pid, pid) == "R"


def test_the_calls_of_all_processes_and_threads_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HostPid] = []

    def halt(_tree: freeze.FrozenTree, _pid: HostPid, tids: list[HostPid], *_: object) -> None:
        asked.extend(tids)

    monkeypatch.setattr(freeze, "halt", halt)
    child = f"import threading; threading.Thread(target=lambda: exec({_READS!r})).start(); {_READS}"
    with running(f"import os; os.fork(); {child}") as pid:
        until(lambda: len(freeze.walk(pid)) == 2)
        tids = []
        for one in freeze.walk(pid):
            until(lambda one=one: len(procfs.tasks(one)) == 2)  # type: ignore[misc]
            tids += procfs.tasks(one)
        for tid in tids:
            until_asleep(tid, NR.read)
        grace.wait(pid)
        assert sorted(asked) == sorted(tids)


def test_who_does_not_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grace, "_TIMEOUT_S", 0.0)
    monkeypatch.setattr(freeze, "_stops_within", lambda *_: False)
    with running(_READS) as pid:
        until_asleep(pid, NR.read)
        with pytest.raises(TargetError, match=f"pid {pid} thread {pid} does not stop"):
            grace.wait(pid)


def test_nobody_is_left_to_wait_for() -> None:
    with running("pass") as pid:
        until(lambda: procfs.state(pid, pid) == "Z")
        grace.wait(pid)
    grace.wait(pid)
