"""Giving a puppet the state of a task, in the order the kernel accepts.

Once per process, while it has all capabilities: limits, signal actions, timers (made,
not armed). Then per thread: name, scheduling, areas the kernel writes to, ids and
capabilities. Then what ids and capabilities would have disturbed: dumpable, parent
death signal, no_new_privs. Then queued signals, and the timers are armed. Seccomp
filters are the very last: they judge every later call, ours too.

A relative sleep that was interrupted with a restart block (-516) is issued again with
its arguments: it may last longer than asked for, never shorter.

Sources: the man pages of each call; ptrace and signal entry code for -512..-516.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import RebuildError
from pipeline.image.schema import AddressSpace, Id, PendingSignal, Process, Thread
from pipeline.kernel import procfs
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call, In, Out
from pipeline.remote.puppet import Puppet
from pipeline.resources.tasks import credentials
from pipeline.resources.tasks.inquiry import scheduling

_SEV_THREAD_ID = 4
_RLIM_NLIMITS = 16
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_LOG = 2
_ROBUST_LIST_BYTES = 24
_LIMIT_NAMES = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
]


def stop_signal(process: Process) -> int:
    """A signal for the puppet to stop with that is not in the process's queues."""
    taken = {_number(p) for p in process.pending}
    taken |= {_number(p) for thread in process.threads for p in thread.pending}
    for candidate in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT, signal.SIGIO):
        if candidate not in taken:
            return candidate
    raise RebuildError(f"pid {process.pids[0]}: every signal that a puppet could stop with is queued")


def _number(pending: PendingSignal) -> int:
    number: int = struct.unpack_from("<i", pending.info)[0]
    return number


# -- the process ---------------------------------------------------------------------------


def process_calls(process: Process, puppet: Puppet) -> list[Call]:
    """State of the whole process that its leader sets while it may."""
    calls = list(_limits(process, puppet))
    calls += [
        Call(NR.rt_sigaction, (number, struct.pack("<4Q", a.handler, a.flags, a.restorer, a.mask), 0, 8),
             name=f"action of signal {number}")
        for number, a in enumerate(process.actions, 1)
        if number not in (signal.SIGKILL, signal.SIGSTOP)
    ]  # fmt: skip
    if process.child_subreaper:
        calls.append(Call(NR.prctl, (PRCTL.SET_CHILD_SUBREAPER, 1, 0, 0, 0), name="subreaper"))
    return calls


def _limits(process: Process, puppet: Puppet) -> Iterator[Call]:
    have = procfs.limits(puppet.pid)
    for resource, wanted in enumerate(process.limits[:_RLIM_NLIMITS]):
        if have[resource] != tuple(wanted):
            name = f"limit {_LIMIT_NAMES[resource]} {wanted[0]}:{wanted[1]} (now {have[resource][1]})"
            yield Call(NR.prlimit64, (0, resource, struct.pack("<2Q", *wanted), 0), name=name)


def make_timers(process: Process, puppet: Puppet) -> None:
    """Make every POSIX timer under its own id, not armed."""
    if not process.timers:
        return
    restore_ids = Call(NR.prctl, (PRCTL.TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0), may_fail=True)
    puppet.run([restore_ids])
    by_level = {thread.pids[0]: thread.pids[-1] for thread in process.threads}
    for timer in sorted(process.timers, key=lambda timer: timer.id):
        tid = by_level.get(timer.thread or 0, 0)
        notify = timer.notify | (_SEV_THREAD_ID if timer.thread is not None else 0)
        event = struct.pack("<Qiii", timer.sigval, timer.signal, notify, tid).ljust(64, b"\0")
        while True:
            number = Out(4, timer.id.to_bytes(4, "little", signed=True))
            puppet.syscall(NR.timer_create, timer.clock, event, number)
            made = int.from_bytes(number.data, "little", signed=True)
            if made == timer.id:
                break
            # an older kernel counts up: unwanted numbers are given back
            puppet.syscall(NR.timer_delete, made)
            if made > timer.id:
                raise RebuildError(f"pid {process.pids[0]}: POSIX timer {timer.id} got number {made}")
    if restore_ids.result == 0:
        puppet.syscall(NR.prctl, PRCTL.TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)


def timer_calls(process: Process) -> list[Call]:
    """Arm the interval timers and the POSIX timers with the time they had left."""
    calls = []
    for which, (interval_us, value_us) in enumerate(process.itimers):
        if value_us:
            spec = struct.pack("<4q", *divmod(interval_us, 1_000_000), *divmod(value_us, 1_000_000))
            calls.append(Call(NR.setitimer, (which, spec, 0), name="setitimer"))
    for timer in process.timers:
        if timer.value_ns:
            spec = struct.pack("<4q", *divmod(timer.interval_ns, 10**9), *divmod(timer.value_ns, 10**9))
            calls.append(Call(NR.timer_settime, (timer.id, 0, spec, 0), name="timer_settime"))
    return calls


def queue_calls(
    process: Process, index: int, sender: Callable[[PendingSignal], tuple[int, int]]
) -> list[Call]:
    """Queue the pending signals of thread `index`; the leader's call also queues the process's.

    Args:
        sender: pid and uid of a signal's sender as the receiving process sees them.
    """
    thread = process.threads[index]
    tgid, tid = process.pids[-1], thread.pids[-1]
    calls = [
        Call(NR.rt_tgsigqueueinfo, (tgid, tid, _number(p), _with_sender(p, sender)), name="queue signal")
        for p in thread.pending
    ]
    if index == 0:
        calls += [
            Call(NR.rt_sigqueueinfo, (tgid, _number(p), _with_sender(p, sender)), name="queue signal")
            for p in process.pending
        ]
    return calls


def _with_sender(pending: PendingSignal, sender: Callable[[PendingSignal], tuple[int, int]]) -> bytes:
    if pending.uid is None:
        return pending.info
    pid, uid = sender(pending)
    return pending.info[:16] + struct.pack("<iI", pid, uid) + pending.info[24:]


def write_process_files(process: Process, space: AddressSpace | None, puppet: Puppet) -> None:
    """What is set through /proc by the restorer: OOM score, core dump filter."""
    _write_if_other(puppet, "oom_score_adj", str(process.oom_score_adj))
    if space is not None:
        _write_if_other(puppet, "coredump_filter", f"0x{space.coredump_filter:x}", lambda text: int(text, 16))


def _write_if_other(puppet: Puppet, name: str, value: str, read: Callable[[bytes], int] = int) -> None:
    path = f"/proc/{puppet.pid}/{name}"
    with open(path, "rb") as file:
        now = read(file.read())
    if now == int(value, 0):
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise RebuildError(f"pid {puppet.pid}: {name} {value} cannot be set: {error.strerror}") from error
    finally:
        os.close(fd)


# -- each thread ------------------------------------------------------------------------------


def thread_calls(thread: Thread, puppet: Puppet) -> list[Call]:
    """State of a thread that is set while it has its capabilities."""
    calls = [
        Call(NR.prctl, (PRCTL.SET_NAME, thread.comm + b"\0", 0, 0, 0), name="name"),
        Call(NR.set_tid_address, (thread.tid_address,)),
        *_scheduling(thread, puppet),
        Call(NR.prctl, (PRCTL.SET_TIMERSLACK, thread.timer_slack_ns, 0, 0, 0), name="timer slack"),
    ]
    if thread.robust_list[0]:
        calls.append(
            Call(NR.set_robust_list, (thread.robust_list[0], _ROBUST_LIST_BYTES), name="robust list")
        )
    if thread.rseq is not None:
        area = thread.rseq
        calls.append(Call(NR.rseq, (area.address, area.size_bytes, area.flags, area.signature), name="rseq"))
    if not thread.altstack[1] & 2:
        address, flags, size = thread.altstack
        stack = struct.pack("<QI4xQ", address, flags & ~1, size)
        calls.append(Call(NR.sigaltstack, (stack, 0), name="alternate stack"))
    calls.append(Call(NR.personality, (thread.personality,), name="personality"))
    return calls


def _scheduling(thread: Thread, puppet: Puppet) -> Iterator[Call]:
    wanted = thread.scheduling
    if wanted.affinity != sorted(os.sched_getaffinity(puppet.tid)):
        mask = sum(1 << cpu for cpu in wanted.affinity)
        size = (max(wanted.affinity) // 64 + 1) * 8
        yield Call(
            NR.sched_setaffinity,
            (0, size, mask.to_bytes(size, "little")),
            name=f"affinity to processors {wanted.affinity}",
        )
    now = scheduling(puppet.tid)
    if now.nice != wanted.nice:
        # by itself: SCHED_IDLE keeps a nice value that sched_setattr does not set
        yield Call(NR.setpriority, (os.PRIO_PROCESS, 0, wanted.nice), name=f"nice {wanted.nice}")
    if (now.policy, now.flags, now.priority) != (wanted.policy, wanted.flags, wanted.priority):
        attributes = struct.pack(
            "<IIQiIQQQ",
            48,
            wanted.policy,
            wanted.flags,
            wanted.nice,
            wanted.priority,
            wanted.runtime_ns,
            wanted.deadline_ns,
            wanted.period_ns,
        )
        yield Call(NR.sched_setattr, (0, attributes, 0), name=f"scheduling policy {wanted.policy}")
    if now.ioprio != wanted.ioprio:
        yield Call(NR.ioprio_set, (1, 0, wanted.ioprio), name="I/O priority")


def last_calls(thread: Thread, space: AddressSpace | None, leader: bool) -> list[Call]:
    """What a change of ids resets, and what cannot be taken back."""
    calls = []
    if leader and space is not None:
        if space.thp_disable:
            calls.append(Call(NR.prctl, (PRCTL.SET_THP_DISABLE, space.thp_disable, 0, 0, 0), name="THP"))
        if space.dumpable in (0, 1):
            calls.append(Call(NR.prctl, (PRCTL.SET_DUMPABLE, space.dumpable, 0, 0, 0), name="dumpable"))
    if thread.pdeathsig:
        calls.append(Call(NR.prctl, (PRCTL.SET_PDEATHSIG, thread.pdeathsig, 0, 0, 0), name="pdeathsig"))
    if thread.credentials.no_new_privs:
        calls.append(Call(NR.prctl, (PRCTL.SET_NO_NEW_PRIVS, 1, 0, 0, 0), name="no_new_privs"))
    return calls


def install_filters(thread: Thread, puppet: Puppet) -> None:
    """Seccomp filters, oldest first; suspended for the calls that are still to come."""
    if not thread.seccomp.filters:
        return
    puppet.suspend_seccomp()
    for program, log in zip(thread.seccomp.filters, thread.seccomp.log, strict=True):
        fprog = In([len(program) // 8, In([program])])
        flags = _SECCOMP_FILTER_FLAG_LOG if log else 0
        puppet.syscall(NR.seccomp, _SECCOMP_SET_MODE_FILTER, flags, fprog)


def final_registers(thread: Thread) -> bytes:
    """The registers with which a thread goes on.

    An interrupted call that the kernel restarts by itself (-512..-514) is left to it: the task is set free
    from an event stop. A restart block does not exist in a new task: such a call is issued again.
    """
    regs = arch.Registers(thread.registers)
    if regs.in_syscall and regs.syscall_result == arch.ERESTART_RESTARTBLOCK:
        return arch.resumed_elsewhere(regs).pack()
    return regs.pack()


def number_of(userns: int, wanted: Id, number: credentials.Number) -> int:
    """A uid as a process of `userns` sees it in a siginfo; the overflow id where it is not mapped."""
    found = number(wanted, userns)
    return 65534 if found is None else found


__all__: Sequence[str] = (
    "final_registers", "install_filters", "last_calls", "make_timers", "number_of", "process_calls",
    "queue_calls", "stop_signal", "thread_calls", "timer_calls", "write_process_files",
)  # fmt: skip
