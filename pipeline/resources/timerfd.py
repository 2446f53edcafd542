"""timerfd_create(2) timers.

The kernel holds: clock, expiry, interval, the flags of the last settime, expirations
that nobody read yet. All are kept. A timer is armed last, in `finish`, with the time
that was left at the freeze: what passes while the tree does not run does not count. A
timer set to an absolute time (TFD_TIMER_ABSTIME) keeps that time, and is due at once if it
is past: of the wall clock, and of another clock as long as that goes on for the tree.

Capture asks timerfd_gettime(2), which brings an expired periodic timer up to date (the
program's next read would do the same). Not preserved: a clock change that
TFD_TIMER_CANCEL_ON_SET has not reported yet. Refused: a timer shared with a process
outside the tree. Source: timerfd_create(2), fs/timerfd.c; TFD_IOC_SET_TICKS needs
CONFIG_CHECKPOINT_RESTORE.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, U64, OpenFile, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400
_CLOCK_REALTIME_ALARM = 8
_WALL_CLOCKS = (time.CLOCK_REALTIME, _CLOCK_REALTIME_ALARM)
_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, _CLOCK_REALTIME_ALARM, 9)
#: struct itimerspec: interval and value, seconds and nanoseconds each
_ITIMERSPEC = struct.Struct("<4q")
_SECOND_NS = 1_000_000_000


class TimerfdState(Record, frozen=True, kw_only=True):
    """`value_ns`: time left, 0 if not armed; `due_ns`: the absolute time instead, by the clock of the pipeline.

    `flags`: those of the last timerfd_settime. `ticks`: expirations not read yet.
    """

    clock: U32
    flags: U32
    ticks: U64
    value_ns: U64
    interval_ns: U64
    due_ns: U64 | None = None


def _now_ns(clock: int) -> int:
    """The clock that a timer of clock number `clock` counts by, as this process sees it."""
    plain = {_CLOCK_REALTIME_ALARM: time.CLOCK_REALTIME, 9: time.CLOCK_BOOTTIME}.get(clock, clock)
    return time.clock_gettime_ns(plain)


class Timerfd(CompleteOnceCreated):
    """See the module."""

    name = "timerfd"
    record: type[TimerfdState] = TimerfdState
    carried: Sequence[str] = (
        "clock, time left or absolute wall clock time, interval, unread expirations, flags",
    )
    refused: Sequence[str] = ("a timer shared with a process outside the tree",)
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:[timerfd]"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Nobody else may hold it, and the clock must be a known one."""
        if "clockid" not in view.info:
            yield Blocker(
                view.subject, "this kernel does not describe timers in fdinfo", "enable CONFIG_PROC_FS"
            )
        elif int(view.info["clockid"][0]) not in _CLOCKS:
            yield Blocker(
                view.subject, f"a timer of clock {view.info['clockid'][0]} is not carried", "close it"
            )
        yield from outside.blockers(view, outside.same_file(view, scope), "the timer is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> TimerfdState:
        """Clock and flags from fdinfo, times from timerfd_gettime, then the expirations it counted up."""
        clock, flags = int(view.info["clockid"][0]), int(view.info["settime"][0].removeprefix("flags:"), 8)
        buffer = ctypes.create_string_buffer(_ITIMERSPEC.size)
        syscall(NR.timerfd_gettime, view.local, buffer)
        now = _now_ns(clock)
        interval_s, interval_ns, value_s, value_ns = _ITIMERSPEC.unpack(buffer.raw)
        left = value_s * _SECOND_NS + value_ns
        with open(f"/proc/self/fdinfo/{view.local}", "rb") as info:
            ticks = re.search(rb"^ticks:\s*(\d+)", info.read(), re.MULTILINE)
        absolute = bool(left) and bool(flags & TFD_TIMER_ABSTIME)
        return TimerfdState(
            clock=clock,
            flags=flags,
            ticks=int(ticks[1]) if ticks else 0,
            value_ns=left,
            interval_ns=interval_s * _SECOND_NS + interval_ns,
            due_ns=now + left if absolute else None,
        )

    def create(self, file: OpenFile, record: TimerfdState, scope: CreateScope) -> LocalFd:
        """A timer that is not armed.

        Raises:
            RebuildError: EPERM for an alarm clock without CAP_WAKE_ALARM.
        """
        try:
            return LocalFd(syscall(NR.timerfd_create, record.clock, os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise RebuildError(f"{describe(file)} cannot be made: {error.strerror}") from error

    def finish(self, file: OpenFile, record: TimerfdState, scope: CreateScope) -> None:
        """Arm it, then set the expirations not read yet (arming clears them).

        Raises:
            RebuildError: the kernel cannot set expirations.
        """
        timer = scope.file(file.index)
        value = record.value_ns
        if value and record.flags & TFD_TIMER_ABSTIME:
            value = self._due_here(file, record, scope)
        try:
            spec = _ITIMERSPEC.pack(*divmod(record.interval_ns, _SECOND_NS), *divmod(value, _SECOND_NS))
            syscall(NR.timerfd_settime, timer, record.flags, spec, None)
            if record.ticks:
                fcntl.ioctl(timer, TFD_IOC_SET_TICKS, record.ticks.to_bytes(8, "little"))
        except OSError as error:
            raise RebuildError(f"{describe(file)} cannot be armed: {error.strerror}") from error

    def _due_here(self, file: OpenFile, record: TimerfdState, scope: CreateScope) -> int:
        """The absolute time of a timer by our own clock."""
        if record.due_ns is not None and record.clock in _WALL_CLOCKS:
            return record.due_ns
        there = scope.tree_clock_ns(file.index, record.clock)
        left = record.value_ns if there is None or record.due_ns is None else record.due_ns - there
        return max(1, _now_ns(record.clock) + left)


KIND = Timerfd()
