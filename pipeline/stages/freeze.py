"""Freezing: stop every task of a tree, all of it, and give each back exactly once.

A tree is the root process and all its descendants. It is frozen by seizing and
interrupting one task after the other; a parent that is stopped can bear no more
children, so rounds over the tree end as soon as one finds nothing new: a tree that
forks while it is frozen is caught whole.

A thread that executes a program ends its sisters first and waits until each is collected, which only their tracer
can do; then it takes the number of the first thread, and its own is gone without an end. Meanwhile PTRACE_SEIZE
of any thread of the process does not come back: see `Collector`. A process that ends has its threads collected
before the first one, too.

Some tasks of a tree can be stopped alone, too (`halt`): for `pipeline.stages.throttle`.

Nothing in the target changes by being seized (PTRACE_SEIZE sends no signal). If we
die, the kernel detaches every task and it runs on. A task that was stopped by job
control stays so, and is stopped again after the release.

Refused: kernel threads, ourselves and our ancestors, tasks traced by somebody else.
Sources: ptrace(2); children in proc_pid_task(5).
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

from pipeline.errors import Blocker, Refused, TargetError
from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.ptrace import EVENT, OPTION
from pipeline.ledger import LEDGER
from pipeline.resources.tasks import interrupted, leaders, tracing

#: between two looks at tasks that were killed
_END_PAUSE_S = 0.0005
#: between two looks, while a tree is seized, for those whose end a seizure may wait for; longer than most take
_COLLECT_EVERY_S = 0.03
#: how long tasks are waited for that are all ending and wait for others to collect their dead
_END_GRACE_S = 0.2
#: how long a task may take to stop: disk sleepers stop when the kernel lets them
_STOP_TIMEOUT_S = 10.0
#: how long a parent may wait for its vfork child to execute a program
_VFORK_TIMEOUT_S = 1.0
#: how long a task may take that seems to sleep, where it would be woken, until it is asked what it waits for; and how
#: often it has to be seen so
_FAULT_TIMEOUT_S, _FAULT_LOOKS = 0.1, 3
#: how often in a row a first thread may be replaced while it is seized
_SEIZE_TRIES = 20
_SPINS = 200
_ROUNDS = 1000


@dataclass
class FrozenTask:
    """One seized thread. `stopped`: its stop was reported. `stop_signal` is that of a job-control stop, else 0."""

    tid: HostPid
    stopped: bool = False
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

    def zombies(self) -> list[HostPid]:
        """All others."""
        return [process.pid for process in self.processes.values() if process.zombie]

    def tids(self) -> Iterator[HostPid]:
        """The tasks of those that have some."""
        return (HostPid(tid) for process in self.living() for tid in process.tasks)


def walk(root: HostPid) -> list[HostPid]:
    """The processes of the tree below `root`, parents first, without touching them."""
    found = [root]
    for pid in found:
        with suppress(procfs.ProcessGone):
            found.extend(child for child in procfs.children(pid) if child not in found)
    return found


def killed(tree: FrozenTree) -> list[HostPid]:
    """The processes of a stopped tree that somebody has killed since; none of one that was let go, or ended."""
    held = [process for process in tree.living() if process.tasks]
    return [process.pid for process in held if not any(map(ptrace.is_stopped, process.tasks))]


def check_killed(tree: FrozenTree) -> Iterator[Blocker]:
    """The processes that are `killed`."""
    for pid in killed(tree):
        yield Blocker(f"pid {pid}", "was killed while it was looked at", "try again", transient=True)


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
        with Collector() as collector:
            for _ in range(_ROUNDS):
                if not _round(tree, collector):
                    return tree
        raise TargetError(f"pid {root}: the tree grows faster than it can be stopped")
    except BaseException:
        release(tree)
        raise


@contextmanager
def stopped_for_a_look(root: HostPid, suspend_seccomp: bool) -> Iterator[FrozenTree]:
    """The whole tree, in which nobody's time to wait begins anew; it runs on after the block. As `freeze`."""
    sleepers = interrupted.Sleepers()
    sleepers.look(walk(root))
    tree = freeze(root, suspend_seccomp)
    try:
        sleepers.prepare_all(tree.tids())
        yield tree
    finally:
        release(tree)


class Collector:
    """Collects the seized tasks of a process that end while PTRACE_SEIZE of a sister of theirs does not come back.

    An execve has the cred_guard_mutex of its process from the beginning to the end, and PTRACE_SEIZE takes it; the
    execve waits for the tracer to collect the sisters. Any thread of the tracer's process may do that, and only
    another one can.

    Source: kernel/ptrace.c ptrace_attach, fs/exec.c de_thread, kernel/exit.c is_effectively_child.
    """

    def __init__(self) -> None:
        self._process: FrozenProcess | None = None
        self._looking = threading.Lock()
        self._over = threading.Event()
        self._runs = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody is seized any more; idempotent."""
        self._over.set()

    def stand_by(self, process: FrozenProcess) -> None:
        """A task of this process is about to be seized; `stand_down` afterwards."""
        if not process.tasks:
            return
        self._process = process
        if not self._runs:
            # not a Thread, whose start waits for it: while nobody stands by it touches nothing
            self._runs = True
            _thread.start_new_thread(self._run, ())

    def stand_down(self) -> None:
        """The seizure has come back."""
        if self._process is not None:
            with self._looking:
                self._process = None

    def _run(self) -> None:
        while not self._over.wait(_COLLECT_EVERY_S):
            with self._looking:
                if self._process is not None:
                    _collect_ended(self._process)


def _round(tree: FrozenTree, collector: Collector) -> bool:
    """Stop every task that is not stopped yet; returns whether there was one."""
    found = False
    for pid in walk(tree.root):
        process = tree.processes.get(pid)
        if process is None:
            try:
                zombie = leaders.has_ended(pid)
            except procfs.ProcessGone:
                _forget(tree, pid)
                continue
            process = tree.processes[pid] = FrozenProcess(pid, zombie=zombie)
            found = True
        if not process.zombie:
            found |= _stop_tasks(tree, process, collector)
    return found


def _stop_tasks(tree: FrozenTree, process: FrozenProcess, collector: Collector) -> bool:
    found = False
    while True:
        if process.pid in process.tasks:
            # last of all, and again: it may have been killed, or another thread may have its number by now
            _await_stop(process, process.pid)
        try:
            listed = procfs.tasks(process.pid)
        except procfs.ProcessGone:
            listed = []
        new = [tid for tid in listed if tid not in process.tasks and _seize(tree, process, tid, collector)]
        for tid in new:
            if tid != process.pid and tid in process.tasks:
                _await_stop(process, tid)
        found |= bool(new)
        if new:
            continue
        if process.tasks:
            return found
        try:
            process.zombie = leaders.has_ended(process.pid)
        except procfs.ProcessGone:
            _forget(tree, process.pid)
            return found
        if process.zombie:
            return found


def _forget(tree: FrozenTree, pid: HostPid) -> None:
    """A process is gone: it was collected by its parent, or by nobody, as the parent does not care."""
    if pid == tree.root:
        raise TargetError(f"pid {pid} has ended") from None
    tree.processes.pop(pid, None)


def _strike_out(process: FrozenProcess, tid: int) -> None:
    if process.tasks.pop(tid, None) is not None:
        LEDGER.give_back("seized task", tid)


def _collect_ended(process: FrozenProcess) -> None:
    for tid in list(process.tasks):
        with suppress(ChildProcessError):
            if ptrace.take_end(tid):
                _strike_out(process, tid)


def _seize(tree: FrozenTree, process: FrozenProcess, tid: HostPid, collector: Collector) -> bool:
    """Seize a task and interrupt it; False if it has ended."""
    LEDGER.take("seized task", tid)
    try:
        collector.stand_by(process)
        try:
            new = _seize_one(tree, tid)
        finally:
            collector.stand_down()
    except ProcessLookupError:
        LEDGER.give_back("seized task", tid)
        return False
    except PermissionError as error:
        LEDGER.give_back("seized task", tid)
        blockers: list[Blocker] = []
        with suppress(procfs.ProcessGone):
            blockers += tracing.check_traced(process.pid)
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
    process.tasks[tid] = FrozenTask(tid)
    if new:
        try:
            ptrace.interrupt(tid)
        except ProcessLookupError:
            # it executes a program and has the first one's number by now, or a sister that does has its
            _strike_out(process, tid)
    return True


def _seize_one(tree: FrozenTree, tid: HostPid) -> bool:
    """Seize a task.

    Returns:
        False if it is ours already: it had not stopped when it was to be let go (see `release`), or it had another
        number when it was seized.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it may not be traced.
    """
    # again and again: it may have been a first thread that ended, and another one has its number by now. Suspending
    # filters takes the initial user namespace's CAP_SYS_ADMIN; our own may be a lesser one
    for options in (tree.options,) * _SEIZE_TRIES + (0,) * _SEIZE_TRIES:
        with suppress(PermissionError):
            ptrace.seize(tid, options)
            tree.options = options
            return True
        status = procfs.status(tid)
        if status.state in "ZX":
            raise procfs.ProcessGone(tid)
        if status.tracer_pid == threading.get_native_id():
            return False
    raise PermissionError


def _await_stop(process: FrozenProcess, tid: HostPid) -> None:
    """Wait until a seized task is stopped and the stop was reported; one that is gone is struck out."""
    if not _stops_within(process, tid, _STOP_TIMEOUT_S):
        state = procfs.status(tid).state
        why = (
            "it is at work in the kernel, or gets no processor; try again"
            if state == "R"
            else "it sleeps in the kernel where nothing wakes it"
        )
        raise TargetError(f"{_subject(process.pid, tid)} does not stop (state {state}); {why}")


def _stops_within(process: FrozenProcess, tid: HostPid, timeout_s: float) -> bool:
    """As `_await_stop`, but False if it does not stop in this time."""
    task = process.tasks[tid]
    started_s = time.monotonic()
    spins = looks = 0
    again = False
    while True:
        # looked at first: a stop that comes in between is reported below
        still = task.stopped and ptrace.is_stopped(tid)
        try:
            stop = ptrace.wait(tid, nohang=True)
        except ChildProcessError:
            _strike_out(process, tid)
            return True
        if stop is None:
            if still:
                return True
            spins += 1
            if spins > _SPINS:
                _collect_ended(process)
                if tid in process.tasks and _is_lost(process, tid):
                    _strike_out(process, tid)
                if tid not in process.tasks:
                    return True
                if spins % _SPINS == 0:
                    # an interrupt that meets an execve which ends other threads can be lost; or see `_seize`
                    with suppress(ProcessLookupError):
                        ptrace.interrupt(tid)
                    again = True
                waited_s = time.monotonic() - started_s
                blockers: list[Blocker] = []
                if waited_s > _FAULT_TIMEOUT_S and looks < _FAULT_LOOKS and _seems_to_sleep(tid):
                    looks += 1
                    if looks == _FAULT_LOOKS:
                        blockers += tracing.check_page_fault(_subject(process.pid, tid), tid)
                if waited_s > _VFORK_TIMEOUT_S:
                    blockers += tracing.check_vfork(_subject(process.pid, tid), tid)
                if blockers:
                    raise Refused(blockers)
                if waited_s > timeout_s:
                    return False
                time.sleep(0.0002)
            continue
        if stop.exited:
            _strike_out(process, tid)
            return True
        if stop.event == EVENT.STOP and again:
            # another may be due: asked for once more it surely is, and nothing runs before it
            again = False
            with suppress(ProcessLookupError):
                ptrace.interrupt(tid)
                ptrace.cont(tid)
            continue
        if stop.event == EVENT.STOP:
            task.stopped, task.stop_signal = True, stop.signal if stop.group_stop else 0
            interrupted.settle(tid)
            return True
        # a signal was on its way: let it in, the interrupt is still pending
        with suppress(ProcessLookupError):
            ptrace.cont(tid, stop.signal if not stop.event else 0)


def _seems_to_sleep(tid: HostPid) -> bool:
    """Whether a task is said to sleep so that a signal would wake it."""
    try:
        return procfs.status(tid).state == "S"
    except procfs.ProcessGone:
        return False


def is_ours(tid: HostPid) -> bool:
    """Whether a task is seized by the calling thread."""
    try:
        return procfs.status(tid).tracer_pid == threading.get_native_id()
    except procfs.ProcessGone:
        return False


def _is_lost(process: FrozenProcess, tid: HostPid) -> bool:
    """Whether neither a stop nor the end of a task that we have seized will be reported.

    The number of a first thread that has ended may be somebody else's, whom we have not seized yet. Its end is
    reported after those of the others: not for now, if these are stopped, not killed.
    """
    try:
        status = procfs.status(tid)
    except procfs.ProcessGone:
        return True
    if status.tracer_pid != threading.get_native_id():
        return True
    ended_first = tid == process.pid and status.state in "ZX"
    return ended_first and any(ptrace.is_stopped(other) for other in process.tasks)


def _subject(pid: HostPid, tid: HostPid) -> str:
    return f"pid {pid}" + (f" thread {tid}" if tid != pid else "")


def halt(
    tree: FrozenTree, pid: HostPid, tids: Iterable[HostPid], collector: Collector, timeout_s: float
) -> None:
    """Stop some tasks of a process, besides those of `tree` that stand already.

    Who may not be traced, or is gone, is passed over. Who does not stop in time is a task of `tree` all the same, and
    is let go when it does.

    Args:
        tree: takes them, for `release` or `release_nowait`.
        collector: stands by while they are seized.
        timeout_s: how long they are waited for, all together.
    """
    process = tree.processes.setdefault(pid, FrozenProcess(pid))
    new = []
    for tid in tids:
        with suppress(Refused):
            if tid not in process.tasks and _seize(tree, process, tid, collector):
                new.append(tid)
    until_s = time.monotonic() + timeout_s
    for tid in new:
        if tid in process.tasks:
            _stops_within(process, tid, until_s - time.monotonic())
    _collect_ended(process)
    if not process.tasks:
        del tree.processes[pid]


def release(tree: FrozenTree) -> None:
    """Let every task run on as it was; idempotent, tolerates tasks that are gone.

    Whoever is let go may execute a program or end its process at once: sisters that are still stopped are killed by
    it, and it waits for us to collect them. That is done for as long as a task may take to end.

    A task that does not stop in a moment cannot be let go: it is when it is seized again, or when our thread ends.
    """
    started_s = time.monotonic()
    while not release_nowait(tree):
        left = [task for process in tree.processes.values() for task in process.tasks.values()]
        patience_s = _STOP_TIMEOUT_S if any(task.stopped for task in left) else _END_GRACE_S
        if time.monotonic() - started_s > patience_s:
            break
        time.sleep(_END_PAUSE_S)
    for process in tree.processes.values():
        for tid in list(process.tasks):
            _strike_out(process, tid)


def release_nowait(tree: FrozenTree) -> bool:
    """Let run on, as it was, whoever can be let go by now, or has ended; whether nobody is left."""
    for process in tree.processes.values():
        for tid, task in list(process.tasks.items()):
            if _let_go(task):
                _strike_out(process, tid)
    return not any(process.tasks for process in tree.processes.values())


def _let_go(task: FrozenTask) -> bool:
    """Detach a task, or collect it if it has ended; False if it can be neither for now."""
    try:
        stop = ptrace.wait(task.tid, nohang=True)
        if stop is None and not task.stopped:
            ptrace.interrupt(task.tid)  # the first one can be lost: see `_stops_within`
            return not is_ours(task.tid)
        if stop is None or not stop.exited:
            # a signal that was on its way when it was seized is let in
            on_its_way = stop is not None and not stop.event and not task.stopped
            if stop is not None and stop.event == EVENT.STOP and not task.stopped:
                interrupted.settle(task.tid)
            ptrace.detach(task.tid, stop.signal if stop is not None and on_its_way else 0)
    except ChildProcessError:
        return True
    except ProcessLookupError:
        return not is_ours(task.tid)
    return True


def kill(tree: FrozenTree) -> None:
    """Tell every process of a frozen tree to end: nothing of it runs again. In any thread, before `end` waits."""
    for process in tree.living():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def end(tree: FrozenTree) -> None:
    """Kill the frozen tree (`kill`), and wait for its end.

    Ends are taken in rounds, as they come: a leader's is reported after those of its threads, and
    the first process of a pid namespace ends only when all the others in it are collected, also those
    whose parent is further out. That is for whoever adopts them to do; who has nothing left but that to wait
    for is not waited for long: it runs nothing any more.
    """
    kill(tree)
    grace_until = 0.0
    while waited := [(process, tid) for process in tree.processes.values() for tid in process.tasks]:
        over = grace_until and time.monotonic() > grace_until
        left = 0
        for process, tid in waited:
            if _has_ended(tid) or over:
                _strike_out(process, tid)
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
