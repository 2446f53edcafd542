"""Relations between tasks that cannot be carried: refused by name with what to do, and everybody runs on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from pipeline.errors import Refused
from pipeline.ledger import LEDGER
from pipeline.remote.tracer import tracer_thread
from pipeline.standstill import standstill
from tests.harness.tree import engine, reap, said

pytestmark = pytest.mark.root

_LINES = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE, CLONE_FILES = 0x4206, 0x400
def trace(pid):
    assert libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0, ctypes.get_errno()
def child(body):
    pid = os.fork()
    if pid == 0:
        body()
        while True: time.sleep(0.05)
    return pid
def sleep_on():
    while True: time.sleep(0.05)
def say(*words):
    print(*words, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
"""


@contextmanager
def running(body: str, *arguments: str | Path) -> Iterator[tuple[int, list[int]]]:
    """A program in a session of its own: its pid, and the pids that it says."""
    command = [sys.executable, "-S", "-c", _LINES + body, *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        said_pids = [int(word) for word in program.stdout.readline().split()]
        try:
            yield program.pid, said_pids
        finally:
            for pid in [*said_pids, program.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert not reap([p for p in said_pids if os.path.exists(f"/proc/{p}")])


def refused(pid: int, tmp_path: Path, *words: str) -> None:
    """`check` and `dump` name it, and nothing is written."""
    for command in (["check", "--pid", pid], ["dump", "--pid", pid, "--to", tmp_path / "image"]):
        done = engine(*command)
        assert done.returncode == 3, said(done)
        for word in words:
            assert word in done.stdout + done.stderr, f"{word!r} is missing: {said(done)}"
    assert not (tmp_path / "image").exists()


def sleeps(pid: int) -> bool:
    """Whether a process is neither stopped nor traced by us, and goes on with its naps."""

    def switches() -> str:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith("voluntary_ctxt_switches"))

    before = switches()
    deadline = time.monotonic() + 60
    while switches() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    return switches() != before


def tracer_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid"))


def test_a_program_under_a_debugger_outside_of_the_tree(tmp_path: Path) -> None:
    with (
        running("say(); sleep_on()") as (pid, _),
        running("trace(int(sys.argv[1])); say(); sleep_on()", str(pid)) as (tracer, _),
    ):
        refused(pid, tmp_path, f"pid {pid}", f"is traced by pid {tracer} (python", "let the debugger detach")
        assert tracer_of(pid) == tracer
        assert sleeps(pid)


def test_a_program_under_strace(tmp_path: Path) -> None:
    """The tree of strace and its program, and the program alone: both are refused, and strace goes on."""
    log = tmp_path / "log"
    words = ["strace", "-f", "-o", str(log), sys.executable, "-S", "-c", _LINES + "sleep_on()"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, start_new_session=True, **streams) as strace:  # type: ignore[call-overload]
        children = Path(f"/proc/{strace.pid}/task/{strace.pid}/children")
        deadline = time.monotonic() + 60
        while "nanosleep" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (pid,) = map(int, children.read_text().split())
        for root in (strace.pid, pid):
            refused(root, tmp_path, f"pid {pid}", f"is traced by pid {strace.pid} (strace)", "or end strace")
        assert tracer_of(pid) == strace.pid
        before = log.stat().st_size
        assert sleeps(pid)
        assert log.stat().st_size > before
        os.kill(pid, signal.SIGKILL)


def test_a_debugger_and_its_program_in_one_tree(tmp_path: Path) -> None:
    with running("kid = child(sleep_on); trace(kid); say(kid); sleep_on()") as (pid, (kid,)):
        refused(pid, tmp_path, f"pid {kid}", f"is traced by pid {pid}", "let the debugger detach")
        assert tracer_of(kid) == pid
        assert sleeps(kid)
        assert sleeps(pid)


def test_a_debugger_of_somebody_outside_of_the_tree(tmp_path: Path) -> None:
    with (
        running("say(); sleep_on()") as (outside, _),
        running("trace(int(sys.argv[1])); say(); sleep_on()", str(outside)) as (pid, _),
    ):
        refused(pid, tmp_path, f"pid {pid}", f"traces pid {outside}", "not part of the tree")
        assert tracer_of(outside) == pid
        assert sleeps(outside)


def test_a_descriptor_table_shared_with_somebody_outside_of_the_tree(tmp_path: Path) -> None:
    body = "kid = libc.syscall(56, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)\nkid and say(kid)\nsleep_on()"
    with running(body) as (pid, (kid,)):
        refused(kid, tmp_path, f"pid {kid}", f"shares its descriptor table with pid {pid}", "common ancestor")
        assert sleeps(kid)


def test_a_program_that_dispatches_its_system_calls_itself(tmp_path: Path) -> None:
    """A call that is run inside it would kill it, unless it were where calls are allowed: here below the vdso."""
    body = """
at = next(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if "[vdso]" in line)
selector = ctypes.create_string_buffer(b"\\1")
say()
assert libc.prctl(59, ctypes.c_ulong(1), ctypes.c_ulong(1), ctypes.c_ulong(at - 1), selector) == 0
sleep_on()
"""
    with running(body) as (pid, _):
        assert sleeps(pid)
        done = engine("dump", "--pid", pid, "--to", tmp_path / "image")
        assert done.returncode == 3, said(done)
        assert f"pid {pid}: dispatches its system calls itself" in done.stderr
        assert sleeps(pid)


@pytest.mark.parametrize("listener", ["held", "closed"])
def test_a_seccomp_filter_with_a_supervisor(tmp_path: Path, listener: str) -> None:
    """By the descriptor of the supervisor, and by the filter itself where nobody holds that any more."""
    body = """
import struct
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 499), (6, 0, 0, 0x7FC00000), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
program = struct.pack("<H6xQ", len(lines), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
fd = libc.syscall(317, 1, 8, program)
assert fd >= 0
if sys.argv[1] == "closed": os.close(fd)
say()
sleep_on()
"""
    with running(body, listener) as (pid, _):
        done = engine("dump", "--pid", pid, "--to", tmp_path / "image")
        assert done.returncode == 3, said(done)
        assert f"pid {pid}" in done.stderr
        assert ("SECCOMP_RET_USER_NOTIF" if listener == "closed" else "seccomp notify") in done.stderr
        assert sleeps(pid)


# -- vfork -----------------------------------------------------------------------------

#: posix_spawn borrows the memory until its child has opened the FIFO, which it does when somebody else does
_SPAWN = """
def spawn():
    action = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)
    os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, file_actions=[action])
say()
spawn()
while True: time.sleep(0.05)
"""


#: the same, with a copy of the memory
_CLONE_VFORK = """
import ctypes
say()
if ctypes.CDLL(None).syscall(56, 0x4000 | 17, 0, 0, 0, 0) == 0:
    os.open(sys.argv[1], os.O_RDONLY)
    os.execl("/bin/sleep", "sleep", "1000")
while True: time.sleep(0.05)
"""


@contextmanager
def spawning(tmp_path: Path, program: str = _SPAWN) -> Iterator[tuple[int, int, Path]]:
    """A program in the middle of posix_spawn: its pid, that of the child, and the FIFO that the child waits for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with running(program, fifo) as (pid, _):
        children = Path(f"/proc/{pid}/task/{pid}/children")
        deadline = time.monotonic() + 60
        while not children.read_text() or _state(pid) != "D":
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kid = int(children.read_text())
        try:
            yield pid, kid, fifo
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(kid, signal.SIGKILL)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_vfork_child_that_never_executes_a_program_is_named(tmp_path: Path) -> None:
    with spawning(tmp_path) as (pid, kid, fifo):
        refused(pid, tmp_path, f"pid {pid}", f"waits for its vfork child, pid {kid}", "let it do that")
        with open(fifo, "wb"):
            pass
        assert sleeps(pid)  # it was not harmed


def test_who_waits_for_a_child_that_has_a_copy_of_the_memory_is_named(tmp_path: Path) -> None:
    with spawning(tmp_path, _CLONE_VFORK) as (pid, kid, fifo):
        refused(
            pid, tmp_path, f"pid {pid}", f"waits for its child of CLONE_VFORK, pid {kid},", "let it do that"
        )
        with open(fifo, "wb"):
            pass
        assert sleeps(pid)  # it was not harmed


def test_a_vfork_child_is_waited_for(tmp_path: Path) -> None:
    with spawning(tmp_path) as (pid, kid, fifo):
        late = threading.Timer(0.7, lambda: open(fifo, "wb").close())
        late.start()
        done = engine("dump", "--pid", pid, "--to", tmp_path / "image", "--leave-running")
        late.join()
        assert done.returncode == 0, said(done)
        assert sleeps(pid)
        assert Path(f"/proc/{kid}/comm").read_text() == "sleep\n"


@pytest.mark.parametrize("executes", [True, False])
def test_a_vfork_that_begins_behind_the_first_look(tmp_path: Path, executes: bool) -> None:
    """The parent cannot be stopped; it is let go, and tried again."""

    async def stop(pid: int, fifo: Path) -> None:
        async with tracer_thread() as tracer, trio.open_nursery() as nursery:

            async def execute() -> None:
                await trio.sleep(1.2)
                await trio.to_thread.run_sync(lambda: open(fifo, "wb").close())

            if executes:
                nursery.start_soon(execute)
            async with standstill(tracer, pid) as still:
                assert still.processes == 2

    with spawning(tmp_path) as (pid, kid, fifo):
        if executes:
            trio.run(stop, pid, fifo)
        else:
            with pytest.raises(ExceptionGroup) as caught:
                trio.run(stop, pid, fifo)
            (reason,) = caught.value.exceptions
            assert isinstance(reason, Refused)
            assert f"waits for its vfork child, pid {kid}" in str(reason)
            with open(fifo, "wb"):
                pass
        assert not LEDGER.held()
        assert sleeps(pid)
        assert tracer_of(pid) == 0
