"""Capturing a stopped tree: all records of an image, and where its pages are read.

The order: who belongs to it; namespaces; open files (memfds are registered before
mappings that show them); then process by process what only the task itself can tell,
its memory and its state; then which pages a child still shares with its parent.

The same objects tell `check` what stops it (`pipeline.stages.examine`).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, Self

from msgspec.structs import asdict, replace

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.plan import Planner, fill_order, plan
from pipeline.image.schema import (
    FORMAT_VERSION,
    AddressSpace,
    Head,
    Id,
    Memberships,
    OpenFile,
    PathRef,
    Process,
    Record,
    Thread,
    Together,
)
from pipeline.kernel import procfs
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.pagemap import Range
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.policy import DumpPolicy
from pipeline.remote.tracer import check_cancelled
from pipeline.resources import shell_job, tun_file, userfault
from pipeline.resources.cgroups.capture import CgroupCapture
from pipeline.resources.held import Held
from pipeline.resources.kinds import FdView
from pipeline.resources.memory import aio
from pipeline.resources.memory.alike import is_forked
from pipeline.resources.memory.capture import (
    Captured,
    Seen,
    capture_address_space,
    check_address_space,
    scanned,
)
from pipeline.resources.memory.objects import MemoryObjects
from pipeline.resources.memory.scope import CannotCarry
from pipeline.resources.memory.sharing import plan_copy_on_write
from pipeline.resources.namespaces import clocks
from pipeline.resources.namespaces.members import NamespaceCapture
from pipeline.resources.outside import Outsiders
from pipeline.resources.pty_session import check_controlling_terminal
from pipeline.resources.shielded import Shield
from pipeline.resources.tasks import (
    attributes,
    credentials,
    directories,
    interrupted,
    job_control,
    leaders,
    loginuid,
    signals,
    together,
)
from pipeline.resources.tasks.inquiry import Inquiry, thread_record
from pipeline.resources.tasks.interrupted import Sleepers, Slept
from pipeline.resources.tasks.refusals import check_stopped, check_task
from pipeline.stages import ending, faults
from pipeline.stages.ahead import MappingReader, MappingsAhead
from pipeline.stages.asking import Answers, asked
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.freeze import FrozenProcess, FrozenTree
from pipeline.stages.memory import FilePages, PageSource, ProcessPages, SharedPages
from pipeline.stages.memory_layout import vdso_digest
from pipeline.stages.observe import FileObserver, Looks, Spaces, Tree
from pipeline.userns.capture import LiveForest
from pipeline.userns.cradle import is_privileged
from pipeline.userns.externals import Externals
from pipeline.userns.forest import Forest
from pipeline.userns.lodgers import Lodgers


class _Found(NamedTuple):
    """What was captured. `captured`: the memory of processes, with the process, by its space."""

    head: Head
    processes: list[Process]
    captured: dict[int, tuple[HostPid, Captured]]
    files: list[tuple[OpenFile, Record | None]]


class Capture:
    """One look at a tree; a context manager that gives back every descriptor it took.

    Args:
        pids: its processes, parents before children.
        zombies: those of them that have ended.
        sleepers: has looked at the tree before it was stopped.
        externals: namespaces that are external instead of the pipeline's own.
        policy: decisions about states that have more than one good answer.
        held: takes what is held until the tree runs on or has ended.
        known: what was read before it was stopped.
        looks: what it has in common with others.
    """

    def __init__(
        self,
        pids: Sequence[HostPid],
        zombies: Sequence[HostPid],
        sleepers: Sleepers | None = None,
        externals: Externals | None = None,
        policy: DumpPolicy | None = None,
        held: Held | None = None,
        known: Beforehand | None = None,
        looks: Looks | None = None,
    ) -> None:
        self._looks = looks or Looks()
        self.policy = policy or DumpPolicy()
        self._sleepers = sleepers or Sleepers()
        self._together: dict[HostPid, Together] = {}
        self._notices: dict[int, job_control.Notice] = {}
        self.tree = Tree(pids, known.outsiders if known is not None else Outsiders())
        self._zombies = set(zombies)
        #: where the first thread has ended and others run: by whom the process is looked at
        self._faces = leaders.faces(pid for pid in pids if pid not in self._zombies)
        self.living = [self._face(pid) for pid in pids if pid not in self._zombies]
        self._spaces = Spaces(self._looks.spaces)
        self._forest = LiveForest(limits=known.limits if known is not None else None)
        with ExitStack() as stack:
            stack.callback(self._spaces.close)
            lodgers = stack.enter_context(Lodgers())
            self._cgroups = CgroupCapture(
                map(self._face, pids) if self.policy.cgroup == "keep" else (), self.tree.member
            )
            self.namespaces = NamespaceCapture(
                self.living,
                self._forest,
                is_privileged(),
                lodgers,
                externals,
                self._cgroups,
                known.networks if known is not None else None,
            )
            #: the tree will be stopped, and looked at again
            self._prepares = known is not None
            self._shield = known.shield if known is not None else Shield()
            self._mappings = known.mappings if known is not None else stack.enter_context(MappingReader())
            self._objects = stack.enter_context(MemoryObjects(self))
            self.files = stack.enter_context(
                FileObserver(
                    self.tree,
                    self._spaces,
                    self._mount_namespace,
                    self._objects.memory_of,
                    self.namespaces,
                    self.policy,
                    held or Held(),
                    self._shield,
                )
            )
            self._stack = stack.pop_all()
        #: what /proc/TID/status and the stat of a thread say of a task that stands still
        self._status_of = functools.cache(procfs.status)
        self._stat_of = functools.cache(procfs.thread_stat)
        #: system calls run inside the target
        self.injected_calls = 0
        self._found: _Found | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back everything; idempotent."""
        self._stack.close()

    def let_go_of_files(self) -> None:
        """Close what keeps open what the tree has open; idempotent."""
        self.files.close()
        self._spaces.close()

    def forest(self) -> Forest:
        """The user namespaces of the tree."""
        return self._forest.forest()

    def end_may_be_seen(self) -> bool:
        """See `ending.may_be_seen`; of what was captured, until `close`."""
        assert self._found is not None
        views = (view for _, view in self.files.files())
        states = (state for _, state in self._found.files)
        return ending.may_be_seen(views, self._objects.written_on, states, self.policy)

    def _face(self, pid: HostPid) -> HostPid:
        """By which of its threads a process is looked at."""
        return self._faces.get(pid, pid)

    # -- MemoryScope -------------------------------------------------------------------

    def space_of(self, key: Hashable) -> int:
        """See `MemoryScope`."""
        return self._spaces.number(key)

    def file_of(self, key: Hashable) -> int:
        """See `MemoryScope`."""
        return self._looks.files.of(key)

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        """See `MemoryScope`."""
        return PathRef(self._mount_namespace(pid), link)

    def user(self, uid: int) -> Id:
        """See `MemoryScope`; translated by the next stage."""
        return Id(0, uid)

    def group(self, gid: int) -> Id:
        """See `MemoryScope`; translated by the next stage."""
        return Id(0, gid)

    def content(self, local: LocalFd, size_bytes: int) -> int:
        """See `MemoryScope`."""
        return self.files.content(local, size_bytes)

    def take_along(self, pid: HostPid, name: bytes, fd: LocalFd) -> None:
        """See `MemoryScope`."""
        self.files.take_along(pid, name, fd)

    def segment(self, pid: HostPid, identifier: int) -> int:
        """See `MemoryScope`."""
        if pid not in self.namespaces.memberships:
            raise CannotCarry("shows a segment of an ipc namespace that cannot be looked at")
        return self.namespaces.segment(pid, identifier)

    def _mount_namespace(self, pid: HostPid) -> int:
        members = self.namespaces.memberships.get(pid)
        return members.mnt if members is not None else self.namespaces.external("mnt")

    # -- refusing ------------------------------------------------------------------------

    def blockers(self) -> Iterator[Blocker]:
        """Everything that is known to stop a tree that stands still without asking its tasks."""
        self.files.collect(self.living, still=False)
        yield from self.files.blockers()
        yield from self._besides_files(answers=bool(self._answerers()))
        for pid in self.living:
            with procfs.unless_gone(pid):
                yield from check_controlling_terminal(pid, self.files)
        yield from self._attachment_blockers()

    def blockers_besides_files(self) -> Iterator[Blocker]:
        """What of that is known of a tree that runs.

        Its open files are left alone. Who holds a duplicate keeps open what the program closes meanwhile: a peer is
        told later, and an epoll instance goes on telling of it, under a number that is another file's by then.
        """
        if self._prepares and any(map(_lends, self.living)):
            with suppress(OSError):  # then there is a child when one is needed
                self._shield.start()
        yield from self._besides_files(answers=True)  # if it does shows when it stands still
        yield from self.namespaces.attachment_blockers()

    def _besides_files(self, *, answers: bool) -> Iterator[Blocker]:
        """`answers`: whether the tree may answer page faults."""
        yield from self._cgroups.blockers()
        yield from self.namespaces.blockers  # behind the files, which may hold further namespaces
        for pid in self.living:
            check_cancelled()
            with procfs.unless_gone(pid):
                yield from check_task(pid)
                yield from directories.check(pid)
                yield from check_address_space(pid, self._objects, answers)
        if self.living:
            yield from together.check_outside(self.living)

    def _attachment_blockers(self) -> Iterator[Blocker]:
        yield from self.namespaces.attachment_blockers()
        views = [view for _, view in self.files.files()]
        yield from tun_file.outsiders(self.namespaces.attached, views, self.namespaces.network_of)

    # -- capturing -------------------------------------------------------------------------

    def take(
        self, frozen: FrozenTree
    ) -> tuple[list[tuple[Record, Record | None]], list[PageSource], list[Blocker]]:
        """Capture the frozen tree.

        Returns:
            Records in order, each with the record of its kind where it is an open file; the sources of
            their pages in the order of the plan; and blockers: with any of them the rest is not to be used.
        """
        with self._mappings.ahead(self.living) as mappings:
            return self._take(frozen, mappings)

    def _take(
        self, frozen: FrozenTree, mappings: MappingsAhead
    ) -> tuple[list[tuple[Record, Record | None]], list[PageSource], list[Blocker]]:
        draft = self._looks.is_draft
        self.files.collect(self.living, not draft, self._status_of)
        blockers = [*self.namespaces.blockers, *self._cgroups.blockers(), *self.files.blockers()]
        for pid in self.living:
            check_cancelled()
            blockers += [
                *check_task(pid, self._status_of, self._stat_of),
                *directories.check(pid),
                *check_controlling_terminal(pid, self.files),
            ]
        for process in frozen.living():
            blockers += [b for tid in process.tasks for b in check_stopped(process.pid, HostPid(tid))]
        if blockers:
            return [], [], blockers
        self._together = together.capture(
            self.living,
            any(self.namespaces.semaphores(pid) for pid in self.living),
            {face: pid for pid, face in self._faces.items()},
        )
        for tid in frozen.tids():
            self._sleepers.prepare(tid)  # nothing was run inside anybody yet
        blockers += self._look_at_answers(frozen, mappings)
        if blockers:
            return [], [], blockers
        file_records = list(self.files.records(draft))
        try:
            self.namespaces.take_contents(self.files.bytes_of)
        except OSError as error:
            raise_if_exhausted(error)
            why = f"what its mount and ipc namespaces hold cannot be copied: {error.strerror}"
            return [], [], [Blocker(f"pid {frozen.root}", why, "free memory, or remove what is there")]
        processes: list[Process] = []
        captured: dict[int, tuple[HostPid, Captured]] = {}
        for pid in self.tree.pids:
            check_cancelled()
            process = frozen.processes[pid]
            if process.zombie:
                zombie = self._zombie(pid)
                if zombie is None:
                    blockers.append(
                        Blocker(f"pid {pid}", "has ended, and its parent has left the tree", transient=True)
                    )
                else:
                    processes.append(zombie)
                continue
            record, found = self._process(process, captured, mappings)
            blockers += found
            processes.append(record)
        blockers += [
            *self._attachment_blockers(),
            *self._settle_rings(captured),
        ]
        if blockers:
            return [], [], blockers
        self._found = _Found(self._head(frozen.root, processes, captured), processes, captured, file_records)
        if self._looks.live and not draft:
            return *self._without_plan(), []
        return self.planned()

    def _answerers(self) -> list[FdView]:
        """The userfaultfds of the tree."""
        return [view for _, view in self.files.files() if view.link == userfault.LINK]

    def _look_at_answers(self, frozen: FrozenTree, mappings: MappingsAhead) -> list[Blocker]:
        """What the program answers page faults of; what of it stops it."""
        blockers: list[Blocker] = []
        if views := self._answerers():
            memories = {
                self._face(process.pid): [HostPid(tid) for tid in process.tasks]
                for process in frozen.living()
                if not self._together.get(process.pid, Together()).vm
            }
            self.files.answered_by, blockers = faults.answered(views, memories, mappings)
        self._looks.answered = list(self.files.answered_by.values())
        return blockers

    def planned(self) -> tuple[list[tuple[Record, Record | None]], list[PageSource], list[Blocker]]:
        """What was captured as a tree that grows from nothing; returns what `take` does."""
        found = self._found
        assert found is not None
        spaces, sources, planner = self._arrange(found.processes, found.captured)
        if self._looks.is_draft and not planner.blockers:
            self._looks.order = list(fill_order(planner.steps))
        return self._records(spaces), sources, planner.blockers

    def _without_plan(self) -> tuple[list[tuple[Record, Record | None]], list[PageSource]]:
        """What was captured as what the tree of a draft has become."""
        found = self._found
        assert found is not None
        order = {number: place for place, number in enumerate(self._looks.order or [])}
        by_pid = {process.pids[0]: process for process in found.processes}
        spaces: list[AddressSpace] = []
        sources = self._shared_sources()
        for number in sorted(found.captured, key=lambda number: order.get(number, len(order))):
            pid, memory = found.captured[number]
            space, runs = (
                (memory.space, memory.runs)
                if number in order
                else self._beside_parent(by_pid, found.captured, number)
            )
            spaces.append(space)
            sources.append(ProcessPages(number, self._face(pid), runs, memory.untouched))
        return self._records(spaces), sources

    def _records(self, spaces: Sequence[AddressSpace]) -> list[tuple[Record, Record | None]]:
        found = self._found
        assert found is not None
        records: list[tuple[Record, Record | None]] = [(found.head, None)]
        for group in (
            self._forest.records,
            self.namespaces.namespaces,
            self._cgroups.records(),
            self._objects.mapped_files,
            self.files.takings.records,
            [shared.record for shared in self._objects.shared_memory],
            self.files.contents,
            spaces,
            found.processes,
        ):
            records += [(record, None) for record in group]
        records += found.files
        return records

    def _settle_rings(self, captured: dict[int, tuple[HostPid, Captured]]) -> list[Blocker]:
        """Put what arrives of asynchronous I/O into the records of `captured`; what does not come to rest stops it."""
        rings = {n: (pid, found.space.rings) for n, (pid, found) in captured.items() if found.space.rings}
        settled, blockers = aio.settle(rings, (view for _, view in self.files.files()))
        for number, found in settled.items():
            pid, memory = captured[number]
            captured[number] = (pid, replace(memory, space=replace(memory.space, rings=found)))
        return blockers

    def _arrange(
        self, processes: Sequence[Process], captured: dict[int, tuple[HostPid, Captured]]
    ) -> tuple[list[AddressSpace], list[PageSource], Planner]:
        """Which child shares pages with its parent; then all sources in the order of growth."""
        tables = (self.namespaces.namespaces, self._forest.records)
        planner = Planner(
            {p.pids[0]: p for p in processes},
            {},
            {n.index: n for n in tables[0]},
            {u.index: u for u in tables[1]},
        )
        by_pid = {process.pids[0]: process for process in processes}
        spaces: dict[int, AddressSpace] = {}
        runs: dict[int, Sequence[Range]] = {}
        for number, (pid, memory) in captured.items():
            check_cancelled()
            spaces[number], runs[number] = memory.space, memory.runs
            parent = by_pid.get(by_pid[pid].parent)
            if parent is not None and planner.late(parent, by_pid[pid]):
                spaces[number], runs[number] = self._beside_parent(by_pid, captured, number)
        planner = plan(processes, list(spaces.values()), *tables)
        sources = self._shared_sources()
        sources += [
            ProcessPages(number, self._face(captured[number][0]), runs[number], captured[number][1].untouched)
            for number in fill_order(planner.steps)
        ]
        return list(spaces.values()), sources, planner

    def _beside_parent(
        self, by_pid: Mapping[int, Process], captured: Mapping[int, tuple[HostPid, Captured]], number: int
    ) -> tuple[AddressSpace, Sequence[Range]]:
        """The memory of a process that can be forked from its parent: what it has of it, and the pages of its own."""
        pid, memory = captured[number]
        space, process = memory.space, by_pid[pid]
        parent = by_pid.get(process.parent)
        if parent is None or parent.space is None:
            return space, memory.runs
        parent_pid, parent_memory = captured[parent.space]
        above, below = self._face(parent_pid), self._face(pid)
        if not is_forked(parent_memory.space.vmas, space.vmas) or not os.path.samefile(
            f"/proc/{above}/exe", f"/proc/{below}/exe"
        ):
            return space, memory.runs
        shared = plan_copy_on_write(above, parent_memory.space, parent_memory.runs, below, space, memory.runs)
        if not shared.shared and not process.together.files:
            return space, memory.runs
        return replace(space, copy_of=parent.space, dropped=shared.dropped), shared.send

    def _shared_sources(self) -> list[PageSource]:
        """The pages of everything that outlives a process."""
        sources: list[PageSource] = [
            SharedPages(shared.record.space, shared) for shared in self._objects.shared_memory
        ]
        for content in self.files.contents:
            fd = self._spaces.source(content.space)
            assert fd is not None
            early = content.space in self.files.of_namespaces
            sources.append(FilePages(content.space, fd, content.size_bytes, early=early))
        return sources

    # -- one process ------------------------------------------------------------------------

    def _zombie(self, pid: HostPid) -> Process | None:
        """A process that has ended and was not collected yet; None if that is somebody else's to do by now."""
        stat, status = procfs.stat(pid), procfs.status(pid)
        parent = self.tree.member(stat.ppid)
        if not parent:
            return None
        members = self.namespaces.memberships[self._face(HostPid(parent))]
        if len(status.ns_pid) > len(procfs.status(HostPid(parent)).ns_pid):
            members = replace(members, pid=members.pid_for_children)
        user = self.namespaces.user_of_zombie(pid)
        if user is not None:
            members = replace(members, user=user)
        return Process(
            pids=list(status.ns_pid),
            parent=parent,
            pgid=self.tree.group(stat.pgrp),
            sid=self.tree.group(stat.session),
            sids=list(status.ns_sid),
            pgids=list(status.ns_pgid),
            state="zombie",
            exit_status=stat.exit_code,
            exit_signal=max(stat.exit_signal, 0),
            namespaces=members,
            comm=stat.comm[:15],
            credentials=credentials.captured(status, members.user, 0),
            cgroups=self._cgroups.of_process(pid),
        )

    def _process(
        self, frozen: FrozenProcess, captured: dict[int, tuple[HostPid, Captured]], mappings: MappingsAhead
    ) -> tuple[Process, list[Blocker]]:
        """The record of a process, and what stops it; its memory is added to `captured`, by its space."""
        number, pid = frozen.pid, self._face(frozen.pid)
        shares = self._together.get(number, Together())
        tids = [HostPid(tid) for tid in sorted(frozen.tasks, key=lambda tid: (tid != pid, tid))]
        members = self.namespaces.memberships[pid]
        subject = f"pid {number}"
        with asked(
            pid,
            tids,
            self._sleepers,
            self.namespaces.semaphores(pid),
            self._children(pid),
            self._status_of,
            mappings.of(pid) if mappings.is_there(pid) else None,
        ) as answers:
            self._notices.update(answers.notices)
            blockers = [
                *answers.blockers,
                *(b for inquiry in answers.inquiries for b in inquiry.blockers(subject, bool(members.user))),
            ]
            blockers += [
                Blocker(
                    f"pid {pid} thread {tid}",
                    "goes on with a sleep that was interrupted before, and fell asleep anew while it was looked at",
                    "try again",
                    transient=True,
                )
                for tid in tids
                if interrupted.is_lost(tid, answers.slept[tid].call)
            ]
            threads = [self._thread(pid, one, answers.slept[one.tid], members) for one in answers.inquiries]
            memory = (
                next(found for holder, found in captured.values() if holder == shares.vm)
                if shares.vm
                else None
            )
            if memory is None:
                memory = self._memory(pid, answers, mappings)
                blockers += memory.blockers
                captured[memory.space.space] = (number, memory)
        self.injected_calls += answers.injected_calls + answers.leader.injected_calls
        leader = answers.inquiries[0]
        stat = self._stat_of(number)
        status = self._status_of(number)
        if pid != number:
            threads.insert(0, leaders.capture(number, threads[0]))
        is_root = number == self.tree.pids[0]
        place = directories.captured(pid, pid, leader.status.umask or 0, self)
        record = Process(
            pids=list(status.ns_pid),
            parent=0 if is_root else self.tree.member(stat.ppid),
            pgid=self.tree.group(stat.pgrp),
            sid=self.tree.group(stat.session),
            sids=list(status.ns_sid),
            pgids=list(status.ns_pgid),
            state="stopped" if frozen.stop_signal else "running",
            exit_signal=max(stat.exit_signal, 0),
            stop_signal=frozen.stop_signal,
            notice=self._notices.get(number, ""),
            namespaces=members,
            together=shares,
            space=memory.space.space,
            fds=[] if shares.files else self.files.entries(pid),
            **asdict(place),
            actions=leader.actions(),
            pending=signals.pending(pid, shared=True, member=self.tree.member, status=leader.status),
            limits=procfs.limits(pid),
            itimers=leader.itimers(),
            timers=leader.posix_timers(self.tree.member),
            undo=[] if shares.sysvsem else answers.undo,
            oom_score_adj=int(procfs.read_file(pid, "oom_score_adj")),
            autogroup_nice=attributes.autogroup_nice(pid),
            child_subreaper=leader.child_subreaper(),
            threads=threads,
            comm=stat.comm[:15],
            loginuid=loginuid.capture(pid),
            session_keyring=leader.session_keyring(self.namespaces.memberships[pid].user)
            if not blockers
            else None,
            cgroups=self._cgroups.of_process(pid),
        )
        blockers += self._apart(pid, threads)
        for thread in threads:
            if thread.place and directories.is_removed(HostPid(thread.pids[0])):
                why = f"the root directory of its thread {thread.pids[0]} has been removed"
                blockers.append(Blocker(subject, why, "end it"))
        return record, blockers

    def _memory(self, pid: HostPid, answers: Answers, mappings: MappingsAhead) -> Captured:
        """The memory of a process; its mappings are waited for last."""
        seen = Seen(scanned(pid, answers.mappings), mappings.of(pid))
        leader = answers.inquiries[0]
        memory = capture_address_space(
            pid,
            self._objects,
            brk=answers.brk(),
            dumpable=leader.dumpable(),
            thp_disable=leader.thp_disable(),
            contexts=answers.rings,
            tracked=self._looks.live and not self._looks.is_draft,
            answered=[one for one in self._looks.answered if one.owner == pid],
            seen=seen,
            stat=self._stat_of(pid),
        )
        return replace(memory, space=replace(memory.space, **leader.of_memory()))

    def _thread(self, pid: HostPid, inquiry: Inquiry, slept: Slept, members: Memberships) -> Thread:
        record = thread_record(inquiry, members.user, self.tree.member, slept.slept_ns, slept.call)
        if inquiry.tid != pid and kcmp(pid, inquiry.tid, KCMP.FS):
            place = directories.captured(inquiry.tid, pid, inquiry.status.umask or 0, self)
            record = replace(record, place=place)
        elsewhere = self._cgroups.of_thread(pid, inquiry.tid)
        return record if elsewhere is None else replace(record, cgroups=elsewhere)

    def _apart(self, pid: HostPid, threads: Sequence[Thread]) -> Iterator[Blocker]:
        """Threads that share their directories with each other, but not with their process."""
        apart = [HostPid(thread.pids[0]) for thread in threads if thread.place is not None]
        for number, tid in enumerate(apart):
            for other in apart[:number]:
                if kcmp(tid, other, KCMP.FS) == 0:
                    why = f"shares its working directory with thread {other}, and not with the others"
                    yield Blocker(f"pid {pid} thread {tid}", why, "end one of them")

    def _children(self, pid: HostPid) -> dict[int, int]:
        """The living children of a process in the tree: by the pid that it knows them by, their pids."""
        living = set(self.tree.pids) - self._zombies
        children = [child for child in procfs.children(pid) if child in living]
        depth = len(self._status_of(pid).ns_pid) if children else 0
        return {self._status_of(child).ns_pid[depth - 1]: child for child in children}

    def _head(
        self,
        root: HostPid,
        processes: Sequence[Process],
        captured: Mapping[int, tuple[HostPid, Captured]],
    ) -> Head:
        xstate = next(thread.xstate for process in processes for thread in process.threads)
        first = next((process.space for process in processes if process.pids[0] == root), None)
        vmas = captured[first][1].space.vmas if first is not None else ()
        vdso = next(((vma.start, vma.end) for vma in vmas if vma.kind == "vdso"), None)
        offsets = clocks.own_offsets_ns()
        return Head(
            version=FORMAT_VERSION,
            machine=arch.MACHINE,
            page_size_bytes=arch.PAGE_BYTES,
            xfeatures=arch.xfeatures(xstate),
            xstate_size_bytes=len(xstate),
            vdso=vdso_digest(self._face(root), vdso),
            kernel=os.uname().release,
            created_ns=time.time_ns(),
            root=root,
            monotonic_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            boot_id=clocks.boot_id(),
            clock_offsets_ns=(offsets["monotonic"], offsets["boottime"]),
            job=shell_job.capture(self.living, self.files, self.tree.group),
        )


def _lends(pid: HostPid) -> bool:
    """Whether a process that runs has files whose state may have to be borrowed, as far as that can be seen."""
    with suppress(OSError, procfs.ProcessGone):
        for number in procfs.list_dir(pid, "fd"):
            with suppress(OSError):  # it is closed by now
                link = os.readlink(f"/proc/{pid}/fd/{number}")
                if link.startswith("socket:") or link.endswith("/ptmx"):
                    return True
    return False
