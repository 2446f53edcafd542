"""System calls that were interrupted by the stop, and how they go on in another process.

The kernel leaves its intention in the result register of a stopped thread:

* -512, -513, -514: issue the call again if no handler runs. The kernel does so for any
  task that is set free from an event stop, a rebuilt one too.
* -516: go on with a *restart block*, which holds how long the sleep has still to last
  and which a new task does not have. Where the time left is known, the puppet starts
  the same call with that time and is interrupted in it: then the kernel itself holds a
  true restart block. Where it is not known, the call is issued again with its
  arguments: it may last longer than asked for, never shorter.
* -4 (EINTR) from calls that are never restarted (epoll_wait and its like): being stopped
  by us is no reason to fail. It becomes -514: the call is issued again, unless a handler
  runs first; then the program sees EINTR as it should. epoll_wait and epoll_pwait, whose time is in
  a register, get the time that is left; the others their whole time.

A thread that goes on with a restart block is in restart_syscall(2) from then on, with the arguments of the call that it
goes on with; which one that was only shows in where it sleeps (/proc/TID/wchan). `Sleepers` sees that, too, and in the
record it is in that call again.

The time left: nanosleep(2) tells it itself where the program gave it room; else it
follows from when the thread fell asleep, which the scheduler shows for a *sleeping* task
(/proc/TID/sched). So `Sleepers` looks before the freeze, and believes what it saw only
if the thread was woken exactly once since: by the freeze.

Not preserved: the time that had passed of a call whose time stands in memory or belongs to a socket (epoll_pwait2,
sigtimedwait, semtimedop, io_getevents, SO_RCVTIMEO, SO_SNDTIMEO): it starts anew, for a stop and for a restore alike. A
write to a pipe that was stopped with a part of its bytes written returns that part, as signal(7) allows.
Not preserved: absolute times on CLOCK_MONOTONIC mean the clock of the host where the
tree goes on, unless it is in a time namespace.

Sources: restart_syscall(2), signal(7) on interrupted calls; kernel/time/hrtimer.c,
fs/select.c, kernel/futex/waitwake.c, kernel/sched/debug.c.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import msgspec

from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import Thread
from pipeline.kernel import procfs, ptrace, rseq
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import read_memory
from pipeline.remote.calls import Call
from pipeline.resources.support import Support

_EINTR = -4
_NS = 10**9
_TIMER_ABSTIME = 1
_FUTEX_COMMAND = 0x7F
_FUTEX_WAIT = 0
#: calls that report EINTR after any stop, some of them only with a timeout on a socket; nothing is done
#: yet when they do. See signal(7), "Interruption of system calls and library functions by stop signals".
_NEVER_RESTARTED = frozenset({
    NR.epoll_wait, NR.epoll_pwait, NR.epoll_pwait2, NR.semop, NR.semtimedop, NR.rt_sigtimedwait,
    NR.io_getevents, NR.io_pgetevents, NR.read, NR.readv, NR.recvfrom, NR.recvmsg, NR.recvmmsg, NR.accept, NR.accept4,
    NR.write, NR.writev, NR.sendto, NR.sendmsg, NR.sendmmsg, NR.connect, NR.io_uring_enter,
})  # fmt: skip
#: calls that leave a restart block
_SLEEPS = frozenset({NR.nanosleep, NR.clock_nanosleep, NR.poll, NR.futex})
#: calls that are issued again, whose time in milliseconds is their fourth argument
_TIMED = frozenset({NR.epoll_wait, NR.epoll_pwait})
_LOWEST_ADDRESS = 4096
#: a time of epoll_wait; what is negative as an int is for ever
_LONGEST_MS = 0x7FFF_FFFF
#: where a nap sleeps, or who called it, if the kernel counts the nap itself as part of its scheduler
_NAPS = (b"nanosleep", b"nsleep", b"restart_syscall", b"do_syscall")

SUPPORT = Support(
    kind="system calls under way",
    carried=(
        "sleeps with the time they have left (nanosleep, clock_nanosleep, poll, futex)",
        "waits that go on (read, wait4, epoll_wait, semop, sigtimedwait, recv with a timeout and the like)",
    ),
    refused=("a sleep that was interrupted before, where this kernel does not say which (waited for)",),
    shown_by=("programs/blocked.c", "programs/asleep.py", "resources/test_tasks_interrupted.py"),
)


#: reads (address, size in bytes) of the thread's memory; raises OSError
Read = Callable[[int, int], bytes]


# -- before the freeze -------------------------------------------------------------------


class _Asleep(msgspec.Struct, frozen=True):
    """A thread seen sleeping in `call`: since how long, in nanoseconds, and how often it had gone to sleep before.

    `slept_ns` is None where the scheduler's clock is not known.
    """

    slept_ns: int | None
    switches: int
    call: int


_EXEC_START = re.compile(rb"^se\.exec_start\s*:\s*(\d+)\.(\d{6})", re.MULTILINE)
_SWITCHES = re.compile(rb"^nr_voluntary_switches\s*:\s*(\d+)", re.MULTILINE)


class Slept(NamedTuple):
    """How long a thread had slept when it was stopped, and in which system call; None: it did not, or nobody knows."""

    slept_ns: int | None
    call: int | None


class Sleepers:
    """Threads that sleep for a time, looked at while the tree runs, and again when it is stopped.

    Every method runs in one thread, which is moved to other processors for a moment: their clocks differ.
    """

    def __init__(self) -> None:
        self._clocks: dict[int, int | None] = {}
        self._seen: dict[int, _Asleep] = {}
        self._prepared: dict[int, Slept] = {}

    def look(self, pids: Iterable[HostPid]) -> None:
        """Look at every thread of these running processes; whoever is gone or shows nothing is passed over."""
        for pid in pids:
            with suppress(OSError):
                for tid in procfs.tasks(pid):
                    with suppress(OSError, ValueError):
                        seen = self._look_at(tid)
                        if seen is not None:
                            self._seen[tid] = seen

    def prepare(self, tid: HostPid) -> Slept:
        """Let a call that is issued again be the one it was, and wait for what is left of its time.

        Called in a stop, after `settle`, before anything is run inside the thread: that wakes it, and it would not be
        known any more how long it had slept. One that goes on with a restart block loses that where we are killed
        while something is run in it (`arch.resumed_elsewhere`), and restart_syscall(2) would fail then. It is done
        once; who asks again is told the same.

        Returns:
            The call that the thread was stopped in, if it is one that has a time, and how long that had lasted, at
            least. Nothing is known of one that was not seen, or has been awake since by itself.

        Raises:
            ProcessLookupError: it was killed.
        """
        if tid not in self._prepared:
            slept = self._slept(tid)
            _prepare(tid, slept)
            self._prepared[tid] = slept
        return self._prepared[tid]

    def prepare_all(self, tids: Iterable[HostPid]) -> None:
        """`prepare` each; who was killed is passed over."""
        for tid in tids:
            with suppress(ProcessLookupError):
                self.prepare(tid)

    def _slept(self, tid: HostPid) -> Slept:
        seen = self._seen.get(tid)
        if seen is not None:
            with suppress(OSError, ValueError):
                if _scheduler(tid)[1] == seen.switches + 1:
                    return Slept(seen.slept_ns, seen.call)
        return Slept(None, None)

    def _look_at(self, tid: HostPid) -> _Asleep | None:
        words = procfs.read_file(tid, "syscall").split()
        call = int(words[0]) if words[0].isdigit() else -1
        if call == NR.restart_syscall:
            call = _gone_on_with(procfs.read_file(tid, "wchan"), int(words[1], 16))
        if call not in _SLEEPS | _TIMED:
            return None
        since, switches = _scheduler(tid)
        clock = self._clock(procfs.thread_stat(tid).processor)
        known = clock is not None and since
        return _Asleep(max(0, (clock or 0) + time.monotonic_ns() - since) if known else None, switches, call)

    def _clock(self, processor: int) -> int | None:
        """What to add to CLOCK_MONOTONIC for the scheduler's clock of a processor."""
        if processor not in self._clocks:
            self._clocks[processor] = None
            with suppress(OSError, ValueError):
                self._clocks[processor] = _read_clock(processor)
        return self._clocks[processor]


def _gone_on_with(where: bytes, first_argument: int) -> int:
    """The call that restart_syscall(2) goes on with, by the function of the kernel that it sleeps in; -1: not known."""
    if b"futex" in where:
        return NR.futex
    if b"poll" in where:
        return NR.poll
    if any(name in where for name in _NAPS):
        # the number of a clock, or the address of a time
        return NR.clock_nanosleep if first_argument < _LOWEST_ADDRESS else NR.nanosleep
    return -1


def _scheduler(tid: int | str) -> tuple[int, int]:
    """When the task last ran, in nanoseconds of its processor's scheduler clock, and its voluntary switches.

    Raises:
        ValueError: this kernel does not say.
        OSError: the task is gone, or has no such file.
    """
    with open(f"/proc/{tid}/sched", "rb", buffering=0) as file:
        content = file.read()
    start, switches = _EXEC_START.search(content), _SWITCHES.search(content)
    if start is None or switches is None:
        raise ValueError("/proc/PID/sched has an unknown form")
    return int(start[1]) * 1_000_000 + int(start[2]), int(switches[1])


def _read_clock(processor: int) -> int:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {processor})
        os.sched_yield()  # brings our own time stamp up to date
        now, _ = _scheduler("thread-self")
        return now - time.monotonic_ns()
    finally:
        os.sched_setaffinity(0, before)


# -- at the stop -------------------------------------------------------------------------


def settle(tid: HostPid) -> None:
    """Take back what our stopping has done to a thread: out of a restartable sequence, no needless EINTR.

    Called right after the stop, before anything is run inside the thread. Holds for the thread as well
    when we are killed: the kernel restarts the call, or would have left the sequence itself.
    """
    try:
        raw = ptrace.get_regs(tid)
        if len(raw) != arch.REGISTERS_BYTES:
            return  # 32-bit code, which is refused later
        stopped = arch.Registers(raw)
        calm = undisturbed(stopped)
        if not stopped.in_syscall:
            calm = rseq.settled(stopped, ptrace.get_rseq(tid), reader(tid))
        if calm is not stopped:
            ptrace.set_regs(tid, calm.pack())
    except ProcessLookupError:
        return  # it was killed meanwhile; whoever awaits its end will see that


def reader(tid: HostPid) -> Read:
    """Reads the memory of a task."""
    return lambda address, size_bytes: read_memory(tid, RemoteAddress(address), size_bytes)


def undisturbed(regs: arch.Registers) -> arch.Registers:
    """The registers of a thread in an event stop without the EINTR that is only due to our stopping it."""
    if not regs.in_syscall or regs.syscall_result != _EINTR or regs["orig_rax"] not in _NEVER_RESTARTED:
        return regs
    return regs.replace(rax=arch.ERESTARTNOHAND)


def _prepare(tid: HostPid, slept: Slept) -> None:
    """See `Sleepers.prepare`; the register that holds a time is one that no caller of a wrapper keeps anything in."""
    slept_ns, call = slept
    if call is None:
        return
    regs = arch.Registers(ptrace.get_regs(tid))
    if _goes_on(regs):
        ptrace.set_regs(tid, in_its_call(regs, call).pack())
    elif slept_ns is not None and _is_issued_again(regs):
        whole_ms = regs["r10"] & 0xFFFF_FFFF
        if 0 < whole_ms <= _LONGEST_MS:
            ptrace.set_regs(tid, regs.replace(r10=max(0, whole_ms - slept_ns // 1_000_000)).pack())


def _is_issued_again(regs: arch.Registers) -> bool:
    """With a time in a register."""
    return regs.in_syscall and regs.syscall_result == arch.ERESTARTNOHAND and regs["orig_rax"] in _TIMED


# -- capture -----------------------------------------------------------------------------


def is_lost(tid: HostPid, call: int | None) -> bool:
    """Whether a thread was stopped in restart_syscall(2), and nobody knows what it goes on with there."""
    raw = ptrace.get_regs(tid)
    return call is None and len(raw) == arch.REGISTERS_BYTES and _goes_on(arch.Registers(raw))


def _goes_on(regs: arch.Registers) -> bool:
    return (
        regs.in_syscall
        and regs.syscall_result == arch.ERESTART_RESTARTBLOCK
        and regs["orig_rax"] == NR.restart_syscall
    )


def in_its_call(regs: arch.Registers, call: int | None) -> arch.Registers:
    """The registers of a thread as if it had been stopped in the call that it goes on with; see `Sleepers.prepare`."""
    return regs.replace(orig_rax=call) if call is not None and _goes_on(regs) else regs


def sleep_left_ns(regs: arch.Registers, slept_ns: int | None, read: Read) -> int | None:
    """How long the sleep that a thread was stopped in has still to last, in nanoseconds.

    Args:
        regs: as it was stopped.
        slept_ns: how long it had lasted, see `Sleepers.prepare`.
        read: of its memory.

    Returns:
        None if it is not in a relative sleep with a restart block, or the time is not known.
    """
    if not regs.in_syscall or regs.syscall_result != arch.ERESTART_RESTARTBLOCK:
        return None
    args = regs.syscall_args
    with suppress(OSError, struct.error):
        match regs["orig_rax"]:
            case NR.nanosleep:
                return _of_nap(args[0], args[1], slept_ns, read)
            case NR.clock_nanosleep if not args[1] & _TIMER_ABSTIME:
                return _of_nap(args[2], args[3], slept_ns, read)
            case NR.poll:
                return _rest((args[2] & 0x7FFF_FFFF) * 1_000_000, slept_ns)
            case NR.futex if args[1] & _FUTEX_COMMAND == _FUTEX_WAIT and args[3]:
                return _rest(_time(args[3], read), slept_ns)
    return None


def _of_nap(request: int, remaining: int, slept_ns: int | None, read: Read) -> int | None:
    # the kernel has written the rest when it was interrupted, if there was room for it
    return _time(remaining, read) if remaining else _rest(_time(request, read), slept_ns)


def _rest(whole_ns: int, slept_ns: int | None) -> int | None:
    return None if slept_ns is None else max(0, whole_ns - slept_ns)


def _time(address: int, read: Read) -> int:
    seconds, nanoseconds = struct.unpack("<2q", read(address, 16))
    return int(seconds) * _NS + int(nanoseconds)


# -- rebuild -----------------------------------------------------------------------------


def reenter(thread: Thread) -> Call | None:
    """The call that a puppet falls asleep in, so that the kernel holds a restart block for `thread`.

    Pointers to what the call writes are the program's own; its memory is complete.

    Returns:
        None if there is no such sleep, or it is not known how long it has still to last.
    """
    regs, left_ns = arch.Registers(thread.registers), thread.sleep_left_ns
    if left_ns is None or not regs.in_syscall or regs.syscall_result != arch.ERESTART_RESTARTBLOCK:
        return None
    args = regs.syscall_args
    span = struct.pack("<2q", *divmod(left_ns, _NS))
    match regs["orig_rax"]:
        case NR.nanosleep:
            return Call(NR.nanosleep, (span, args[1]))
        case NR.clock_nanosleep:
            return Call(NR.clock_nanosleep, (args[0], args[1], span, args[3]))
        case NR.poll:
            return Call(NR.poll, (args[0], args[1], -(-left_ns // 1_000_000)))
        case NR.futex:
            return Call(NR.futex, (args[0], args[1], args[2], span, *args[4:]))
    return None


def final_registers(thread: Thread, reentered: int | None = None) -> bytes:
    """The registers with which a thread goes on.

    Args:
        thread: the record.
        reentered: the result of the call of `reenter`, where the puppet has run it: -516 if it sleeps in
            it; anything else is the end of the call, and what the program gets.
    """
    regs = arch.Registers(thread.registers)
    if not regs.in_syscall or regs.syscall_result != arch.ERESTART_RESTARTBLOCK:
        return regs.pack()
    if reentered == arch.ERESTART_RESTARTBLOCK:
        return regs.pack()
    if reentered is not None:
        return regs.replace(rax=reentered, orig_rax=-1).pack()
    return arch.resumed_elsewhere(regs).pack()
