"""Interrupted system calls and restartable sequences: of running programs that are stopped, and of rebuilt ones."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import pytest

from pipeline.ids import HostPid
from pipeline.image.schema import Thread
from pipeline.kernel import procfs, ptrace, smaps
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.live import LiveTask, find_places
from pipeline.remote.puppet import Puppet
from pipeline.resources.tasks import interrupted
from pipeline.resources.tasks.interrupted import Sleepers
from pipeline.stages.freeze import freeze, release
from tests.resources.taskharness import AREA, HOST, launched, puppet_in, record

pytestmark = pytest.mark.root
libc = ctypes.CDLL(None, use_errno=True)
HOUR_S = 3600
SECOND = struct.pack("<2q", 1, 0)
NEVER = struct.pack("<2q", HOUR_S, 0)


@contextmanager
def child(run: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """A forked child that calls `run` and tells its result through a pipe: (pid, reading end)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = run()
            os.write(writer, repr(result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        yield pid, reader
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def await_sleep(pid: int, *numbers: int) -> None:
    """Until `pid` sleeps in one of these system calls."""
    for _ in range(2000):
        with open(f"/proc/{pid}/syscall") as file:
            words = file.read().split()
        if words[0].isdigit() and int(words[0]) in numbers and procfs.stat(HostPid(pid)).state == "S":
            return
        time.sleep(0.002)
    raise AssertionError(f"{pid} does not sleep in {numbers}")


def raw(number: int, *args: object) -> tuple[int, int]:
    result = libc.syscall(number, *args)
    return result, ctypes.get_errno() if result < 0 else 0


# -- stopping a program and letting it go on -----------------------------------------------


def test_a_stop_is_no_reason_for_epoll_wait_to_fail() -> None:
    reader, writer = os.pipe()
    epoll = select.epoll()
    epoll.register(reader, select.EPOLLIN)
    room = ctypes.create_string_buffer(12)
    try:
        with child(lambda: raw(NR.epoll_wait, epoll.fileno(), room, 1, -1)) as (pid, answer):
            for _ in range(5):
                await_sleep(pid, NR.epoll_wait)
                release(freeze(HostPid(pid), suspend_seccomp=False))
            await_sleep(pid, NR.epoll_wait)
            os.write(writer, b"x")
            assert os.read(answer, 100) == b"(1, 0)"
    finally:
        epoll.close()
        os.close(reader)
        os.close(writer)


def test_a_handler_still_interrupts_epoll_wait() -> None:
    """A signal that waits to be taken is a reason: the call ends with EINTR, as without us."""
    epoll = select.epoll()
    room = ctypes.create_string_buffer(12)

    def run() -> tuple[int, int]:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        return raw(NR.epoll_wait, epoll.fileno(), room, 1, -1)

    try:
        with child(run) as (pid, answer):
            await_sleep(pid, NR.epoll_wait)
            tree = freeze(HostPid(pid), suspend_seccomp=False)
            os.kill(pid, signal.SIGUSR1)
            release(tree)
            assert os.read(answer, 100) == b"(-1, %d)" % errno.EINTR
    finally:
        epoll.close()


@pytest.mark.parametrize("stops", [1, 3])
def test_epoll_wait_does_not_start_its_time_again(stops: int) -> None:
    epoll = select.epoll()
    room = ctypes.create_string_buffer(12)

    def run() -> tuple[int, float]:
        begin = time.monotonic()
        return raw(NR.epoll_wait, epoll.fileno(), room, 1, 1200)[0], time.monotonic() - begin

    try:
        with child(run) as (pid, answer):
            for _ in range(stops):
                await_sleep(pid, NR.epoll_wait)
                time.sleep(0.9 / stops)
                sleepers = Sleepers()
                sleepers.look([HostPid(pid)])
                tree = freeze(HostPid(pid), suspend_seccomp=False)
                sleepers.prepare(HostPid(pid))
                release(tree)
            result, lasted_s = eval(os.read(answer, 100))
            assert result == 0
            assert 1.19 <= lasted_s < 1.6
    finally:
        epoll.close()


def kill_oneself_behind_a_call_in(pid: HostPid) -> None:
    """Stop a process, and be gone as soon as it runs something for us."""
    sleepers = Sleepers()
    sleepers.look([pid])
    freeze(pid, suspend_seccomp=False)
    sleepers.prepare(pid)
    genuine = ptrace.cont

    def cont(tid: int, number: int = 0) -> None:
        genuine(tid, number)
        os.kill(os.getpid(), signal.SIGKILL)

    ptrace.cont = cont
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    places = find_places(pid, smaps.maps(pid), [arch.Registers(ptrace.get_regs(pid))["rsp"]], memory)
    LiveTask(pid, places, memory, ~procfs.status(pid).caught).syscall(NR.getpid)


@pytest.mark.parametrize("stops", [0, 2])
@pytest.mark.parametrize("name", ["nap", "poll"])
def test_a_sleep_lasts_that_was_stopped_before_by_us_and_by_who_was_killed_then(
    name: str, stops: int
) -> None:
    """It begins anew, and does not fail: by then its thread goes on in restart_syscall(2)."""
    run, number = {
        "nap": (lambda: raw(NR.clock_nanosleep, time.CLOCK_BOOTTIME, 0, SECOND, None), NR.clock_nanosleep),
        "poll": (lambda: raw(NR.poll, None, 0, 1000), NR.poll),
    }[name]
    with child(run) as (pid, answer):
        await_sleep(pid, number)
        for _ in range(stops):
            release(freeze(HostPid(pid), suspend_seccomp=False))
            await_sleep(pid, NR.restart_syscall)
        with child(lambda: kill_oneself_behind_a_call_in(HostPid(pid))) as (killer, _):
            os.waitid(os.P_PID, killer, os.WEXITED | os.WNOWAIT)
        assert os.read(answer, 100) == b"(0, 0)"


def test_a_stop_is_no_reason_for_a_socket_with_a_timeout_to_fail() -> None:
    """recv, send and connect with SO_RCVTIMEO or SO_SNDTIMEO are never restarted by the kernel."""
    one, other = socket.socketpair()
    timeout = struct.pack("<2q", 30, 0)
    for each in (one, other):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    room = ctypes.create_string_buffer(1 << 20)
    filled = one.send(room.raw, socket.MSG_DONTWAIT)
    with one, other, child(lambda: raw(NR.sendto, one.fileno(), room, 1000, 0, 0, 0)) as (pid, answer):
        await_sleep(pid, NR.sendto)
        release(freeze(HostPid(pid), suspend_seccomp=False))
        await_sleep(pid, NR.sendto)
        while filled > 0:  # what the child sends may be among it
            filled -= len(other.recv(1 << 20))
        assert os.read(answer, 100) == b"(1000, 0)"


# -- how long a sleep has lasted --------------------------------------------------------------


@contextmanager
def frozen(pid: int) -> Iterator[arch.Registers]:
    tree = freeze(HostPid(pid), suspend_seccomp=False)
    try:
        yield arch.Registers(ptrace.get_regs(pid))
    finally:
        release(tree)


word = ctypes.c_int(7)
SLEEPS: dict[str, tuple[Callable[[], object], int]] = {
    "poll": (lambda: raw(NR.poll, None, 0, HOUR_S * 1000), NR.poll),
    "futex": (lambda: raw(NR.futex, ctypes.byref(word), 128, 7, NEVER, None, 0), NR.futex),
    "nanosleep": (lambda: raw(NR.nanosleep, NEVER, None), NR.nanosleep),
    "nanosleep-rest": (lambda: raw(NR.nanosleep, NEVER, ctypes.create_string_buffer(16)), NR.nanosleep),
    "clock_nanosleep": (lambda: raw(NR.clock_nanosleep, 7, 0, NEVER, None), NR.clock_nanosleep),
}


@pytest.mark.parametrize("name", SLEEPS)
def test_time_left_of_a_sleep(name: str) -> None:
    run, number = SLEEPS[name]
    begin = time.monotonic_ns()
    with child(run) as (pid, _):
        await_sleep(pid, number)
        surely_asleep = time.monotonic_ns()
        time.sleep(0.2)
        sleepers = Sleepers()
        looking = time.monotonic_ns()
        sleepers.look([HostPid(pid)])
        looked = time.monotonic_ns()
        with frozen(pid) as regs:
            slept_ns = sleepers.prepare(HostPid(pid)).slept_ns
            left_ns = interrupted.sleep_left_ns(regs, slept_ns, interrupted.reader(HostPid(pid)))
            stopped = time.monotonic_ns()
        assert slept_ns is not None
        assert left_ns is not None
        # the two clocks agree to a tick or two
        slack_ns = 20_000_000
        assert looking - surely_asleep - slack_ns <= slept_ns <= looked - begin + slack_ns
        whole_ns = HOUR_S * 10**9
        assert whole_ns - (stopped - begin) - slack_ns <= left_ns <= whole_ns - 150_000_000


def test_a_sleep_that_began_after_the_look_is_not_mistaken() -> None:
    def run() -> None:
        while True:
            raw(NR.poll, None, 0, 30)

    with child(run) as (pid, _):
        await_sleep(pid, NR.poll)
        sleepers = Sleepers()
        sleepers.look([HostPid(pid)])
        time.sleep(0.1)
        with frozen(pid):
            assert sleepers.prepare(HostPid(pid)).slept_ns is None


def test_looking_puts_our_own_affinity_back() -> None:
    before = os.sched_getaffinity(0)
    sleepers = Sleepers()
    with child(lambda: raw(NR.poll, None, 0, -1)) as (pid, _):
        await_sleep(pid, NR.poll)
        sleepers.look([HostPid(pid), HostPid(1 << 22)])
    assert os.sched_getaffinity(0) == before


# -- sleeping on in another process --------------------------------------------------------------

#: syscall; test the result: exit(result & 255)
PROGRAM = bytes.fromhex("0f05 89c7 b8e7000000 0f05".replace(" ", ""))
CODE = AREA + 4096
DATA = AREA + 8192


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with launched() as launcher, puppet_in(launcher, HOST) as puppet:
        puppet.syscall(NR.mprotect, AREA, 1 << 20, 7)
        os.pwrite(puppet.memory, PROGRAM, CODE)
        os.pwrite(puppet.memory, NEVER, DATA)
        yield puppet


def sleeping(puppet: Puppet, number: int, args: tuple[int, ...], left_ns: int | None) -> Thread:
    """The record of a thread that was stopped in a sleep in this program."""
    process, _ = record([puppet], HOST)
    names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
    regs = arch.Registers(process.threads[0].registers).replace(
        rip=CODE + 2, rax=arch.ERESTART_RESTARTBLOCK, orig_rax=number, **dict(zip(names, args, strict=False))
    )
    return msgspec.structs.replace(process.threads[0], registers=regs.pack(), sleep_left_ns=left_ns)


def go_on(puppet: Puppet, thread: Thread) -> int:
    """Let the puppet become the program; returns its exit status."""
    call = interrupted.reenter(thread)
    result = puppet.fall_asleep(call) if call is not None else None
    puppet.put_on(interrupted.final_registers(thread, result), thread.xstate, 0)
    ptrace.cont(puppet.tid)
    return os.waitstatus_to_exitcode(puppet.wait_exit())


HOUR_CALLS = {
    "nanosleep": (NR.nanosleep, (DATA, DATA + 64)),
    "clock_nanosleep": (NR.clock_nanosleep, (1, 0, DATA, 0)),
    "poll": (NR.poll, (0, 0, HOUR_S * 1000)),
    "futex": (NR.futex, (DATA + 32, 128, 0, DATA, 0, 0)),
}


@pytest.mark.parametrize("name", HOUR_CALLS)
def test_a_rebuilt_sleep_ends_after_the_time_left(puppet: Puppet, name: str) -> None:
    """The whole sleep is an hour: only the time left lets this test end."""
    number, args = HOUR_CALLS[name]
    thread = sleeping(puppet, number, args, 50_000_000)
    expected = -errno.ETIMEDOUT & 255 if name == "futex" else 0
    begin = time.monotonic()
    assert go_on(puppet, thread) == expected
    assert time.monotonic() - begin >= 0.05


def test_a_rebuilt_sleep_that_is_over_ends_at_once(puppet: Puppet) -> None:
    assert go_on(puppet, sleeping(puppet, NR.nanosleep, (DATA, 0), 0)) == 0


def test_a_rebuilt_sleep_can_be_interrupted_and_tells_the_rest(puppet: Puppet) -> None:
    thread = sleeping(puppet, NR.nanosleep, (DATA, DATA + 64), HOUR_S * 10**9 // 2)
    # a handler that returns by rt_sigreturn: mov $15,%eax; syscall. Its frame's return address is the restorer.
    os.pwrite(puppet.memory, b"\xc3", CODE + 64)
    os.pwrite(puppet.memory, bytes.fromhex("b80f0000000f05"), CODE + 80)
    puppet.syscall(
        NR.rt_sigaction, signal.SIGUSR1, struct.pack("<4Q", CODE + 64, 0x0400_0000, CODE + 80, 0), 0, 8
    )
    call = interrupted.reenter(thread)
    assert call is not None
    result = puppet.fall_asleep(call)
    assert result == arch.ERESTART_RESTARTBLOCK
    final = arch.Registers(interrupted.final_registers(thread, result)).replace(rsp=AREA + (1 << 19))
    puppet.put_on(final.pack(), thread.xstate, 0)
    memory = os.open(f"/proc/{puppet.pid}/mem", os.O_RDONLY)
    try:
        ptrace.cont(puppet.tid)
        await_sleep(puppet.pid, NR.nanosleep, NR.restart_syscall)
        os.kill(puppet.pid, signal.SIGUSR1)
        stop = ptrace.wait(puppet.tid)
        assert stop is not None
        assert stop.signal == signal.SIGUSR1
        ptrace.set_options(puppet.tid, 1 << 6)  # PTRACE_O_TRACEEXIT: the memory is still there
        ptrace.cont(puppet.tid, signal.SIGUSR1)
        stop = ptrace.wait(puppet.tid)
        assert stop is not None
        seconds, _ = struct.unpack("<2q", os.pread(memory, 16, DATA + 64))
        assert HOUR_S // 2 - 60 <= seconds < HOUR_S // 2
        ptrace.cont(puppet.tid)
        assert os.waitstatus_to_exitcode(puppet.wait_exit()) == -errno.EINTR & 255
    finally:
        os.close(memory)


def test_a_poll_that_has_something_to_tell_is_over(puppet: Puppet) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"x")
        (number,) = puppet.send_fds([reader])
        os.pwrite(puppet.memory, struct.pack("<ihh", number, select.POLLIN, 0), DATA + 128)
        thread = sleeping(puppet, NR.poll, (DATA + 128, 1, HOUR_S * 1000), HOUR_S * 10**9)
        assert go_on(puppet, thread) == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_without_the_time_left_the_call_is_issued_again(puppet: Puppet) -> None:
    os.pwrite(puppet.memory, struct.pack("<2q", 0, 1000), DATA)
    assert go_on(puppet, sleeping(puppet, NR.nanosleep, (DATA, 0), None)) == 0


# -- restartable sequences --------------------------------------------------------------------

RSEQ = AREA + 16384
DESCRIPTOR = RSEQ + 64
COUNT = RSEQ + 128
SIGNATURE = 0x53053053


def sequence(puppet: Puppet) -> tuple[int, int, int]:
    """Registers an area and writes a program that sits in a sequence for ever; (begin, end, abort address).

    start: mov $DESCRIPTOR,%rax; mov $RSEQ+8,%rbx; mov %rax,(%rbx); inside: jmp inside;
    signature; abort: mov $COUNT,%rbx; incq (%rbx); jmp start
    """
    start = CODE + 256
    code = (
        b"\x48\xb8"
        + struct.pack("<Q", DESCRIPTOR)
        + b"\x48\xbb"
        + struct.pack("<Q", RSEQ + 8)
        + b"\x48\x89\x03"
    )
    inside = start + len(code)
    code += b"\xeb\xfe" + struct.pack("<I", SIGNATURE)
    abort = start + len(code)
    code += b"\x48\xbb" + struct.pack("<Q", COUNT) + b"\x48\xff\x03"
    code += b"\xe9" + struct.pack("<i", start - (start + len(code) + 5))
    os.pwrite(puppet.memory, code, start)
    os.pwrite(puppet.memory, struct.pack("<IIQQQ", 0, 0, inside, 2, abort), DESCRIPTOR)
    puppet.syscall(NR.rseq, RSEQ, 32, 0, SIGNATURE)
    regs = arch.Registers(ptrace.get_regs(puppet.tid)).replace(rip=start, orig_rax=-1)
    ptrace.set_regs(puppet.tid, regs.pack())
    return inside, inside + 2, abort


def run_a_while(puppet: Puppet) -> arch.Registers:
    ptrace.cont(puppet.tid)
    time.sleep(0.01)
    ptrace.interrupt(puppet.tid)
    stop = ptrace.wait(puppet.tid)
    assert stop is not None
    assert stop.event == ptrace.EVENT.STOP
    return arch.Registers(ptrace.get_regs(puppet.tid))


def stopped_inside(puppet: Puppet, inside: int, end: int) -> arch.Registers:
    for _ in range(200):
        regs = run_a_while(puppet)
        if inside <= regs["rip"] < end:
            return regs
    raise AssertionError("never stopped inside the sequence")


def test_a_thread_stopped_in_a_sequence_goes_on_at_its_abort_address(puppet: Puppet) -> None:
    inside, end, abort = sequence(puppet)
    before = stopped_inside(puppet, inside, end)
    interrupted.settle(puppet.tid)
    settled = arch.Registers(ptrace.get_regs(puppet.tid))
    assert settled["rip"] == abort
    assert settled.replace(rip=before["rip"]).pack() == before.pack()
    # borrowed for a call and set free again, as a live target is: the sequence counts as aborted
    (count,) = struct.unpack("<Q", os.pread(puppet.memory, 8, COUNT))
    puppet.syscall(NR.getpid)
    ptrace.set_regs(puppet.tid, settled.pack())
    assert inside <= run_a_while(puppet)["rip"] <= abort + 64
    assert struct.unpack("<Q", os.pread(puppet.memory, 8, COUNT))[0] > count


def test_without_it_the_kernel_would_forget_the_sequence(puppet: Puppet) -> None:
    """Why `settle` is needed: after a borrowed call the pointer to the sequence is gone."""
    inside, end, _ = sequence(puppet)
    stopped_inside(puppet, inside, end)
    puppet.syscall(NR.getpid)
    assert os.pread(puppet.memory, 8, RSEQ + 8) == bytes(8)


def test_a_wrong_signature_is_left_to_the_kernel(puppet: Puppet) -> None:
    inside, end, abort = sequence(puppet)
    stopped_inside(puppet, inside, end)
    os.pwrite(puppet.memory, bytes(4), abort - 4)
    before = ptrace.get_regs(puppet.tid)
    interrupted.settle(puppet.tid)
    assert ptrace.get_regs(puppet.tid) == before
