"""What only a stopped process itself can tell: system calls that run inside it, thread by thread.

A call that waits for a time is made ready first to be issued again behind the questions, for what is left of it.
"""

from __future__ import annotations

import collections.abc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.errors import Blocker
from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import SemaphoreUndo
from pipeline.kernel import procfs, ptrace, smaps
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.inside import open_file
from pipeline.kernel.smaps import Mapping
from pipeline.remote.calls import Call
from pipeline.remote.live import LiveTask, Places, find_places
from pipeline.resources.memory import aio
from pipeline.resources.namespaces.ipc import Semaphores
from pipeline.resources.tasks import job_control, semaphore_undo
from pipeline.resources.tasks.inquiry import Inquiry
from pipeline.resources.tasks.interrupted import Sleepers, Slept


class Answers(NamedTuple):
    """What the threads of a process say; see `asked`."""

    #: in the order of the threads
    inquiries: list[Inquiry]
    #: by thread
    slept: dict[HostPid, Slept]
    undo: list[SemaphoreUndo]
    #: where its contexts of asynchronous I/O are
    rings: set[int]
    #: what it could collect by waitid(2) about its children, by their pids
    notices: dict[int, job_control.Notice]
    #: what stops it
    blockers: list[Blocker]
    #: its mappings, maybe without flags
    mappings: Sequence[Mapping]
    #: its first thread, to run further calls in
    leader: LiveTask
    #: system calls that were run inside it, but for those that `leader` counts
    injected_calls: int
    #: for its program break, where that was asked with all else
    asked_brk: Call | None

    def brk(self) -> RemoteAddress:
        """Its program break.

        The call waits until nobody looks at the mappings of the process (mm/mmap.c), which takes a while where there
        are many pages: to be asked when its smaps have been read.
        """
        if self.asked_brk is not None:
            return RemoteAddress(self.asked_brk.check())
        return RemoteAddress(self.leader.syscall(arch.NR.brk, 0))


@contextmanager
def asked(
    pid: HostPid,
    tids: Sequence[HostPid],
    sleepers: Sleepers,
    semaphores: Sequence[Semaphores],
    children: collections.abc.Mapping[int, int],
    status_of: Callable[[HostPid], procfs.Status],
    seen: Sequence[Mapping] | None = None,
) -> Iterator[Answers]:
    """The answers of every thread to its questions, by system calls inside it; more can be asked within the block.

    Args:
        pid: a process, by the thread that it is looked at by.
        tids: its threads, that one first.
        sleepers: has looked at them before they were stopped, and in this stop first.
        semaphores: the sets of its ipc namespace.
        children: its living children in the tree: by the pid that it knows them by, their pids.
        status_of: remembers /proc/TID/status of stopped tasks.
        seen: its mappings, if they have been read; then it has time to be asked for its program break, see `Answers`.
    """
    memory = open_file(pid, "mem", os.O_RDWR)
    try:
        mappings = smaps.maps(pid) if seen is None else seen
        slept = {tid: sleepers.prepare(tid) for tid in tids}
        places = _places(pid, tids, mappings, memory)
        timers = procfs.timers(pid)
        inquiries = [Inquiry(tid, leader=tid == pid, timers=timers, known=status_of(tid)) for tid in tids]
        uncaught = ~inquiries[0].status.caught
        injected_calls = 0
        brk = Call(arch.NR.brk, (0,)) if seen is not None else None
        for inquiry in inquiries:
            task = LiveTask(inquiry.tid, places, memory, uncaught)
            task.run([*inquiry.calls, brk] if brk is not None and inquiry.leader else inquiry.calls)
            if further := inquiry.further():
                task.run(further)
            injected_calls += task.injected_calls
        leader = LiveTask(pid, places, memory, uncaught)
        undo, blockers = semaphore_undo.capture(pid, tids, semaphores, leader.syscall)
        rings = {m.start: aio.question(m) for m in mappings if m.name == aio.NAME}
        if rings:
            leader.run(list(rings.values()))
        notices = job_control.notices(leader, children) if children else {}
        yield Answers(
            inquiries,
            slept,
            undo,
            {at for at, call in rings.items() if not call.result},
            {children[seen]: notice for seen, notice in notices.items()},
            blockers,
            mappings,
            leader,
            injected_calls,
            brk,
        )
    finally:
        os.close(memory)


@contextmanager
def inside(pid: HostPid, tids: Sequence[HostPid]) -> Iterator[LiveTask]:
    """A thread of a stopped process, to run system calls in; `pid` and `tids` as for `ask`."""
    memory = open_file(pid, "mem", os.O_RDWR)
    try:
        places = _places(pid, tids, smaps.maps(pid), memory)
        yield LiveTask(pid, places, memory, ~procfs.status(pid).caught)
    finally:
        os.close(memory)


def _places(pid: HostPid, tids: Sequence[HostPid], mappings: Sequence[Mapping], memory: int) -> Places:
    pointers = [arch.Registers(ptrace.get_regs(tid))["rsp"] for tid in tids]
    return find_places(pid, mappings, pointers, memory)
