"""Freezing: stop every task of a tree, all of it, and give each back exactly once.

A tree is the root process and all its descendants. It is frozen by seizing and
interrupting one task after the other; a parent that is stopped can bear no more
children, so rounds over the tree end as soon as one finds nothing new: a tree that
forks while it is frozen is caught whole.

Nothing in the target changes by being seized (PTRACE_SEIZE sends no signal). If we
die, the kernel detaches every task and it runs on. A task that was stopped by job
control stays so, and is stopped again after the release.

Refused: kernel threads, ourselves and our ancestors, tasks traced by somebody else.
Sources: ptrace(2); children in proc_pid_task(5).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.errors import Blocker, Refused, TargetError
from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.ptrace import EVENT, OPTION
from pipeline.ledger import LEDGER
from pipeline.resources.tasks import interrupted, tracing

#: between two looks at tasks that were killed
_END_PAUSE_S = 0.0005
#: how long tasks are waited for that are all ending and wait for others to collect their dead
_END_GRACE_S = 0.2
#: how long a task may take to stop: disk sleepers stop when the kernel lets them
_STOP_TIMEOUT_S = 10.0
#: how long a parent may wait for its vfork child to execute a program
_VFORK_TIMEOUT_S = 1.0
_SPINS = 200
_ROUNDS = 1000


@dataclass
class FrozenTask:
    """One stopped thread. `stop_signal` is that of a job-control stop, else 0."""

    tid: HostPid
    stop_signal: int = 0


@dataclass
class FrozenProcess:
    """One process of the tree; `tasks` is empty for a zombie, else the leader is first."""

    pid: HostPid
    zombie: bool = False
    tasks: dict[int, FrozenTask] = field(default_factory=dict)

    @property
    def stop_signal(self) -> int:
        """Signal of the job-control stop the whole process is in, else 0."""
        return next((task.stop_signal for task in self.tasks.values() if task.stop_signal), 0)


@dataclass
class FrozenTree:
    """A stopped tree: processes by pid, parents before children. See `freeze` and `release`."""

    root: HostPid
    processes: dict[HostPid, FrozenProcess] = field(default_factory=dict)
    options: int = 0

    def pids(self) -> list[HostPid]:
        """All processes, zombies too, parents before children."""
        return list(self.processes)

    def living(self) -> Iterator[FrozenProcess]:
        """All processes that have tasks."""
        return (p for p in self.processes.values() if not p.zombie)


def walk(root: HostPid) -> list[HostPid]:
    """The processes of the tree below `root`, parents first, without touching them."""
    found = [root]
    for pid in found:
        with suppress(procfs.ProcessGone):
            found.extend(child for child in procfs.children(pid) if child not in found)
    return found


def check_root(pid: int) -> Iterator[Blocker]:
    """Why `pid` cannot be the root of a tree to be frozen."""
    subject = f"pid {pid}"
    try:
        status = procfs.status(HostPid(pid)) if pid > 0 else None
    except procfs.ProcessGone:
        status = None
    if status is None:
        yield Blocker(subject, "there is no such process", "look with: ps -e")
        return
    if status.tgid != pid:
        yield Blocker(subject, f"is a thread of process {status.tgid}", f"give --pid {status.tgid}")
        return
    if procfs.is_kernel_thread(HostPid(pid)):
        yield Blocker(subject, "is a kernel thread", "only programs can be moved")
        return
    ancestor: int = os.getpid()
    while ancestor > 0:
        if ancestor == pid:
            whose = "the pipeline itself" if pid == os.getpid() else "a parent of the pipeline"
            yield Blocker(subject, f"is {whose}", "run the pipeline from outside the tree")
            return
        try:
            ancestor = procfs.status(HostPid(ancestor)).ppid
        except procfs.ProcessGone:
            return


def freeze(root: HostPid, suspend_seccomp: bool) -> FrozenTree:
    """Stop the whole tree; on any failure, all of it runs on.

    Args:
        root: its root, checked by `check_root`.
        suspend_seccomp: ask for PTRACE_O_SUSPEND_SECCOMP (CAP_SYS_ADMIN in the initial user namespace);
            done without where the kernel refuses it.

    Raises:
        Refused: a task is traced by somebody else, or may not be traced by us.
        TargetError: the root ended, or a task does not stop.
    """
    tree = FrozenTree(root, options=OPTION.SUSPEND_SECCOMP if suspend_seccomp else 0)
    try:
        for _ in range(_ROUNDS):
            if not _round(tree):
                return tree
        raise TargetError(f"pid {root}: the tree grows faster than it can be stopped")
    except BaseException:
        release(tree)
        raise


def _round(tree: FrozenTree) -> bool:
    """Stop every task that is not stopped yet; returns whether there was one."""
    found = False
    for pid in walk(tree.root):
        process = tree.processes.get(pid)
        if process is None:
            try:
                zombie = procfs.status(pid).state == "Z" and len(procfs.tasks(pid)) <= 1
            except procfs.ProcessGone:
                if pid == tree.root:
                    raise TargetError(f"pid {pid} has ended") from None
                continue
            process = tree.processes[pid] = FrozenProcess(pid, zombie=zombie)
            found = True
        if not process.zombie:
            found |= _stop_tasks(tree, process)
    return found


def _stop_tasks(tree: FrozenTree, process: FrozenProcess) -> bool:
    found = False
    while True:
        try:
            new = [tid for tid in procfs.tasks(process.pid) if tid not in process.tasks]
        except procfs.ProcessGone:
            new = []
        new = [tid for tid in new if _seize(tree, process, tid)]
        if not new:
            break
        found = True
        for tid in new:
            _await_stop(process, tid)
    if not process.tasks:
        process.zombie = True
    return found


def _seize(tree: FrozenTree, process: FrozenProcess, tid: HostPid) -> bool:
    LEDGER.take("seized task", tid)
    try:
        _seize_one(tree, tid)
        process.tasks[tid] = FrozenTask(tid)
        ptrace.interrupt(tid)
    except ProcessLookupError:
        process.tasks.pop(tid, None)
        LEDGER.give_back("seized task", tid)
        return False
    except PermissionError as error:
        LEDGER.give_back("seized task", tid)
        with suppress(procfs.ProcessGone):
            if procfs.status(tid).state in "ZX":
                return False
            blockers = list(tracing.check_traced(process.pid))
            raise Refused(
                blockers
                or [
                    Blocker(
                        _subject(process.pid, tid),
                        "may not be traced by this user",
                        "run as its user, or as root",
                    )
                ]
            ) from error
        return False
    return True


def _seize_one(tree: FrozenTree, tid: HostPid) -> None:
    try:
        ptrace.seize(tid, tree.options)
    except PermissionError:
        if procfs.status(tid).tracer_pid == threading.get_native_id():
            return  # it did not stop when it was let go (see `release`)
        if not tree.options:
            raise
        # suspending filters takes the initial user namespace's CAP_SYS_ADMIN; our own may be a lesser one
        ptrace.seize(tid)
        tree.options = 0


def _await_stop(process: FrozenProcess, tid: HostPid) -> None:
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    spins = 0
    while True:
        try:
            stop = ptrace.wait(tid, nohang=True)
        except ChildProcessError:
            stop = ptrace.Stop(0)
        if stop is None:
            spins += 1
            if spins > _SPINS:
                late_s = time.monotonic() - deadline
                if late_s > _VFORK_TIMEOUT_S - _STOP_TIMEOUT_S:
                    borrowed = list(tracing.check_vfork(_subject(process.pid, tid), tid))
                    if borrowed:
                        raise Refused(borrowed)
                if late_s > 0:
                    raise TargetError(
                        f"{_subject(process.pid, tid)} does not stop (state {procfs.status(tid).state}); "
                        "it sleeps in the kernel where nothing wakes it"
                    )
                time.sleep(0.0002)
            continue
        if stop.exited:
            del process.tasks[tid]
            LEDGER.give_back("seized task", tid)
            return
        if stop.event == EVENT.STOP:
            process.tasks[tid].stop_signal = stop.signal if stop.group_stop else 0
            interrupted.settle(tid)
            return
        # a signal was on its way: let it in, the interrupt is still pending
        ptrace.cont(tid, stop.signal if not stop.event else 0)


def _subject(pid: HostPid, tid: HostPid) -> str:
    return f"pid {pid}" + (f" thread {tid}" if tid != pid else "")


def release(tree: FrozenTree) -> None:
    """Let every task run on as it was; idempotent, tolerates tasks that are gone.

    A task that has not stopped yet cannot be let go: it is when it is seized again, or when our thread ends.
    """
    for process in tree.processes.values():
        for tid in list(process.tasks):
            with suppress(ProcessLookupError):
                ptrace.detach(tid)
            del process.tasks[tid]
            LEDGER.give_back("seized task", tid)


def end(tree: FrozenTree) -> None:
    """Kill the frozen tree: every process is told first, so nothing of it runs again; then its end is awaited.

    Ends are taken in rounds, as they come: a leader's is reported after those of its threads, and
    the first process of a pid namespace ends only when all the others in it are collected, also those
    whose parent is further out. That is for whoever adopts them to do; who has nothing left but that to wait
    for is not waited for long: it runs nothing any more.
    """
    for process in tree.living():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    grace_until = 0.0
    while waited := [(process, tid) for process in tree.processes.values() for tid in process.tasks]:
        over = grace_until and time.monotonic() > grace_until
        left = 0
        for process, tid in waited:
            if _has_ended(tid) or over:
                del process.tasks[tid]
                LEDGER.give_back("seized task", tid)
            else:
                left += 1
        if left < len(waited) or not all(_waits_for_others(HostPid(tid)) for _, tid in waited):
            grace_until = 0.0
        elif not grace_until:
            grace_until = time.monotonic() + _END_GRACE_S
        if left:
            time.sleep(_END_PAUSE_S)


def _waits_for_others(tid: HostPid) -> bool:
    """Whether a killed task has nothing left to give back: it sleeps or is a zombie, on its way out.

    One that still gives back its memory or its files, which may take a while, runs.
    """
    try:
        return procfs.is_exiting(tid) and procfs.stat(tid).state in "SZX"
    except procfs.ProcessGone:
        return True


def _has_ended(tid: int) -> bool:
    try:
        while (stop := ptrace.wait(tid, nohang=True)) is not None:
            if stop.exited:
                return True
    except ChildProcessError:
        return True
    return False


def hold_stopped(tree: FrozenTree) -> None:
    """Leave the tree stopped by SIGSTOP instead of running (``--leave-stopped``), then release it."""
    for process in tree.living():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
    release(tree)
