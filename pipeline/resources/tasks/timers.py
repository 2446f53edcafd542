"""Interval timers and POSIX timers of a process.

A timer is made under its own id while the process is a puppet, and armed last, with the
time that it had left when the process was stopped: it stood still meanwhile.

Not preserved: the overrun count of a signal not yet taken; whether an expiry was given
as an absolute time (a timer on CLOCK_REALTIME does not follow a clock that is set).
Refused: timers on clocks that are open files (PTP), and thread-time timers in a process
of several threads, where the kernel does not say whose time is measured.

Sources: timer_create(2), getitimer(2), proc_pid_timers(5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.image.schema import PosixTimer, Process
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call, Out, Remote
from pipeline.resources.support import Support

_SIGEV_THREAD_ID = 4
#: the low three bits of a negative clock number say what it is; the rest is whose, 0 being the creator
_CLOCK_KIND = 7
_CLOCK_OF_FD = 3
_CLOCK_OF_THREAD = 4
_NS = 10**9
_US = 10**6

SUPPORT = Support(
    kind="timers",
    carried=(
        "interval timers, POSIX timers under their numbers, with time left, interval and whom they tell",
    ),
    refused=("a timer on a clock that is an open file; a timer on the time of one of several threads",),
    shown_by=("programs/signals.py", "resources/test_tasks_state.py"),
)


# -- capture ---------------------------------------------------------------------------


def check_timers(subject: str, timers: Sequence[procfs.Timer], threads: int) -> Iterator[Blocker]:
    """Timers that are not carried.

    Args:
        subject: how a message names the process.
        timers: its timers.
        threads: how many threads it has.
    """
    for timer in timers:
        if timer.clock >= 0:
            continue
        if timer.clock & _CLOCK_KIND == _CLOCK_OF_FD:
            yield Blocker(subject, f"timer {timer.id} runs on a clock that is an open file")
        elif timer.clock & _CLOCK_OF_THREAD and not ~(timer.clock >> 3) and threads > 1:
            yield Blocker(
                subject,
                f"timer {timer.id} measures the time of one of {threads} threads (CLOCK_THREAD_CPUTIME_ID), "
                "and the kernel does not say of which",
            )


def posix_timer(timer: procfs.Timer, value: bytes, member: Callable[[int], int]) -> PosixTimer:
    """The record of a timer; `value` is the `struct itimerspec` of timer_gettime, `member` as for signals."""
    interval_s, interval_ns, value_s, value_ns = struct.unpack("<4q", value)
    to_thread = timer.thread is not None
    return PosixTimer(
        id=timer.id,
        clock=timer.clock,
        notify=timer.notify | (_SIGEV_THREAD_ID if to_thread else 0),
        signal=timer.signal,
        sigval=timer.sigval,
        thread=member(timer.thread) if timer.thread is not None else None,
        interval_ns=interval_s * _NS + interval_ns,
        value_ns=value_s * _NS + value_ns,
    )


def interval_timer(value: bytes) -> tuple[int, int]:
    """(interval, value) in microseconds of a `struct itimerval`."""
    interval_s, interval_us, value_s, value_us = struct.unpack("<4q", value)
    return interval_s * _US + interval_us, value_s * _US + value_us


# -- rebuild ---------------------------------------------------------------------------


def make_timers(process: Process, puppet: Remote) -> None:
    """Make every POSIX timer under its own id, not armed; all threads of the process exist.

    Raises:
        RebuildError: a timer cannot be made, or gets another id.
    """
    if not process.timers:
        return
    subject = f"pid {process.pids[0]}"
    restore_ids = Call(NR.prctl, (PRCTL.TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0), may_fail=True)
    puppet.run([restore_ids])
    tids = {thread.pids[0]: thread.pids[-1] for thread in process.threads}
    for timer in sorted(process.timers, key=lambda timer: timer.id):
        if timer.notify & _SIGEV_THREAD_ID and timer.thread not in tids:
            raise RebuildError(f"{subject}: POSIX timer {timer.id} signals a thread that is not its own")
        tid = tids.get(timer.thread or 0, 0)
        event = struct.pack("<Qiii", timer.sigval, timer.signal, timer.notify, tid).ljust(64, b"\0")
        while True:
            number = Out(4, timer.id.to_bytes(4, "little", signed=True))
            try:
                puppet.syscall(NR.timer_create, timer.clock, event, number)
            except OSError as error:
                reason = f"POSIX timer {timer.id} on clock {timer.clock}: {error.strerror}"
                raise RebuildError(f"{subject}: {reason}") from error
            made = int.from_bytes(number.data, "little", signed=True)
            if made == timer.id:
                break
            # an older kernel counts up: unwanted numbers are given back
            puppet.syscall(NR.timer_delete, made)
            if made > timer.id:
                raise RebuildError(f"{subject}: POSIX timer {timer.id} got number {made}")
    if restore_ids.result == 0:
        puppet.syscall(NR.prctl, PRCTL.TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)


def timer_calls(process: Process) -> Iterator[Call]:
    """Arm the interval timers and the POSIX timers with the time they had left."""
    for which, (interval_us, value_us) in enumerate(process.itimers):
        if value_us:
            spec = struct.pack("<4q", *divmod(interval_us, _US), *divmod(value_us, _US))
            yield Call(NR.setitimer, (which, spec, 0), name=f"interval timer {which}")
    for timer in process.timers:
        if timer.value_ns:
            spec = struct.pack("<4q", *divmod(timer.interval_ns, _NS), *divmod(timer.value_ns, _NS))
            yield Call(NR.timer_settime, (timer.id, 0, spec, 0), name=f"POSIX timer {timer.id}")
