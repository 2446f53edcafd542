"""Giving the puppets of one process the state of its tasks, in the order the kernel accepts.

1. Through /proc, while its files are ours: OOM score, core dump filter.
2. Per thread: name, scheduling, the areas that the kernel writes to. Per process: signal
   actions, child subreaper.
3. Seccomp filters, where they can be suspended (see `seccomp`).
4. Ids and capabilities of every thread, and a look at what came out.
5. What a change of ids resets, or what cannot be taken back: dumpable (one per address
   space: after *all* threads), THP, parent death signal, no_new_privs.
6. Queued signals, then the timers are armed, then limits, which would bound all of these.
7. Interrupted sleeps are entered again.
8. Seccomp filters, where they cannot be suspended.

Before that, in other places: supplementary groups (`credentials.before_join`), POSIX
timers are made when the threads are there (`timers.make_timers`).

Sources: the man pages of each call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.image.schema import AddressSpace, Process, Thread
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.tasks import (
    attributes,
    credentials,
    inherited,
    interrupted,
    limits,
    scheduling,
    seccomp,
    signals,
    timers,
)
from pipeline.resources.tasks.credentials import Number

_ROBUST_LIST_BYTES = 24


def check_here(processes: Sequence[Process]) -> Iterator[Blocker]:
    """What this host or this restorer cannot give; asked before anything is built."""
    yield from inherited.check_inherited(processes)
    yield from limits.check_limits(processes)
    for process in processes:
        yield from scheduling.check_processors(process)


def reinstate(
    process: Process, space: AddressSpace | None, puppets: Sequence[Puppet], uid: Number, gid: Number
) -> list[bytes]:
    """Give a process its task state; its puppets have memory, descriptors, threads and (unarmed) timers.

    Args:
        process: the record.
        space: its memory's record.
        puppets: one a thread, the leader's first, in the process's user namespace.
        uid: translate ids.
        gid: translate ids.

    Returns:
        The registers of each thread, to be put on as the last thing.

    Raises:
        RebuildError: the kernel refuses a step; says which.
    """
    leader, threads = puppets[0], process.threads
    pairs = list(zip(threads, puppets, strict=True))
    subject = f"pid {process.pids[0]}"
    stop_signal = signals.stop_signal(process)
    for puppet in puppets:
        puppet.stop_with(stop_signal)
    _write_process_files(process, space, leader)
    attributes.set_autogroup(process, leader)
    calls = _Calls(subject, puppets)
    calls.add(leader, _process_calls(process))
    for thread, puppet in pairs:
        calls.add(puppet, _thread_calls(thread, puppet))
    filtered = any(thread.seccomp.filters for thread in threads)
    suspended = filtered and seccomp.suspend(puppets)
    if suspended:
        calls.run()
        seccomp.install_filters(process, puppets)
    for thread, puppet in pairs:
        now = procfs.status(puppet.tid)
        calls.add(puppet, credentials.after_join(thread.credentials, uid, gid, now))
        calls.add(puppet, _last_calls(thread))
    calls.add(leader, _memory_calls(space))
    for index, puppet in enumerate(puppets):
        calls.add(puppet, signals.queue_calls(process, index, uid))
    calls.add(leader, timers.timer_calls(process))
    calls.run()
    for thread, puppet in pairs:
        credentials.check_result(thread, puppet, uid, gid)
    calls.add(leader, limits.limit_calls(process, leader))
    calls.run()
    registers = [_fall_asleep(thread, puppet) for thread, puppet in pairs]
    if filtered and not suspended:
        seccomp.install_filters(process, puppets)
    return registers


class _Calls:
    """Calls for each thread of a process, all of which are run at once: each change to a puppet takes its time.

    Args:
        subject: what a failure is said of.
        puppets: one a thread, the leader's first.
    """

    def __init__(self, subject: str, puppets: Sequence[Puppet]) -> None:
        self._subject = subject
        self._waiting: dict[Puppet, list[Call]] = {puppet: [] for puppet in puppets}

    def add(self, puppet: Puppet, calls: Iterator[Call]) -> None:
        """Run these behind those that wait."""
        self._waiting[puppet] += calls

    def run(self) -> None:
        """Run what waits; the leader's last: what is said of the memory is reset when any thread changes its ids.

        Raises:
            RebuildError: the kernel refuses one of them.
        """
        for puppet in reversed(self._waiting):
            calls, self._waiting[puppet] = self._waiting[puppet], []
            try:
                puppet.run_checked(calls)
            except OSError as error:
                raise RebuildError(f"{self._subject}: {error.strerror}") from error


def _process_calls(process: Process) -> Iterator[Call]:
    yield from signals.action_calls(process)
    if process.child_subreaper:
        yield Call(NR.prctl, (PRCTL.SET_CHILD_SUBREAPER, 1, 0, 0, 0), name="child subreaper")


def _thread_calls(thread: Thread, puppet: Puppet) -> Iterator[Call]:
    yield Call(NR.prctl, (PRCTL.SET_NAME, thread.comm + b"\0", 0, 0, 0), name="name")
    yield Call(NR.set_tid_address, (thread.tid_address,))
    yield from scheduling.scheduling_calls(thread, puppet)
    if thread.timer_slack_ns:  # 0 is what real-time tasks say; to set it means "the default"
        yield Call(NR.prctl, (PRCTL.SET_TIMERSLACK, thread.timer_slack_ns, 0, 0, 0), name="timer slack")
    if thread.robust_list[0]:
        yield Call(NR.set_robust_list, (thread.robust_list[0], _ROBUST_LIST_BYTES), name="robust list")
    if thread.rseq is not None:
        area = thread.rseq
        yield Call(NR.rseq, (area.address, area.size_bytes, area.flags, area.signature), name="rseq")
    yield from signals.altstack_calls(thread)
    yield from attributes.thread_calls(thread)
    yield Call(NR.personality, (thread.personality,), name="personality")


def _memory_calls(space: AddressSpace | None) -> Iterator[Call]:
    """Properties of the address space that a change of ids resets.

    "Dumpable by root" (2) cannot be asked for: it becomes "not dumpable", never more.
    """
    if space is None:
        return
    if space.thp_disable:
        flags = space.thp_disable & ~1
        yield Call(NR.prctl, (PRCTL.SET_THP_DISABLE, 1, flags, 0, 0), name="transparent huge pages")
    yield Call(NR.prctl, (PRCTL.SET_DUMPABLE, int(space.dumpable == 1), 0, 0, 0), name="dumpable")
    yield from attributes.memory_calls(space)


def _last_calls(thread: Thread) -> Iterator[Call]:
    if thread.pdeathsig:
        yield Call(NR.prctl, (PRCTL.SET_PDEATHSIG, thread.pdeathsig, 0, 0, 0), name="parent death signal")
    if thread.credentials.no_new_privs:
        yield Call(NR.prctl, (PRCTL.SET_NO_NEW_PRIVS, 1, 0, 0, 0), name="no_new_privs")


def _fall_asleep(thread: Thread, puppet: Puppet) -> bytes:
    call = interrupted.reenter(thread)
    return interrupted.final_registers(thread, puppet.fall_asleep(call) if call is not None else None)


def _write_process_files(process: Process, space: AddressSpace | None, puppet: Puppet) -> None:
    _write_if_other(puppet, "oom_score_adj", str(process.oom_score_adj), int)
    if space is not None:
        _write_if_other(puppet, "coredump_filter", f"0x{space.coredump_filter:x}", lambda text: int(text, 16))


def _write_if_other(puppet: Puppet, name: str, value: str, read: Callable[[bytes], int]) -> None:
    if read(procfs.read_file(puppet.pid, name)) == int(value, 0):
        return
    fd = os.open(f"/proc/{puppet.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise RebuildError(f"pid {puppet.pid}: {name} {value} cannot be set: {error.strerror}") from error
    finally:
        os.close(fd)
