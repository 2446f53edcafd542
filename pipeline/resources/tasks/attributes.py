"""Settings of tasks that have no file of their own: what prctl(2) and its kin set, one by one.

Each is carried, refused by name, or not kept for a reason. prctl(2) on x86-64, completely:

* carried here: MCE_KILL (what memory errors do to a thread), TSC, MDWE, MEMORY_MERGE; of other calls: the memory
  policy of a thread (set_mempolicy(2)), registrations of membarrier(2), the nice value of the session's autogroup.
* carried elsewhere: NAME, PDEATHSIG (of the root where the restorer stays as its parent), TIMERSLACK,
  CHILD_SUBREAPER, DUMPABLE, THP_DISABLE, NO_NEW_PRIVS
  (`reinstate`); KEEPCAPS, SECUREBITS, CAPBSET, CAP_AMBIENT (`credentials`); SECCOMP (`seccomp`); SET_MM, SET_VMA,
  GET_AUXV (`pipeline.resources.memory`); TIMER_CREATE_RESTORE_IDS is only on while timers are made.
* refused: ARCH_SET_CPUID (`inquiry`); SYSCALL_USER_DISPATCH (`refusals`: a call of ours would be
  dispatched, too); SPECULATION_CTRL, IO_FLUSHER, shadow stacks and linear address masking (`refusals`); SCHED_CORE
  (`scheduling`); permission for AMX tiles (`inquiry`).
* not kept: the number of slots for private futexes (FUTEX_HASH) is speed only, and the kernel chooses it itself;
  TIMING has one value; TASK_PERF_EVENTS is about perf descriptors, which are refused; PTRACER
  (Yama) is shown to nobody, and names a process that may trace this one.
* not on this processor: UNALIGN, FPEMU, FPEXC, ENDIAN, MPX, FP_MODE, SVE, SME, PAC, TAGGED_ADDR, RISCV_*, DEXCR.

Shown to nobody: Landlock domains; the default that TIMERSLACK 0 goes back to; MCL_FUTURE; ioperm(2).

Sources: prctl(2), set_mempolicy(2), membarrier(2), sched(7) on autogroups; kernel/sys.c.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import AddressSpace, Process, Thread
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call, Out
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

_MCE_KILL_SET = 1
_TSC_SIGSEGV = 2
_NODES = 1024
#: membarrier(2): asks for the registrations, since 6.3; each is made again by its own bit
_GET_REGISTRATIONS = 1 << 9
_REGISTRATIONS = tuple(1 << bit for bit in (2, 4, 6, 8))
#: barriers of a process for itself, which are refused without the registration that is the next bit; that of others
#: for everybody, whose registration shows nowhere else
_EXPEDITED = tuple(1 << bit for bit in (3, 5, 7))
_GLOBAL_REGISTRATION = 1 << 2
_AUTOGROUP_TRIES, _AUTOGROUP_PAUSE_S = 20, 0.02

SUPPORT = Support(
    kind="settings",
    carried=(
        "personality, parent death signal, timer slack, child subreaper, dumpable, huge pages off, merging of pages",
        "memory-deny-write-execute, what memory errors do, memory policy, membarrier registrations",
        "a disabled time stamp counter, OOM score adjustment, core dump filter, login uid, nice value of an autogroup",
    ),
    refused=(
        "a disabled cpuid instruction, speculation switched off, syscall user dispatch, I/O flushers",
        "shadow stacks, linear address masking, AMX tiles, a local descriptor table, 32-bit code",
        "confinement by a security module that the restorer is not in",
    ),
    shown_by=("programs/attributes.py", "test_tasks_refused.py", "resources/test_login.py"),
)


class Attributes:
    """The questions to one task.

    Args:
        leader: whether it also answers for its process.
        ask: adds a call that may fail to those that the task will run.
    """

    def __init__(self, leader: bool, ask: Callable[..., Call]) -> None:
        self._mce_kill = ask(NR.prctl, PRCTL.MCE_KILL_GET, 0, 0, 0, 0)
        self._tsc = Out(4)
        ask(NR.prctl, PRCTL.GET_TSC, self._tsc, 0, 0, 0)
        self._mode, self._nodes = Out(4), Out(_NODES // 8)
        self._policy = ask(NR.get_mempolicy, self._mode, self._nodes, _NODES, 0, 0)
        if leader:
            self._mdwe = ask(NR.prctl, PRCTL.GET_MDWE, 0, 0, 0, 0)
            self._merge = ask(NR.prctl, PRCTL.GET_MEMORY_MERGE, 0, 0, 0, 0)
            self._barriers = ask(NR.membarrier, _GET_REGISTRATIONS, 0, 0)
        self._expedited: list[Call] = []

    def further(self, leader: bool, ask: Callable[..., Call]) -> None:
        """Questions that follow from the answers: before Linux 6.3 a barrier itself tells whether it was registered."""
        if leader and self._barriers.result == -errno.EINVAL:
            self._expedited = [ask(NR.membarrier, command, 0, 0) for command in _EXPEDITED]

    def of_thread(self) -> dict[str, int | bytes]:
        """Fields of `Thread`."""
        found: dict[str, int | bytes] = {}
        if int.from_bytes(self._tsc.data, "little") == _TSC_SIGSEGV:
            found["no_tsc"] = True
        if self._mce_kill.result >= 0:
            found["mce_kill"] = self._mce_kill.result
        if self._policy.result >= 0:
            found["memory_policy"] = int.from_bytes(self._mode.data, "little")
            found["memory_nodes"] = self._nodes.data.rstrip(b"\0")
        return found

    def of_memory(self) -> dict[str, int]:
        """Fields of `AddressSpace`."""
        calls = {"mdwe": self._mdwe, "merge": self._merge, "membarrier": self._barriers}
        found = {name: call.result for name, call in calls.items() if call.result > 0}
        if self._expedited:
            # being registered for the barriers of others costs an interrupt, not being so would break them
            found["membarrier"] = _GLOBAL_REGISTRATION
            for command, call in zip(_EXPEDITED, self._expedited, strict=True):
                if call.result == 0:
                    found["membarrier"] |= command << 1
        return found


def autogroup_nice(pid: HostPid) -> int:
    """The nice value of the autogroup of a process, which is that of its session; 0 where there is none."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/autogroup", "rb") as file:
        return int(file.read().rpartition(b" ")[2])
    return 0


# -- rebuild -----------------------------------------------------------------------------


def thread_calls(thread: Thread) -> Iterator[Call]:
    """What is a thread's own."""
    yield Call(NR.prctl, (PRCTL.MCE_KILL, _MCE_KILL_SET, thread.mce_kill, 0, 0), name="memory error policy")
    if thread.no_tsc:
        yield Call(NR.prctl, (PRCTL.SET_TSC, _TSC_SIGSEGV, 0, 0, 0), name="no time stamp counter")
    if thread.memory_policy:
        mask = thread.memory_nodes.ljust(_NODES // 8, b"\0")
        name = f"memory policy {thread.memory_policy:#x}"
        yield Call(NR.set_mempolicy, (thread.memory_policy, mask, _NODES), name=name)
    else:
        yield Call(NR.set_mempolicy, (0, 0, 0), may_fail=True)  # a kernel for one node may not know it


def memory_calls(space: AddressSpace) -> Iterator[Call]:
    """What belongs to an address space; nothing is mapped in it any more after this."""
    for registration in _REGISTRATIONS:
        if space.membarrier & registration:
            yield Call(NR.membarrier, (registration, 0, 0), name=f"membarrier registration {registration:#x}")
    if space.merge:
        yield Call(NR.prctl, (PRCTL.SET_MEMORY_MERGE, 1, 0, 0, 0), name="merging of memory")
    if space.mdwe:
        yield Call(NR.prctl, (PRCTL.SET_MDWE, space.mdwe, 0, 0, 0), name="memory-deny-write-execute")


def set_autogroup(process: Process, puppet: Puppet) -> None:
    """Give the session of a process its nice value; who may not do so often waits.

    Raises:
        RebuildError: the kernel refuses it.
    """
    if not process.sid or autogroup_nice(puppet.pid) == process.autogroup_nice:
        return
    for _ in range(_AUTOGROUP_TRIES):
        try:
            with open(f"/proc/{puppet.pid}/autogroup", "wb", buffering=0) as file:
                file.write(b"%d" % process.autogroup_nice)
                return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                what = f"pid {process.pids[0]}: nice {process.autogroup_nice} of its autogroup"
                raise RebuildError(f"{what}: {error.strerror}") from error
        time.sleep(_AUTOGROUP_PAUSE_S)
    raise RebuildError(f"pid {process.pids[0]}: the nice value of its autogroup: {os.strerror(errno.EAGAIN)}")
