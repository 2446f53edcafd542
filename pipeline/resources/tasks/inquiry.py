"""What a stopped task is, asked from outside and, where only it can tell, from inside.

Everything that needs a system call inside the task goes into one batch (`Inquiry`),
because each entry into a live target costs it a stop. The rest comes from /proc,
ptrace and calls that take a pid.

Not preserved: CPU times and fault counters; the default that PR_SET_TIMERSLACK 0 goes
back to. Refused here (the task itself has to tell): a disabled cpuid instruction, AMX tiles, a
local descriptor table. Keyrings: `pipeline.resources.tasks.keyrings`; all that prctl(2) sets:
`pipeline.resources.tasks.attributes`.

Sources: prctl(2), arch_prctl(2), ptrace(2), sigaction(2).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from msgspec.structs import replace

from pipeline.errors import Blocker, TargetError
from pipeline.ids import HostPid
from pipeline.image.schema import PosixTimer, Rseq, SessionKeyring, SignalAction, Thread
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, syscall
from pipeline.remote.calls import Call, Out
from pipeline.resources.tasks import credentials, interrupted, scheduling, seccomp, signals, timers
from pipeline.resources.tasks.attributes import Attributes
from pipeline.resources.tasks.keyrings import Keyrings

_ARCH_GET_CPUID = 0x1011
_ARCH_GET_XCOMP_PERM = 0x1022
_XFEATURE_TILE_DATA = 18


@dataclass
class Inquiry:
    """One batch of questions to a task; `leader` also answers for its process.

    `known`: its /proc/TID/status, where that was read in the same stop.
    """

    tid: HostPid
    leader: bool
    timers: Sequence[procfs.Timer] = ()
    known: procfs.Status | None = None
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._altstack = self._ask(NR.sigaltstack, 0, Out(24))
        self._tid_address = self._ask(NR.prctl, PRCTL.GET_TID_ADDRESS, Out(8))
        self._pdeathsig = self._ask(NR.prctl, PRCTL.GET_PDEATHSIG, Out(4))
        self._securebits = self._number(PRCTL.GET_SECUREBITS)
        self._timer_slack = self._number(PRCTL.GET_TIMERSLACK)
        self._cpuid = self._call(NR.arch_prctl, _ARCH_GET_CPUID, 0)
        self._attributes = Attributes(self.leader, self._call)
        self._keyrings = Keyrings(self.status.uids, self.leader, self._call)
        if not self.leader:
            return
        self._actions = [self._ask(NR.rt_sigaction, signal, 0, Out(32), 8) for signal in signals.SIGNALS]
        self._itimers = [self._ask(NR.getitimer, which, Out(32)) for which in range(3)]
        self._timer_values = [self._ask(NR.timer_gettime, timer.id, Out(32)) for timer in self.timers]
        self._subreaper = self._ask(NR.prctl, PRCTL.GET_CHILD_SUBREAPER, Out(4))
        self._dumpable = self._number(PRCTL.GET_DUMPABLE)
        self._thp_disable = self._number(PRCTL.GET_THP_DISABLE)
        self._permitted_features = self._ask(NR.arch_prctl, _ARCH_GET_XCOMP_PERM, Out(8))
        self._descriptor_table = self._call(NR.modify_ldt, 0, Out(8), 8)

    def _ask(self, number: int, *args: int | Out) -> Out:
        self.calls.append(Call(number, args, may_fail=True))
        for arg in args:
            if isinstance(arg, Out):
                return arg
        raise ValueError("nothing is to be filled in")

    def _call(self, number: int, *args: int | Out) -> Call:
        call = Call(number, args, may_fail=True)
        self.calls.append(call)
        return call

    def _number(self, option: PRCTL) -> Call:
        return self._call(NR.prctl, option, 0, 0, 0, 0)

    @cached_property
    def status(self) -> procfs.Status:
        """/proc/TID/status, which stays what it is while the task is stopped."""
        return self.known or procfs.status(self.tid)

    def further(self) -> list[Call]:
        """What follows from the first answers, and is to be run, too."""
        asked = len(self.calls)
        self._attributes.further(self.leader, self._call)
        self._keyrings.further(self._call)
        return self.calls[asked:]

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
        return [timers.interval_timer(answer.data) for answer in self._itimers]

    def posix_timers(self, member: Callable[[int], int]) -> list[PosixTimer]:
        """Every POSIX timer by id, with its remaining time; `member` gives the level-0 pid of a thread."""
        return [
            timers.posix_timer(timer, answer.data, member)
            for timer, answer in sorted(
                zip(self.timers, self._timer_values, strict=True), key=lambda pair: pair[0].id
            )
        ]

    def session_keyring(self, userns: int) -> SessionKeyring | None:
        """See `Keyrings.session`."""
        return self._keyrings.session(userns)

    def child_subreaper(self) -> bool:
        """PR_GET_CHILD_SUBREAPER."""
        return any(self._subreaper.data)

    def dumpable(self) -> int:
        """PR_GET_DUMPABLE."""
        return self._dumpable.check()

    def thp_disable(self) -> int:
        """PR_GET_THP_DISABLE."""
        return max(self._thp_disable.result, 0)

    def of_memory(self) -> dict[str, int]:
        """Further fields of `AddressSpace`."""
        return self._attributes.of_memory()

    def of_thread(self) -> dict[str, int | bytes]:
        """Further fields of `Thread`."""
        return self._attributes.of_thread()

    def blockers(self, subject: str, own_users: bool = False) -> Iterator[Blocker]:
        """States that are not carried, which only the task itself could tell.

        Args:
            own_users: it is in a user namespace of the tree.
        """
        if not self.leader:
            subject += f" thread {self.tid}"
        if self._cpuid.result == 0:
            yield Blocker(subject, "has the cpuid instruction disabled (ARCH_SET_CPUID)")
        if self.status.seccomp_filters:
            yield from seccomp.check_filters(subject, seccomp.seccomp(self.tid, self.status))
        yield from self._keyrings.blockers(subject, own_users)
        if not self.leader:
            return
        if int.from_bytes(self._permitted_features.data, "little") >> _XFEATURE_TILE_DATA & 1:
            yield Blocker(subject, "has the permission to use AMX tiles (ARCH_REQ_XCOMP_PERM)")
        if self._descriptor_table.result > 0:
            yield Blocker(subject, "has a local descriptor table (modify_ldt)")


def _robust_list(tid: HostPid) -> tuple[int, int]:
    head, size = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
    syscall(NR.get_robust_list, tid, head, size)
    return int.from_bytes(head.raw, "little"), int.from_bytes(size.raw, "little")


def thread_record(
    inquiry: Inquiry,
    userns: int,
    member: Callable[[int], int],
    slept_ns: int | None = None,
    call: int | None = None,
) -> Thread:
    """The record of a stopped thread, which `interrupted.settle` was called for at its stop.

    Args:
        inquiry: answered by it.
        userns: the `UserNamespace` index it is in.
        member: level-0 pid of a process or thread of the tree, 0 for others.
        slept_ns: how long the call had lasted that it was stopped in, where `interrupted.Sleepers` knows.
        call: which one that was, likewise.

    Raises:
        TargetError: it changed under our hands.
    """
    tid = inquiry.tid
    status = inquiry.status
    area = ptrace.get_rseq(tid)
    registers = interrupted.in_its_call(arch.Registers(ptrace.get_regs(tid)), call).pack()
    if status.seccomp_filters and not status.seccomp:
        raise TargetError(f"thread {tid} has seccomp filters and no seccomp mode")
    record = Thread(
        pids=list(status.ns_pid),
        comm=procfs.read_file(tid, "comm").removesuffix(b"\n"),
        registers=registers,
        xstate=ptrace.get_xstate(tid),
        sigmask=ptrace.get_sigmask(tid),
        pending=signals.pending(tid, shared=False, member=member, status=status),
        altstack=inquiry.altstack(),
        tid_address=inquiry.tid_address(),
        robust_list=_robust_list(tid),
        rseq=Rseq(*area) if area else None,
        credentials=credentials.captured(status, userns, inquiry.securebits()),
        scheduling=scheduling.scheduling(tid),
        seccomp=seccomp.seccomp(tid, status),
        pdeathsig=inquiry.pdeathsig(),
        personality=int(procfs.read_file(tid, "personality"), 16),
        timer_slack_ns=inquiry.timer_slack_ns(),
        sleep_left_ns=interrupted.sleep_left_ns(arch.Registers(registers), slept_ns, interrupted.reader(tid)),
    )
    return replace(record, **inquiry.of_thread())
