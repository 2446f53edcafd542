"""What a stopped task is, asked from outside and, where only it can tell, from inside.

Everything that needs a system call inside the task goes into one batch (`Inquiry`),
because each entry into a live target costs it a stop. The rest comes from /proc,
ptrace and calls that take a pid.

Not preserved: CPU times and fault counters; the overrun count of POSIX timers; the
alternate stack's SS_AUTODISARM moment in a running handler is kept as it is.
Refused: memory-deny-write-execute, a disabled time stamp counter, I/O flusher state,
syscall user dispatch, 32-bit code, strict seccomp without the right to read filters.

Sources: prctl(2), ptrace(2), sigaction(2), timer_create(2), proc_pid_timers(5).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.errors import Blocker, TargetError
from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import (
    Credentials,
    Id,
    PendingSignal,
    PosixTimer,
    Rseq,
    Scheduling,
    Seccomp,
    SignalAction,
    Thread,
)
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, syscall
from pipeline.remote.calls import Call, Out

SIGNALS = range(1, 65)
#: signals whose siginfo names a sending process: kill, sigqueue, tgkill, message queues
_SENT_BY_SOMEBODY = {0, -1, -3, -6}
_SIGCHLD = 17
_SEV_THREAD_ID = 4
_SECCOMP_FILTER_FLAG_LOG = 2
_IOPRIO_WHO_PROCESS = 1
_SCHED_ATTR = struct.Struct("<IIQiIQQQ")


@dataclass
class Inquiry:
    """One batch of questions to a task; `leader` also answers for its process."""

    tid: HostPid
    leader: bool
    timers: Sequence[procfs.Timer] = ()
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._altstack = self._ask(NR.sigaltstack, 0, Out(24))
        self._tid_address = self._ask(NR.prctl, PRCTL.GET_TID_ADDRESS, Out(8))
        self._pdeathsig = self._ask(NR.prctl, PRCTL.GET_PDEATHSIG, Out(4))
        self._tsc = self._ask(NR.prctl, PRCTL.GET_TSC, Out(4))
        self._securebits = self._number(PRCTL.GET_SECUREBITS)
        self._timer_slack = self._number(PRCTL.GET_TIMERSLACK)
        self._io_flusher = self._number(PRCTL.GET_IO_FLUSHER)
        if not self.leader:
            return
        self._actions = [self._ask(NR.rt_sigaction, signal, 0, Out(32), 8) for signal in SIGNALS]
        self._itimers = [self._ask(NR.getitimer, which, Out(32)) for which in range(3)]
        self._timer_values = [self._ask(NR.timer_gettime, timer.id, Out(32)) for timer in self.timers]
        self._subreaper = self._ask(NR.prctl, PRCTL.GET_CHILD_SUBREAPER, Out(4))
        self._dumpable = self._number(PRCTL.GET_DUMPABLE)
        self._thp_disable = self._number(PRCTL.GET_THP_DISABLE)
        self._mdwe = self._number(PRCTL.GET_MDWE)
        self._merge = self._number(PRCTL.GET_MEMORY_MERGE)
        self._brk = Call(NR.brk, (0,))
        self.calls.append(self._brk)

    def _ask(self, number: int, *args: int | Out) -> Out:
        answer = next(arg for arg in args if isinstance(arg, Out))
        self.calls.append(Call(number, args, may_fail=True))
        return answer

    def _number(self, option: PRCTL) -> Call:
        call = Call(NR.prctl, (option, 0, 0, 0, 0), may_fail=True)
        self.calls.append(call)
        return call

    # -- answers of every task --------------------------------------------------

    def altstack(self) -> tuple[int, int, int]:
        """Alternate signal stack: address, SS_* flags, size in bytes."""
        address, flags, size = struct.unpack("<QI4xQ", self._altstack.data)
        return address, flags, size

    def tid_address(self) -> int:
        """clear_child_tid."""
        return int.from_bytes(self._tid_address.data, "little")

    def pdeathsig(self) -> int:
        """PR_GET_PDEATHSIG."""
        return int.from_bytes(self._pdeathsig.data, "little")

    def securebits(self) -> int:
        """PR_GET_SECUREBITS."""
        return self._securebits.check()

    def timer_slack_ns(self) -> int:
        """PR_GET_TIMERSLACK, in nanoseconds."""
        return max(self._timer_slack.result, 0)

    # -- answers of the leader, for the process -----------------------------------

    def actions(self) -> list[SignalAction]:
        """The action of every signal from 1 on: handler, flags, restorer, mask."""
        return [SignalAction(*struct.unpack("<4Q", answer.data)) for answer in self._actions]

    def itimers(self) -> list[tuple[int, int]]:
        """ITIMER_REAL, VIRTUAL, PROF: (interval, value) in microseconds."""
        result = []
        for answer in self._itimers:
            interval_s, interval_us, value_s, value_us = struct.unpack("<4q", answer.data)
            result.append((interval_s * 1_000_000 + interval_us, value_s * 1_000_000 + value_us))
        return result

    def posix_timers(self, tree_thread: Callable[[int], int]) -> list[PosixTimer]:
        """Every POSIX timer with its remaining time; `tree_thread` gives the level-0 pid of a thread."""
        result = []
        for timer, answer in zip(self.timers, self._timer_values, strict=True):
            interval_s, interval_ns, value_s, value_ns = struct.unpack("<4q", answer.data)
            result.append(
                PosixTimer(
                    id=timer.id,
                    clock=timer.clock,
                    notify=timer.notify,
                    signal=timer.signal,
                    sigval=timer.sigval,
                    thread=tree_thread(timer.thread) if timer.thread is not None else None,
                    interval_ns=interval_s * 10**9 + interval_ns,
                    value_ns=value_s * 10**9 + value_ns,
                )
            )
        return result

    def child_subreaper(self) -> bool:
        """PR_GET_CHILD_SUBREAPER."""
        return any(self._subreaper.data)

    def dumpable(self) -> int:
        """PR_GET_DUMPABLE."""
        return self._dumpable.check()

    def thp_disable(self) -> int:
        """PR_GET_THP_DISABLE."""
        return max(self._thp_disable.result, 0)

    def brk(self) -> RemoteAddress:
        """The program break."""
        return RemoteAddress(self._brk.check())

    def blockers(self, subject: str) -> Iterator[Blocker]:
        """States that are not carried, which only the task itself could tell."""
        if int.from_bytes(self._tsc.data, "little") == 2:
            yield Blocker(subject, "reading the time stamp counter is disabled (PR_SET_TSC)")
        if self._io_flusher.result > 0:
            yield Blocker(subject, "is an I/O flusher (PR_SET_IO_FLUSHER)")
        if self.leader and self._mdwe.result > 0:
            yield Blocker(subject, "denies writable executable memory (PR_SET_MDWE), which the rebuild needs")
        if self.leader and self._merge.result > 0:
            yield Blocker(subject, "merges all of its memory (PR_SET_MEMORY_MERGE)")


def check_task(pid: HostPid) -> Iterator[Blocker]:
    """States of a process and its threads that are not carried, as far as /proc tells; touches nothing."""
    threads = procfs.tasks(pid)
    leader = procfs.status(pid)
    if leader.state in "ZX" and len(threads) > 1:
        yield Blocker(f"pid {pid}", "its first thread has ended and others run", "wait for them")
        return
    for tid in threads:
        subject = f"pid {pid}" + (f" thread {tid}" if tid != pid else "")
        status = procfs.status(tid)
        if status.seccomp and not _may_read_filters():
            yield Blocker(
                subject,
                "has a seccomp filter, which only root in the initial user namespace may read",
                "run the pipeline as root",
            )
        if status.seccomp == 1:
            yield Blocker(subject, "is in strict seccomp mode, in which it cannot be asked anything")
        if _namespaces(tid) != _namespaces(pid):
            yield Blocker(subject, "is in other namespaces than the first thread of its process")


def _namespaces(tid: HostPid) -> list[tuple[int, int]]:
    found = []
    for name in ("user", "mnt", "uts", "ipc", "net", "cgroup", "time"):
        result = os.stat(f"/proc/{tid}/ns/{name}")
        found.append((result.st_dev, result.st_ino))
    return found


def _may_read_filters() -> bool:
    admin = 21
    return bool(procfs.status(HostPid(os.getpid())).caps[2] >> admin & 1)


def signal_of(info: bytes, member: Callable[[int], int]) -> PendingSignal:
    """A queued siginfo_t with its sender made explicit, where it has one."""
    number, _, code, pid, uid = struct.unpack_from("<iii4xiI", info)
    if code in _SENT_BY_SOMEBODY or (number == _SIGCHLD and code > 0):
        return PendingSignal(info, Id(0, uid), member(pid))
    return PendingSignal(info)


def scheduling(tid: HostPid) -> Scheduling:
    """Policy, priorities, affinity and I/O priority of a task (sched_getattr, ioprio_get)."""
    raw = bytearray(_SCHED_ATTR.size)
    buffer = (len(raw)).to_bytes(4, "little") + bytes(len(raw) - 4)
    _, policy, flags, _, priority, runtime, deadline, period = _SCHED_ATTR.unpack(
        _filled(NR.sched_getattr, tid, buffer)
    )
    ioprio = syscall(NR.ioprio_get, _IOPRIO_WHO_PROCESS, tid)
    return Scheduling(
        policy=policy,
        flags=flags,
        nice=os.getpriority(os.PRIO_PROCESS, tid),
        priority=priority,
        runtime_ns=runtime,
        deadline_ns=deadline,
        period_ns=period,
        affinity=sorted(os.sched_getaffinity(tid)),
        ioprio=ioprio,
    )


def _filled(number: int, tid: int, initial: bytes) -> bytes:
    import ctypes

    buffer = ctypes.create_string_buffer(initial, len(initial))
    syscall(number, tid, buffer, len(initial), 0)
    return buffer.raw


def _robust_list(tid: HostPid) -> tuple[int, int]:
    import ctypes

    head, size = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    syscall(NR.get_robust_list, tid, head, size)
    return int.from_bytes(head.raw, "little"), int.from_bytes(size.raw, "little")


def credentials(status: procfs.Status, userns: int, securebits: int) -> Credentials:
    """All ids and capabilities of a task; ids as the pipeline sees them (`Id(0, …)`)."""
    inheritable, permitted, effective, bounding, ambient = status.caps
    return Credentials(
        userns=userns,
        uids=[Id(0, uid) for uid in status.uids],
        gids=[Id(0, gid) for gid in status.gids],
        groups=[Id(0, gid) for gid in status.groups],
        caps=[inheritable, permitted, effective, bounding, ambient],
        securebits=securebits,
        no_new_privs=status.no_new_privs,
    )


def _seccomp(tid: HostPid, status: procfs.Status) -> Seccomp:
    filters: list[bytes] = []
    log: list[bool] = []
    for index in range(status.seccomp_filters):
        program = ptrace.seccomp_get_filter(tid, index)
        if program is None:
            raise TargetError(f"thread {tid}: seccomp filter {index} is not there")
        filters.insert(0, program)
        log.insert(0, bool(ptrace.seccomp_get_flags(tid, index) & _SECCOMP_FILTER_FLAG_LOG))
    return Seccomp(mode=status.seccomp, filters=filters, log=log)


def thread_record(inquiry: Inquiry, userns: int, member: Callable[[int], int]) -> Thread:
    """The record of a stopped thread.

    Args:
        inquiry: answered by it.
        userns: the `UserNamespace` index it is in.
        member: level-0 pid of a process or thread of the tree, 0 for others.

    Raises:
        TargetError: it runs 32-bit code.
    """
    tid = inquiry.tid
    status = procfs.status(tid)
    registers = ptrace.get_regs(tid)
    if len(registers) != arch.REGISTERS_BYTES or not arch.Registers(registers).is_64_bit:
        raise TargetError(f"thread {tid} runs 32-bit code, which is not carried")
    rseq = ptrace.get_rseq(tid)
    return Thread(
        pids=list(status.ns_pid),
        comm=procfs.read_file(tid, "comm").rstrip(b"\n"),
        registers=registers,
        xstate=ptrace.get_xstate(tid),
        sigmask=ptrace.get_sigmask(tid),
        pending=[signal_of(info, member) for info in ptrace.peek_siginfo(tid, shared=False)],
        altstack=inquiry.altstack(),
        tid_address=inquiry.tid_address(),
        robust_list=_robust_list(tid),
        rseq=Rseq(*rseq) if rseq else None,
        credentials=credentials(status, userns, inquiry.securebits()),
        scheduling=scheduling(tid),
        seccomp=_seccomp(tid, status),
        pdeathsig=inquiry.pdeathsig(),
        personality=int(procfs.read_file(tid, "personality"), 16),
        timer_slack_ns=inquiry.timer_slack_ns(),
    )
