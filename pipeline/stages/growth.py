"""Growing the tree: the steps of `pipeline.image.plan`, played on puppets.

At the end every process of the image stands there as a puppet: right pids, parent,
session, group, namespaces, memory mappings and pages; one task each, no descriptors,
with all capabilities in its user namespace. `pipeline.stages.finish` does the rest.

The pages of a process may have to be there before its children are born, so `grow`
stops at each `Fill` and lets its caller bring them: it is a generator.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.image.plan import Planner
from pipeline.image.schema import Memberships, Process
from pipeline.image.steps import (
    Become,
    BeginTime,
    Fill,
    FoundSession,
    Inherit,
    JoinGroup,
    LookAhead,
    Remove,
    Share,
    Spawn,
)
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.remote.births import Announcer, Inside, clone_with_pids
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces.flags import KINDS
from pipeline.resources.tasks import together


@dataclass
class Grown:
    """A process that stands as a puppet.

    Args:
        puppet: its first task.
        members: the namespaces it is in now.
        pgid: its process group now, a level-0 pid.
        threads: the puppets of all of its tasks, once there are more.
        thread_pids: the pids that the image gives those behind the first.
        ahead: the pid namespace that its children are born into by now, if that is not its own.
    """

    puppet: Puppet
    members: Memberships
    pgid: int = 0
    threads: list[Puppet] = field(default_factory=list)
    thread_pids: list[Sequence[int]] = field(default_factory=list)
    ahead: int | None = None


class Body(Protocol):
    """How a puppet gets namespaces and memory: the rooms that `Growth` calls into."""

    def join_owner(self, helper: Puppet, userns: int) -> None:
        """Move a helper into user namespace `userns`, with all capabilities there."""

    def pid_namespace_begins(self, pidns: int, first: Puppet) -> None:
        """Pid namespace `pidns` has its first process: what waited for it can be done."""

    def session_founded(self, leader: int, puppet: Puppet) -> None:
        """Session `leader` has begun: its terminal is taken before anybody is born into it."""

    def begin_time(self, timens: int, puppet: Puppet) -> None:
        """`BeginTime` of the plan."""

    def choose_empty_pids(self, pidns: int, puppet: Puppet) -> None:
        """Pid namespace `pidns`, in which nobody lives, is made for the children of `puppet`."""

    def become(self, process: Process, grown: Grown) -> None:
        """`Become` of the plan."""

    def inherit(self, process: Process, grown: Grown) -> None:
        """`Inherit` of the plan."""

    def share(self, process: Process, grown: Grown) -> None:
        """`Share` of the plan."""


class Growth:
    """Plays a plan. Every puppet is in `grown` or `stand_ins` from its birth to the end of the rebuild.

    Args:
        planner: the plan.
        launcher: the first puppet, in the namespaces that the image calls external.
        body: gives puppets namespaces and memory.
        first_level: how many outer pid namespace levels of the image are replaced by the launcher's own:
            0 where level 0 is where the launcher is.
        choose_outer: False where level-0 pids need not be kept: no process of the tree sees them.
        announcer: announces pids at level 0; None where nobody can.
        first: the first process of a pid namespace made for the tree: the parent of its root; None where
            the tree's root becomes the restorer's child.
    """

    def __init__(
        self,
        planner: Planner,
        launcher: Puppet,
        body: Body,
        *,
        choose_outer: bool,
        announcer: Announcer | None,
        first: Puppet | None = None,
    ) -> None:
        self._planner = planner
        self._launcher = launcher
        self._body = body
        self._choose_outer = choose_outer
        external = {kind: self._external(kind) for kind in KINDS}
        self._outside = Memberships(
            user=0, **external, pid_for_children=external["pid"], time_for_children=external["time"]
        )
        self._announcer = announcer
        self._first = first
        self._before = set(launcher.stage.alive)
        self.grown: dict[int, Grown] = {}
        self._stand_ins: dict[int, tuple[Grown, int]] = {}
        self._wardens: dict[int, Inside] = {}

    @property
    def _outer(self) -> Puppet:
        """Who clones the root."""
        return self._first or self._launcher

    def _is_launcher(self, creator: int) -> bool:
        """Whether a creator of the plan is the launcher, whose clones are the restorer's children."""
        return not creator and self._first is None

    def _external(self, kind: str) -> int:
        return next(n.index for n in self._planner.namespaces.values() if n.kind == kind and n.external)

    # -- the play -------------------------------------------------------------------

    def grow(self) -> Iterator[Fill]:
        """Play the plan; yields each `Fill` and goes on when the caller has brought the pages."""
        for step in self._planner.steps:
            match step:
                case Spawn():
                    self._spawn(step)
                case FoundSession(pid):
                    self._of(pid).puppet.syscall(NR.setsid)
                    self._of(pid).pgid = pid
                    self._body.session_founded(pid, self._of(pid).puppet)
                case JoinGroup(pid, pgid):
                    self._join_group(pid, pgid)
                case Become(pid):
                    self._body.become(self._planner.processes[pid], self.grown[pid])
                case Inherit(pid):
                    self._body.inherit(self._planner.processes[pid], self.grown[pid])
                case Share(pid):
                    self._body.share(self._planner.processes[pid], self.grown[pid])
                case BeginTime(pid, timens):
                    grown = self.grown[pid]
                    self._body.begin_time(timens, grown.puppet)
                    grown.members = replace(grown.members, time_for_children=timens)
                case LookAhead(pid, pidns):
                    self._choose_pids(self.grown[pid].puppet, pidns)
                    self.grown[pid].ahead = pidns
                case Remove(pid):
                    self._remove(pid)
                case Fill():
                    yield step

    def mend(self, ended: Sequence[int], births: Planner) -> None:
        """End processes; another `grow` plays the births of others.

        Args:
            ended: children before parents, none of them the root.
            births: their plan, of the tree as it is to be.
        """
        for pid in ended:
            process = self._planner.processes[pid]
            self._end_helper(
                self.grown[process.parent].puppet, self.grown.pop(pid).puppet, process.exit_signal
            )
        self._planner = births

    def end_wardens(self) -> None:
        """Nobody is born any more, threads neither: whoever announced pids ends."""
        for pidns in list(self._wardens):
            self._end_helper(self._first_of(pidns).puppet, self._wardens.pop(pidns).puppet)

    def puppets(self) -> Iterator[Puppet]:
        """Every puppet that exists, threads before their leader, children before parents."""
        yield from (warden.puppet for warden in self._wardens.values())
        yield from (grown.puppet for grown, _ in self._stand_ins.values())
        for grown in reversed(self.grown.values()):
            yield from reversed(grown.threads[1:])
            yield grown.puppet

    def _of(self, pid: int) -> Grown:
        return self.grown[pid] if pid in self.grown else self._stand_ins[pid][0]

    def first_of(self, pidns: int) -> int:
        """The pid here of a process in pid namespace `pidns`: its first one, or, of the external one, who clones."""
        return self._outer.pid if pidns == self._external("pid") else self._first_of(pidns).puppet.pid

    def _first_of(self, pidns: int) -> Grown:
        for pid, process in self._planner.processes.items():
            if process.namespaces.pid == pidns and process.pids[-1] == 1:
                return self.grown[pid]
        raise RebuildError(f"pid namespace {pidns} has no first process in the image")

    def _lives(self, pidns: int) -> bool:
        return any(process.namespaces.pid == pidns for process in self._planner.processes.values())

    # -- births -----------------------------------------------------------------------

    def _levels(self, pidns: int) -> list[int]:
        """The pid namespaces from the outermost of the image down to `pidns`."""
        levels: list[int] = []
        at: int | None = pidns
        while at is not None:
            levels.append(at)
            at = self._planner.namespaces[at].parent
        return levels[::-1]

    def _choosable(self, levels: Sequence[int], userns: int) -> int:
        """How many of the innermost levels are owned by `userns` or something below it."""
        count = 0
        for pidns in reversed(levels):
            if not self._planner.within(self._planner.namespaces[pidns].owner, userns):
                break
            count += 1
        return count

    def _announcers(self, levels: Sequence[int]) -> list[Announcer | None]:
        return [self._announcer, *(self._wardens.get(pidns) for pidns in levels[1:])]

    def _wanted(self, pids: Sequence[int]) -> list[int | None]:
        wanted: list[int | None] = list(pids)
        if not self._choose_outer and len(wanted) > 1:
            wanted[0] = None
        return wanted

    def clone_task(
        self, creator: Grown, pidns: int, pids: Sequence[int], flags: int, **options: int
    ) -> Puppet:
        """Clone a task with the pids of the image, by whatever means reach each level."""
        levels = self._levels(pidns)
        return clone_with_pids(
            creator.puppet,
            self._wanted(pids),
            self._choosable(levels, creator.members.user),
            self._announcers(levels),
            flags,
            **options,
        )

    def _spawn(self, step: Spawn) -> None:
        creator = self._of(step.creator) if step.creator else Grown(self._outer, self._outside)
        flags = CLONE.PARENT if step.sibling or self._is_launcher(step.creator) else 0
        if step.stand_in:
            pidns = self._pidns_of(step.creator)
            # its siblings, the members of its session, inherit its exit signal
            puppet = self.clone_task(creator, pidns, step.pids, flags, exit_signal=signal.SIGCHLD)
            self._stand_ins[step.pid] = (Grown(puppet, creator.members, creator.pgid), step.creator)
            return
        process = self._planner.processes[step.pid]
        members = replace(creator.members, time=creator.members.time_for_children)
        options = {"exit_signal": process.exit_signal}
        flags |= together.flags(step.shares)
        if step.pidns is None or step.pidns == creator.ahead:
            puppet = self.clone_task(creator, process.namespaces.pid, process.pids, flags, **options)
        elif step.first:
            members = replace(members, user=self._planner.namespaces[step.pidns].owner, pid=step.pidns)
            puppet = self._clone_first(creator, step, process, options)
        else:
            puppet = self._clone_into(creator, step.pidns, process, flags, options)
        self.grown[step.pid] = Grown(puppet, members, creator.pgid)
        if step.first and step.pidns is not None:
            self._body.pid_namespace_begins(step.pidns, puppet)
            self._post_warden(step.pidns)

    def _pidns_of(self, pid: int) -> int:
        process = self._planner.processes.get(pid)
        if process is not None:
            return process.namespaces.pid
        return self._external("pid")

    def _clone_first(self, creator: Grown, step: Spawn, process: Process, options: dict[str, int]) -> Puppet:
        """The first process of a new pid namespace, by a helper that owns the namespace."""
        assert step.pidns is not None
        owner = self._planner.namespaces[step.pidns].owner
        beside = self._is_launcher(step.creator)
        # the siblings that it clones have its exit signal
        helper = Grown(
            creator.puppet.clone(CLONE.PARENT if beside else 0, exit_signal=process.exit_signal),
            creator.members,
        )
        try:
            if owner != helper.members.user:
                self._body.join_owner(helper.puppet, owner)
                helper.members = replace(helper.members, user=owner)
            helper.puppet.syscall(NR.unshare, CLONE.NEWPID)
            return self.clone_task(helper, step.pidns, process.pids, CLONE.PARENT, **options)
        finally:
            if beside:
                helper.puppet.kill_and_reap()
            else:
                self._end_helper(creator.puppet, helper.puppet, process.exit_signal)

    def _clone_into(
        self, creator: Grown, pidns: int, process: Process, flags: int, options: dict[str, int]
    ) -> Puppet:
        """A process of a pid namespace that exists, by a parent outside of it."""
        own = creator.puppet.syscall(NR.pidfd_open, _pid_inside(creator.puppet), 0)
        first = os.pidfd_open(self._first_of(pidns).puppet.pid)
        try:
            (inside,) = creator.puppet.send_fds([first])
        finally:
            os.close(first)
        creator.puppet.syscall(NR.setns, inside, CLONE.NEWPID)
        close = [(NR.close, fd) for fd in (own, inside)]
        try:
            child = self.clone_task(creator, pidns, process.pids, flags, **options)
        finally:
            creator.puppet.syscall(NR.setns, own, CLONE.NEWPID)
            for number, fd in close:
                creator.puppet.syscall(number, fd)
        for number, fd in close:  # it has inherited them
            child.syscall(number, fd)
        return child

    def _post_warden(self, pidns: int) -> None:
        """Keep somebody in a new pid namespace who may announce pids in it, where somebody will need that.

        Whoever sits in a user namespace below the owner's may not list this level in set_tid.
        """
        owner = self._planner.namespaces[pidns].owner
        if any(
            pidns in self._levels(process.namespaces.pid) and process.namespaces.user != owner
            for process in self._planner.processes.values()
        ):
            self._wardens[pidns] = Inside(self._first_of(pidns).puppet.clone())

    # -- groups and ends ----------------------------------------------------------------

    def _join_group(self, pid: int, pgid: int) -> None:
        member = self._of(pid)
        if pgid == pid:
            member.puppet.syscall(NR.setpgid, 0, 0)
        else:
            process = self._planner.processes[pid]
            leader = self._planner.processes.get(pgid)
            depth = len(process.pids)
            if leader is not None and len(leader.pids) < depth:
                raise RebuildError(f"pid {pid}: its process group {pgid} is led from an outer pid namespace")
            number = leader.pids[depth - 1] if leader is not None else process.pgids[-1]
            member.puppet.syscall(NR.setpgid, 0, number)
        member.pgid = pgid

    def _remove(self, pid: int) -> None:
        stand_in, creator = self._stand_ins.pop(pid)
        if self._is_launcher(creator):
            stand_in.puppet.kill_and_reap()
        else:
            parent = self._of(creator).puppet if creator else self._outer
            self._end_helper(parent, stand_in.puppet)

    def _end_helper(self, parent: Puppet, helper: Puppet, exit_signal: int = signal.SIGCHLD) -> None:
        helper.kill_and_reap()
        parent.reap_children(exit_signal)

    def look_ahead(self) -> None:
        """Put the children yet to be born of each process into the pid namespace it has chosen for them."""
        for pid, process in self._planner.processes.items():
            members = process.namespaces
            chosen = members.pid_for_children
            if process.state == "zombie" or chosen in {members.pid, self.grown[pid].ahead}:
                continue
            if self._lives(chosen):
                self._choose_pids(self.grown[pid].puppet, chosen)
            else:
                self._body.choose_empty_pids(chosen, self.grown[pid].puppet)

    def _choose_pids(self, puppet: Puppet, pidns: int) -> None:
        first = os.pidfd_open(self._first_of(pidns).puppet.pid)
        try:
            (inside,) = puppet.send_fds([first])
        finally:
            os.close(first)
        puppet.syscall(NR.setns, inside, CLONE.NEWPID)
        puppet.syscall(NR.close, inside)

    def kill_all(self) -> None:
        """End everybody who was born here, children before parents, each collected by its parent; idempotent.

        First whoever is no process of the tree, or has found no place in it when its birth went wrong.
        """
        placed = {task.tid for grown in self.grown.values() for task in (grown.puppet, *grown.threads)}
        self._launcher.stage.end(keep=self._before | placed)
        self._stand_ins.clear()
        self._wardens.clear()
        for pid in list(reversed(self.grown)):
            grown = self.grown.pop(pid)
            with suppress(OSError, RebuildError):
                grown.puppet.reap_children()
            for thread in reversed(grown.threads[1:]):
                thread.kill_and_reap()
            grown.puppet.kill_and_reap()


def _pid_inside(puppet: Puppet) -> int:
    return puppet.syscall(NR.getpid)
