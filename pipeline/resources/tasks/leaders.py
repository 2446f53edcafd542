"""A first thread that has ended while the others of its process run on (pthread_exit in main).

The kernel keeps it as a zombie, because its number is that of the process, until the last thread has ended; then the
parent gets the exit code of the first thread, unless all were ended at once. A zombie has no memory and no descriptors,
so its process is looked at by way of another thread: its *face*.

At the destination the first thread is made like any other, and ends by itself: set free, its first and only
instruction is exit(2) with the code that it ended with.

Not preserved: in a process that is stopped by job control the first thread ends when that goes on.

Sources: kernel/exit.c (delay_group_leader, wait_task_zombie), pthread_exit(3).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from msgspec.structs import replace

from pipeline.ids import HostPid
from pipeline.image.schema import Seccomp, Thread
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR, Registers
from pipeline.resources.support import Support
from pipeline.resources.tasks import credentials

_ENDED = "ZX"
_ALL_BLOCKED = 0xFFFF_FFFF_FFFF_FFFF

SUPPORT = Support(
    kind="threads",
    carried=(
        "number, name, registers, extended state, robust list, restartable sequence, address cleared at the end",
        "a working directory, root and umask of its own (unshare)",
        "a first thread that has ended while others run, with its exit code",
    ),
    refused=(
        "a thread with a descriptor table or namespaces of its own; directories shared by two threads only",
    ),
    shown_by=(
        "programs/threads.c",
        "programs/registers.c",
        "programs/leaderless.py",
        "programs/restartable.c",
    ),
)


def has_ended(pid: HostPid) -> bool:
    """Whether a process has ended with all of its threads.

    Raises:
        ProcessGone: it was collected, too.
    """
    while True:
        stat = procfs.stat(pid)
        if stat.state not in _ENDED:
            return False
        states = _states(pid)
        if any(state not in _ENDED for state in states.values()):
            return False
        # a thread that ends while they are listed may hide another one; and there are none of a first thread whose
        # number one that executes a program has got meanwhile
        if 0 < len(states) == stat.num_threads:
            return True


def face(pid: HostPid) -> HostPid:
    """By which of its threads a process can be looked at: the first one, unless it has ended and others run."""
    try:
        if procfs.stat(pid).state not in _ENDED:
            return pid
        return next((tid for tid, state in _states(pid).items() if state not in _ENDED), pid)
    except procfs.ProcessGone:
        return pid


def _states(pid: HostPid) -> dict[HostPid, str]:
    """The states of the threads of a process."""
    states: dict[HostPid, str] = {}
    for tid in procfs.tasks(pid):
        with suppress(procfs.ProcessGone):
            states[tid] = procfs.thread_stat(tid).state
    return states


def faces(pids: Iterable[HostPid]) -> dict[HostPid, HostPid]:
    """The faces of processes, as far as they are not their first threads."""
    return {pid: other for pid in pids if (other := face(pid)) != pid}


def capture(pid: HostPid, other: Thread) -> Thread:
    """The record of a first thread that has ended.

    Args:
        other: a thread that runs: what the ended one had is not to be known any more, and does not matter.
    """
    status, stat = procfs.status(pid), procfs.stat(pid)
    wanted = credentials.captured(status, other.credentials.userns, other.credentials.securebits)
    return replace(
        other,
        pids=list(status.ns_pid),
        comm=stat.comm[:15],
        sigmask=_ALL_BLOCKED,
        pending=[],
        altstack=(0, 2, 0),
        tid_address=0,
        robust_list=(0, 24),
        rseq=None,
        credentials=wanted,
        seccomp=Seccomp(),
        pdeathsig=0,
        place=None,
        sleep_left_ns=None,
        ended=stat.exit_code >> 8 & 0xFF,
    )


def last_registers(thread: Thread, syscall_instruction: int) -> bytes:
    """The registers with which a thread ends as soon as it is set free.

    Args:
        thread: has ended.
        syscall_instruction: address of one in a mapping of its process.
    """
    regs = Registers(thread.registers)
    return regs.replace(rip=syscall_instruction, rax=NR.exit, rdi=thread.ended or 0, orig_rax=-1).pack()
