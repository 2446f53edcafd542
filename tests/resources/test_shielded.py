"""What is lent of a target that stands still: it is given back before the target goes on, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from tests.harness.tree import ROOT

#: stops the pid that is given, and has its state lent until there is a file "back"; says the pid of who does it
LENDING = """
import os, pathlib, sys, time
from pipeline.kernel import ptrace
from pipeline.resources.shielded import shielded

def act():
    pathlib.Path("lent").write_text(str(os.getpid()))
    while not pathlib.Path("back").exists():
        time.sleep(0.001)
    pathlib.Path("given").write_bytes(b"")
    return bytes(1 << 20)

target = int(sys.argv[1])
ptrace.seize(target)
ptrace.interrupt(target)
ptrace.wait(target)
assert shielded(act) == bytes(1 << 20)
print("whole", flush=True)
"""
#: the same in a thread of its own, as the pipeline does it; the main thread waits
IN_A_THREAD = f"""
import threading
def lend():
    {"    ".join(LENDING.splitlines(keepends=True))}
one = threading.Thread(target=lend)
one.start()
one.join()
"""
#: lets anybody of its user trace it, where Yama would not (PR_SET_PTRACER_ANY)
WILLING = """
import ctypes, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))
print(flush=True)
time.sleep(1000)
"""
_PATIENCE_S = 30


@pytest.fixture
def target() -> Iterator[HostPid]:
    with subprocess.Popen([sys.executable, "-c", WILLING], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield HostPid(process.pid)
        finally:
            process.kill()


class Lenders:
    """Processes that lend; all of them end with the test."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self._folder = folder
        self._ends = ends

    def begin(self, script: str, target: HostPid) -> subprocess.Popen[str]:
        lender = subprocess.Popen(
            [sys.executable, "-c", script, str(target)],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(lender.communicate)
        self._ends.callback(lender.kill)
        return lender

    def lend(self, script: str, target: HostPid) -> tuple[subprocess.Popen[str], HostPid]:
        """Start one; with the pid of the child that has the loan."""
        lender = self.begin(script, target)
        lent = self._folder / "lent"
        until(lambda: lent.exists() and lent.read_text() != "")
        child = int(lent.read_text())
        self._ends.callback(os.close, pidfd := os.pidfd_open(child))
        self._ends.callback(kill, pidfd)
        return lender, HostPid(child)


@pytest.fixture
def lenders(tmp_path: Path) -> Iterator[Lenders]:
    with ExitStack() as ends:
        yield Lenders(tmp_path, ends)


def kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_held(target: HostPid) -> bool:
    return procfs.stat(target).state == "t"


@pytest.mark.parametrize("script", [LENDING, IN_A_THREAD], ids=["main-thread", "thread"])
def test_the_target_stands_still_until_the_loan_of_a_killed_lender_is_over(
    script: str, target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    lender, _ = lenders.lend(script, target)
    lender.kill()
    time.sleep(0.1)
    assert is_held(target), "it runs with its state lent"
    (tmp_path / "back").touch()
    lender.communicate(timeout=_PATIENCE_S)
    assert (tmp_path / "given").exists()
    until(lambda: not is_held(target))


def test_a_killed_child_ends_neither_lender_nor_stillness(
    target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    lender, child = lenders.lend(LENDING, target)
    os.kill(child, signal.SIGKILL)
    out, _ = lender.communicate(timeout=_PATIENCE_S)
    assert lender.returncode == 1, "the loan failed with an OSError"
    assert "whole" not in out
    until(lambda: not is_held(target))


@pytest.mark.parametrize("script", [LENDING, IN_A_THREAD], ids=["main-thread", "thread"])
def test_a_signal_for_the_lender_neither_blocks_nor_is_lost(
    script: str, target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    counting = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
    lender, _ = lenders.lend(counting + script, target)
    for task in procfs.tasks(HostPid(lender.pid)):
        syscall(NR.tgkill, lender.pid, task, signal.SIGUSR1)
    (tmp_path / "back").touch()
    out, _ = lender.communicate(timeout=_PATIENCE_S)
    assert lender.returncode == 0
    assert {"heard", "whole"} <= set(out.split())


def test_who_is_traced_by_somebody_else_lends_all_the_same(
    target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    waiting = "import pathlib, time\nwhile not pathlib.Path('traced').exists(): time.sleep(0.001)\n"
    lender = lenders.begin(waiting + LENDING, target)
    ptrace.seize(lender.pid)
    (tmp_path / "traced").touch()
    (tmp_path / "back").touch()
    while not (stop := ptrace.wait(lender.pid)).exited:
        ptrace.cont(lender.pid, 0 if stop.event else stop.signal)
    assert lender.stdout is not None
    assert lender.stdout.read().split() == ["whole"]
