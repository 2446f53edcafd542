"""Puppets: what they run, what they are given, how they end."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator

import pytest

from pipeline.ids import RemoteAddress
from pipeline.kernel import ptrace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call, Out
from pipeline.remote.puppet import SCRATCH_BYTES, Puppet, seen_pids, spawn_launcher

SCRATCH = RemoteAddress(0x2000_0000_0000)


@pytest.fixture
def launcher() -> Iterator[Puppet]:
    puppet = spawn_launcher(SCRATCH, 900)
    try:
        yield puppet
    finally:
        puppet.kill_and_reap()
        puppet.stage.channel.close()
        assert not LEDGER.held()


def test_launcher_is_our_child_with_two_descriptors(launcher: Puppet) -> None:
    assert launcher.syscall(NR.getppid) == os.getpid()
    assert sorted(map(int, os.listdir(f"/proc/{launcher.pid}/fd"))) == [900, 901]


def test_calls_run_in_batches_of_any_size(launcher: Puppet) -> None:
    name = Out(16)
    calls = [Call(NR.getpid) for _ in range(1500)]
    big = [Call(NR.getrandom, (Out(100_000), 100_000, 0)) for _ in range(8)]
    launcher.run_checked([*calls, *big, Call(NR.prctl, (16, name))])
    assert {call.result for call in calls} == {launcher.pid}
    assert all(any(call.args[0].data) for call in big if isinstance(call.args[0], Out))


def test_failing_calls_say_what_and_why(launcher: Puppet) -> None:
    with pytest.raises(OSError, match="EBADF") as caught:
        launcher.syscall(NR.close, 3)
    assert caught.value.errno == errno.EBADF


def test_clone_exec_thread(launcher: Puppet) -> None:
    child = launcher.clone_task(CLONE.PARENT)
    try:
        child.exec_puppet()
        assert child.syscall(NR.getppid) == os.getpid()
        with open(f"/proc/{child.pid}/maps") as file:
            assert f"{SCRATCH:x}-{SCRATCH + SCRATCH_BYTES:x} rwxp" in file.read()
        flags = CLONE.VM | CLONE.FS | CLONE.FILES | CLONE.SIGHAND | CLONE.THREAD | CLONE.SYSVSEM
        thread = child.clone_task(flags)
        assert thread.syscall(NR.getpid) == child.pid
        assert thread.syscall(NR.gettid) == thread.tid != child.tid
        thread.kill_and_reap()
    finally:
        child.kill_and_reap()


def test_descriptors_land_in_order(launcher: Puppet) -> None:
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)] * 120
    try:
        assert launcher.send_fds(files) == list(range(360))
    finally:
        for fd in set(files):
            os.close(fd)


def test_helpers_take_no_pid_of_the_tree(launcher: Puppet) -> None:
    first = launcher.clone(CLONE.PARENT)
    taken = {first.pid + n for n in range(1, 6)}
    launcher.stage.reserved = [taken]
    second = launcher.clone(CLONE.PARENT)
    try:
        assert seen_pids(second.tid)[0] not in taken
    finally:
        second.kill_and_reap()
        first.kill_and_reap()


def test_puppets_die_with_their_tracer() -> None:
    reader, writer = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        try:
            puppet = spawn_launcher(SCRATCH, 900)
            child = puppet.clone_task(CLONE.PARENT)
            os.write(writer, f"{puppet.pid} {child.pid}".encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    pids = [int(pid) for pid in os.read(reader, 100).split()]
    os.close(reader)
    os.kill(tracer, signal.SIGKILL)
    os.waitpid(tracer, 0)
    assert len(pids) == 2
    for _ in range(500):
        if not any(_runs(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError("puppets survived their tracer")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_leaving_scratch_keeps_the_process(launcher: Puppet) -> None:
    child = launcher.clone_task(CLONE.PARENT)
    try:
        child.exec_puppet()
        with open(f"/proc/{child.pid}/maps") as file:
            vdso = next(line for line in file if "[vdso]" in line)
        start, end = (int(part, 16) for part in vdso.split()[0].split("-"))
        code = os.pread(child.memory, end - start, start)
        child.leave_scratch(start + code.index(b"\x0f\x05"))
        with open(f"/proc/{child.pid}/maps") as file:
            assert f"{SCRATCH:x}-" not in file.read()
    finally:
        child.kill_and_reap()


def test_a_puppet_that_nobody_takes_ends_with_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it may be killed before the puppet has asked to be told of that."""

    class NotTaken(Exception):
        pass

    def seize(pid: int, _: int) -> None:
        raise NotTaken(pid)

    monkeypatch.setattr(ptrace, "seize", seize)
    monkeypatch.setattr(Puppet, "kill_and_reap", lambda _: None)
    with pytest.raises(NotTaken) as caught:
        spawn_launcher(SCRATCH, 900)
    assert os.waitpid(caught.value.args[0], 0) == (caught.value.args[0], 0)
    LEDGER.give_back("puppet", caught.value.args[0])
