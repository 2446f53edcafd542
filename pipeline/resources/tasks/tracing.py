"""Who traces whom, and who waits for a child that has borrowed its memory (vfork), or for a page of a userfaultfd.

A task has one tracer, and we have to be it: a program under a debugger or strace is refused, wherever the tracer is,
and so is a tracer of somebody outside the tree, whom it would lose. The tracee is not touched.

A parent in vfork(2) (posix_spawn(3) is such a one) cannot be stopped until its child executes a program or ends, and
shares its memory meanwhile. That is waited for; a child that never does is refused by name.

Nor can a task be stopped that runs into a missing page within a system call, until whoever answers for it brings it: it
tries again and again. Who is to bring it may stand still already; so all are let go, and it is tried anew.

Sources: ptrace(2), vfork(2), proc_pid_syscall(5); kernel/fork.c wait_for_vfork_done; fs/userfaultfd.c handle_userfault;
arch/x86/mm/fault.c fault_signal_pending.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress

from pipeline.errors import Blocker, passed_over
from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel import procfs, smaps
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, KCMP, kcmp, read_memory
from pipeline.resources.memory.classify import WATCHED
from pipeline.resources.support import Support

SUPPORT = Support(
    kind="tracing and vfork",
    carried=("a vfork or posix_spawn in progress is waited for",),
    refused=(
        "a traced task (debugger, strace), whether its tracer is in the tree or not",
        "a tracer of a process outside the tree",
        "a vfork child that neither executes a program nor ends",
        "a system call that waits for a page, if nobody brings it by userfaultfd",
    ),
    shown_by=("test_tasks_refused.py", "resources/test_userfault.py"),
)


def check_traced(pid: HostPid) -> Iterator[Blocker]:
    """Tasks of `pid` that somebody traces already."""
    for tid in procfs.tasks(pid):
        status = procfs.status(tid)
        if status.tracer_pid and status.tracer_pid != os.getpid():
            yield Blocker(
                f"pid {pid}" + (f" thread {tid}" if tid != pid else ""),
                f"is traced by pid {status.tracer_pid} ({procfs.comm(HostPid(status.tracer_pid))}), "
                "and a task can have one tracer only",
                "let the debugger detach, or end strace: the program runs on",
            )


def check_tracers(pids: Collection[HostPid]) -> Iterator[Blocker]:
    """Members of the tree that trace somebody outside of it."""
    members = set(pids)
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in members:
            with suppress(procfs.ProcessGone):
                tracer = procfs.status(HostPid(int(name))).tracer_pid
                if tracer in members:
                    yield Blocker(
                        f"pid {tracer}",
                        f"traces pid {name} ({procfs.comm(HostPid(int(name)))}), which is not part of the tree",
                        "let it detach",
                    )


def check_vfork(subject: str, tid: HostPid) -> Iterator[Blocker]:
    """Whether a task waits for its vfork child, which has its memory, or by CLONE_VFORK alone a copy of it."""
    with passed_over(), suppress(ValueError, procfs.ProcessGone):
        if procfs.stat(tid).state != "D" or not _in_vfork(tid):
            return
        children = [int(word) for word in procfs.read_file(tid, f"task/{tid}/children").split()]
        child = next((pid for pid in children if kcmp(tid, pid, KCMP.VM) == 0), None)
        if child is not None:
            named = f"its vfork child, pid {child}, which has its memory"
        elif children:  # the last one: it has borne nobody since
            named = f"its child of CLONE_VFORK, pid {children[-1]},"
        else:
            return
        yield Blocker(
            subject,
            f"waits for {named} until it executes a program",
            "let it do that, or end it",
            transient=True,
            hinders_stop=True,
        )


def check_page_fault(subject: str, tid: HostPid) -> Iterator[Blocker]:
    """Whether a task that was told to stop, and seems to sleep all the same, may wait for a page of a userfaultfd."""
    with passed_over(), suppress(procfs.ProcessGone):
        if any(mapping.flags & WATCHED for mapping in smaps.smaps(tid)):
            yield Blocker(
                subject,
                "waits in a system call for a page that a userfaultfd answers for, and cannot be stopped before",
                "let it be brought",
                transient=True,
                hinders_stop=True,
            )


def _in_vfork(tid: HostPid) -> bool:
    number, *args = procfs.read_file(tid, "syscall").split()
    match int(number):
        case NR.vfork:
            return True
        case NR.clone:
            return bool(int(args[0], 16) & CLONE.VFORK)
        case NR.clone3:
            flags = read_memory(tid, RemoteAddress(int(args[0], 16)), 8)
            return bool(int.from_bytes(flags, "little") & CLONE.VFORK)
    return False
