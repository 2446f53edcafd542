"""States of tasks that are not carried, each refused by name.

`check_task` asks /proc and calls that take a pid only, and touches nothing: it runs on a
tree that goes on running. What only the task itself can tell is asked in `inquiry`.

Not seen, because the kernel shows it to nobody: Landlock domains, undo values of System V
semaphores (SEM_UNDO), the ioperm bitmap, a tracer granted by PR_SET_PTRACER.

Sources: proc_pid_status(5), proc_pid_stat(5), kcmp(2); include/linux/sched.h for PF_*.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

from pipeline.errors import Blocker, passed_over
from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.resources.tasks.scheduling import check_scheduling
from pipeline.resources.tasks.seccomp import check_seccomp
from pipeline.resources.tasks.timers import check_timers
from pipeline.resources.tasks.tracing import check_vfork

_PF_MEMALLOC_NOIO = 0x0008_0000
_PF_LOCAL_THROTTLE = 0x0010_0000
_ELFCLASS32 = 1
_NAMESPACES = ("user", "mnt", "uts", "ipc", "net", "cgroup", "time")


def check_task(
    pid: HostPid,
    status_of: Callable[[HostPid], procfs.Status] = procfs.status,
    stat_of: Callable[[HostPid], procfs.Stat] = procfs.thread_stat,
) -> Iterator[Blocker]:
    """Everything about a process and its threads that is not carried, as far as it shows from outside.

    Args:
        pid: the process, or the thread that it is looked at by (`leaders.face`).
        status_of, stat_of: read /proc/TID/status and the stat of a thread, or remember them.

    Raises:
        procfs.ProcessGone: it has ended.
    """
    of_first = status_of(pid)
    number = of_first.tgid
    subject = f"pid {number}"
    threads = procfs.tasks(pid)
    yield from _process(subject, pid, len(threads))
    namespaces = _namespaces(pid) if len(threads) > 1 else []
    for tid in threads:
        name = subject + (f" thread {tid}" if tid != number else "")
        with suppress(procfs.ProcessGone, ProcessLookupError):  # a thread that has ended is not in the way
            if tid != pid and _may_not_be_looked_at(tid):
                yield Blocker(
                    name,
                    "may not be looked at: it has other ids than its process",
                    "run the pipeline as root",
                )
                continue
            status = of_first if tid == pid else status_of(tid)
            if status.state in "ZX":
                continue
            yield from check_seccomp(name, status)
            yield from check_scheduling(name, tid)
            if status.state == "D":
                yield from check_vfork(name, tid)
            yield from _thread(name, status, stat_of(tid))
            if tid != pid:
                yield from _apart(name, pid, tid)
                if _namespaces(tid) != namespaces:
                    yield Blocker(name, "is in other namespaces than the first thread of its process")


def check_stopped(pid: HostPid, tid: HostPid) -> Iterator[Blocker]:
    """What forbids to run a system call inside a stopped task: asked before any is."""
    subject = f"pid {pid}" + (f" thread {tid}" if tid != pid else "")
    registers = ptrace.get_regs(tid)
    if len(registers) != arch.REGISTERS_BYTES or not arch.Registers(registers).is_64_bit:
        yield Blocker(subject, "runs 32-bit code", "use a 64-bit build of the program")
    yield from _check_dispatch(subject, tid)


def _check_dispatch(subject: str, tid: HostPid) -> Iterator[Blocker]:
    """PR_SET_SYSCALL_USER_DISPATCH. Before Linux 6.4 only the handler that it needs can be seen."""
    dispatch = ptrace.get_syscall_user_dispatch(tid)
    if dispatch is None:
        if procfs.status(tid).caught >> signal.SIGSYS - 1 & 1:
            yield Blocker(
                subject,
                "catches SIGSYS: this kernel cannot tell whether it dispatches its system calls itself"
                " (PR_SET_SYSCALL_USER_DISPATCH)",
                "use Linux 6.4 or newer",
            )
    elif dispatch[0]:
        yield Blocker(
            subject,
            "dispatches its system calls itself (PR_SET_SYSCALL_USER_DISPATCH)",
            "let it switch that off, or end it",
        )


def _process(subject: str, pid: HostPid, threads: int) -> Iterator[Blocker]:
    with passed_over(), open(f"/proc/{pid}/exe", "rb") as file:
        if file.read(5)[4:] == bytes([_ELFCLASS32]):
            yield Blocker(subject, "is a 32-bit program", "use a 64-bit build of it")
    with suppress(FileNotFoundError, PermissionError):
        yield from check_timers(subject, procfs.timers(pid), threads)
    me = os.getpid()
    with passed_over():  # EINVAL: there is no security module
        theirs, ours = (procfs.read_file(HostPid(p), "attr/current").rstrip(b"\0\n") for p in (pid, me))
        if theirs != ours:
            yield Blocker(subject, f"is confined by the security module as {theirs.decode(errors='replace')}")


def _thread(subject: str, status: procfs.Status, stat: procfs.Stat) -> Iterator[Blocker]:
    fields = status.fields
    if fields.get("x86_Thread_features", b"").strip():
        yield Blocker(subject, "uses a shadow stack")
    mask = fields.get("untag_mask", b"")
    if mask and int(mask, 16) != 0xFFFF_FFFF_FFFF_FFFF:
        yield Blocker(subject, "uses tagged addresses (linear address masking)")
    store_bypass, branches = (
        fields.get(key, b"") for key in ("Speculation_Store_Bypass", "SpeculationIndirectBranch")
    )
    if store_bypass.startswith(b"thread") and b"mitigated" in store_bypass:
        yield Blocker(subject, "has store bypass speculation switched off (PR_SET_SPECULATION_CTRL)")
    if branches.startswith(b"conditional") and b"disabled" in branches:
        yield Blocker(subject, "has indirect branch speculation switched off (PR_SET_SPECULATION_CTRL)")
    flusher = _PF_MEMALLOC_NOIO | _PF_LOCAL_THROTTLE
    if stat.flags & flusher == flusher:
        yield Blocker(subject, "is an I/O flusher (PR_SET_IO_FLUSHER)")


def _apart(subject: str, pid: HostPid, tid: HostPid) -> Iterator[Blocker]:
    """What a thread does not share with its process although threads mostly do."""
    with suppress(PermissionError):
        if kcmp(pid, tid, KCMP.FILES):
            yield Blocker(subject, "has a descriptor table of its own (unshare)", "end the thread")


def _may_not_be_looked_at(tid: HostPid) -> bool:
    try:
        os.stat(f"/proc/{tid}/ns/user")
    except PermissionError:
        return True
    except FileNotFoundError as error:
        raise procfs.ProcessGone(tid) from error
    return False


def _namespaces(tid: HostPid) -> list[tuple[int, int]]:
    found = []
    for name in _NAMESPACES:
        try:
            result = os.stat(f"/proc/{tid}/ns/{name}")
        except FileNotFoundError:
            continue  # a kind that this kernel does not have
        found.append((result.st_dev, result.st_ino))
    return found
