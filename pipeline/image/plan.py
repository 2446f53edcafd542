"""The order in which a tree grows again. Pure: from records to a list of steps.

The kernel gives several things only by birth: the parent, the session (a process can
found one, never join one), a place in a pid namespace, and copy-on-write memory. And
some only downwards: from a user namespace a process can go deeper, never up. So the
order of births, sessions, moves and memory is one puzzle, solved here once. The dump
uses the plan too: pages are streamed in the order in which the rebuild wants them.

For a process P, born in user namespace S:

1. children that must be born before P moves (they live outside P's final user namespace, or in another
   one that cannot be entered from there) or before P founds its session (they are in the older one);
2. P founds its session; children that live outside P's final namespace, but in its session;
3. P *becomes* itself (joins namespaces, gets a fresh address space and mappings) or
   *inherits* (keeps the memory it was forked with, and only what differs is changed) or *shares* (goes on using
   that of its creator: CLONE_VM);
4. P's pages;
5. all other children, which may inherit from P, and siblings that share something with P (CLONE_FILES and the
   like), which P clones.

A session or process group whose leader is gone is founded again by a stand-in with the
leader's pid, which ends when the others have joined.

What cannot be solved is a `Blocker`; `plan` is also what `check` and `dump` ask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.image.plan_sharing import Sharing
from pipeline.image.schema import AddressSpace, Namespace, Process, UserNamespace
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
    Step,
)

#: kinds of namespaces that a process joins by setns; a pid namespace it is born into, and time has a step of its own
_JOINED = ("mnt", "uts", "ipc", "net", "cgroup")


SIGCHLD = 17


@dataclass
class _State:
    """What a process is while the plan is played: session and group it is in."""

    sid: int
    pgid: int


@dataclass
class Planner:
    """Plays the growth of a tree. Use `plan`.

    Args:
        processes: by level-0 pid.
        spaces: address spaces by number.
        namespaces: by index.
        user_namespaces: by index.
    """

    processes: Mapping[int, Process]
    spaces: Mapping[int, AddressSpace]
    namespaces: Mapping[int, Namespace]
    user_namespaces: Mapping[int, UserNamespace]
    steps: list[Step] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._children: dict[int, list[Process]] = defaultdict(list)
        for process in sorted(self.processes.values(), key=_birth_order):
            self._children[process.parent].append(process)
        self._state: dict[int, _State] = {}
        self._adopted: dict[int, list[Process]] = defaultdict(list)
        self._is_adopted: set[int] = set()
        self._stand_in_sessions: dict[tuple[int, int], int] = {}
        self._spawned: set[int] = set()
        self._settled: set[int] = set()
        self._ahead: set[int] = set()
        self._users: dict[int, set[int]] = {}
        self._joined: dict[int, set[tuple[str, int]]] = {}
        self._gather()
        self._sharing = Sharing(self._children)
        self._find_adoptions()

    # -- facts ------------------------------------------------------------------

    def within(self, inner: int, outer: int) -> bool:
        """Whether user namespace `inner` is `outer` or below it."""
        at: int | None = inner
        while at is not None and at != outer:
            at = self.user_namespaces[at].parent
        return at == outer

    def _gather(self) -> None:
        """For every process: the user namespaces that it and its descendants live in, and the others they join."""
        order = list(self._children[0])
        for process in order:
            order += self._children[process.pids[0]]
        for process in reversed(order):
            pid, members = process.pids[0], process.namespaces
            users, joined = self._users.setdefault(pid, set()), self._joined.setdefault(pid, set())
            users.add(members.user)
            if process.state != "zombie":
                joined |= {(kind, getattr(members, kind)) for kind in _JOINED}
            if process.parent:
                self._users.setdefault(process.parent, set()).update(users)
                self._joined.setdefault(process.parent, set()).update(joined)

    def _subtree_within(self, process: Process, outer: int) -> bool:
        return all(self.within(user, outer) for user in self._users[process.pids[0]])

    def inherits(self, process: Process) -> bool:
        """Whether a process has pages of its parent, and is to be forked from it."""
        parent = self.processes.get(process.parent)
        if process.space is None or parent is None or parent.space is None:
            return False
        return self.spaces[process.space].copy_of == parent.space

    def late(self, parent: Process, child: Process) -> bool:
        """Whether `child` can be born after `parent` has its memory, so that it may inherit it."""
        if child.pids[0] in self._is_adopted:
            return False
        if self._chooses_early(parent) and child.namespaces.pid != parent.namespaces.pid_for_children:
            return False
        leader = parent.sid == parent.pids[0]
        before_session = leader and child.sid not in (parent.sid, child.pids[0])
        return (
            not before_session
            and self._subtree_within(child, parent.namespaces.user)
            and self._subtree_reaches(child, parent)
        )

    def _chooses_early(self, process: Process) -> bool:
        """Whether the user namespace of a process is no place to choose the pid namespace of its children from."""
        chosen = process.namespaces.pid_for_children
        if process.state == "zombie" or chosen == process.namespaces.pid:
            return False
        return not self.within(self.namespaces[chosen].owner, process.namespaces.user)

    def _subtree_reaches(self, process: Process, parent: Process) -> bool:
        """Whether `process` and its descendants can get into their namespaces from where `parent` ends up.

        setns wants capabilities in the owner of the namespace: there is no way back into one that is owned
        further out, such as an external one.
        """
        for kind, index in self._joined[process.pids[0]]:
            if index != getattr(parent.namespaces, kind):
                namespace = self.namespaces[index]
                if namespace.external or not self.within(namespace.owner, parent.namespaces.user):
                    return False
        return True

    def _find_adoptions(self) -> None:
        """Children whose session leader is a living sibling are cloned by that sibling."""
        for siblings in self._children.values():
            leaders = {p.pids[0] for p in siblings if p.sid == p.pids[0] and p.state != "zombie"}
            for child in siblings:
                if (
                    child.sid in leaders
                    and child.sid != child.pids[0]
                    and not self._sharing.is_beside(child.pids[0])
                ):
                    parent = self.processes.get(child.parent)
                    if parent is None or parent.sid != child.sid:
                        self._adopted[child.sid].append(child)
                        self._is_adopted.add(child.pids[0])

    # -- the play ---------------------------------------------------------------

    def play(self) -> None:
        """Fill `steps` and `blockers`."""
        roots = self._children[0]
        for root in roots:
            self._state.setdefault(0, _State(0, 0))
            self._bear(root, creator=0, born_in=0)
        for process in self.processes.values():
            if process.pids[0] not in self._spawned:
                self.blockers.append(Blocker(f"pid {process.pids[0]}", "its parent is not part of the tree"))
        self._join_groups()

    def _bear(self, child: Process, creator: int, born_in: int, sibling: bool = False) -> None:
        pid = child.pids[0]
        if pid in self._spawned:
            return
        inherited = self._state[creator]
        if child.sid not in (pid, inherited.sid) and not sibling:
            leader = self._stand_in(child, creator)
            if leader is None:
                return
            creator, sibling, inherited = leader, True, self._state[leader]
        spawn = self._spawn(child, creator, sibling)
        shares, blockers = self._sharing.given(child, self.processes.get(creator), sibling, self._settled)
        self.blockers += blockers
        self.steps.append(replace(spawn, shares=shares) if shares else spawn)
        self._spawned.add(pid)
        self._state[pid] = _State(inherited.sid, inherited.pgid)
        first_in = self.steps[-1]
        if isinstance(first_in, Spawn) and first_in.first and first_in.pidns is not None:
            born_in = self.namespaces[first_in.pidns].owner
            if not self._subtree_within(child, born_in):
                self.blockers.append(
                    Blocker(
                        f"pid {pid}",
                        "a descendant lives outside the user namespace that owns its pid namespace",
                        "such a process has entered from outside; end it first",
                    )
                )
        self._live(child, born_in)

    def _spawn(self, child: Process, creator: int, sibling: bool) -> Spawn:
        pid = child.pids[0]
        creating = self.processes.get(creator)
        own_level = creating.namespaces.pid if creating is not None else self._external_pidns()
        pidns = child.namespaces.pid
        if pidns == own_level:
            return Spawn(pid, creator, sibling)
        return Spawn(pid, creator, sibling, pidns, first=child.pids[-1] == 1)

    def _external_pidns(self) -> int:
        return next(n.index for n in self.namespaces.values() if n.kind == "pid" and n.external)

    def _stand_in(self, child: Process, creator: int) -> int | None:
        """A stand-in for the dead leader of `child`'s session, a child of the same parent."""
        pid, sid = child.pids[0], child.sid
        key = (creator, sid)
        if key in self._stand_in_sessions:
            return sid
        if sid == 0 or sid in self.processes:
            where = "outside the tree" if sid == 0 else f"led by pid {sid}"
            self.blockers.append(
                Blocker(
                    f"pid {pid}",
                    f"its session is {where} and is neither its parent's, nor founded by a sibling or a dead process",
                    "start the tree in a session of its own (setsid)",
                )
            )
            return None
        if any(leader == sid for _, leader in self._stand_in_sessions):
            self.blockers.append(
                Blocker(f"pid {pid}", f"session {sid} has a dead leader and members with different parents")
            )
            return None
        if self._refuse_ahead(creator, f"session {sid}, whose leader has ended"):
            return None
        self._stand_in_sessions[key] = sid
        pids = tuple(child.sids or [sid])
        if 0 in pids:
            self.blockers.append(
                Blocker(f"pid {pid}", "its session had a leader outside its pid namespace, which is gone")
            )
            return None
        self.steps += [Spawn(sid, creator, stand_in=True, pids=pids), FoundSession(sid)]
        self._state[sid] = _State(sid, sid)
        return sid

    def _live(self, process: Process, born_in: int) -> None:
        pid = process.pids[0]
        children = self._children[pid]
        adopted = self._is_adopted
        own = [c for c in children if c.pids[0] not in adopted and not self._sharing.is_beside(c.pids[0])]
        leader = process.sid == pid
        early = [c for c in own if not self.late(process, c)]
        if leader:
            for child in early:
                if child.sid not in (pid, child.pids[0]):
                    self._bear(child, pid, born_in)
            self.steps.append(FoundSession(pid))
            self._state[pid] = _State(pid, pid)
            for sibling in self._adopted.get(pid, ()):
                self._bear(sibling, pid, born_in, sibling=True)
        elif process.pgid == pid:
            self._join(process, pid)
        elif process.pgid != self._state[pid].pgid and self._led_by_living(process.pgid):
            self._join(process, process.pgid)
        for child in early:
            self._bear(child, pid, born_in)
        begins_time = self._time_to_begin(process)
        if begins_time is not None and self.namespaces[begins_time].owner != process.namespaces.user:
            self.steps.append(BeginTime(pid, begins_time))
            self._refuse_time(process, [c for c in own if c not in early], begins_time, inside=False)
            begins_time = None
        if self._chooses_early(process):
            self._look_ahead(process)
        if process.state != "zombie":
            space = process.space
            inherits = self.inherits(process)
            if process.together.vm:
                self.steps.append(Share(pid))
            else:
                self.steps.append(Inherit(pid) if inherits else Become(pid))
                if not inherits and process.parent and process.exit_signal != SIGCHLD:
                    why = f"tells its parent of its end by signal {process.exit_signal} (clone), not by SIGCHLD, "
                    self.blockers.append(
                        Blocker(f"pid {pid}", why + "and can only be made by executing a program")
                    )
                if space is not None:
                    self.steps.append(Fill(space))
            self._settled.add(pid)
        if begins_time is not None:
            self._refuse_time(process, early, begins_time, inside=True)
            for child in own:
                if child.namespaces.time != begins_time:
                    self._bear(child, pid, process.namespaces.user)
            self.steps.append(BeginTime(pid, begins_time))
        for child in own:
            self._bear(child, pid, process.namespaces.user)
        for sibling in self._sharing.beside(pid):
            self._bear(sibling, pid, process.namespaces.user, sibling=True)
        for key in [k for k in self._stand_in_sessions if k[0] == pid]:
            self.steps.append(Remove(self._stand_in_sessions.pop(key)))

    def _look_ahead(self, process: Process) -> None:
        pid, chosen = process.pids[0], process.namespaces.pid_for_children
        firsts = [
            p.pids[0] for p in self.processes.values() if p.namespaces.pid == chosen and p.pids[-1] == 1
        ]
        if any(first not in self._spawned for first in firsts) or len(process.threads) > 1:
            self.blockers.append(
                Blocker(
                    f"pid {pid}",
                    "forks into a pid namespace that a user namespace further out owns, and "
                    + (
                        "has threads"
                        if len(process.threads) > 1
                        else "moved before that had its first process"
                    ),
                    "end it",
                )
            )
            return
        self.steps.append(LookAhead(pid, chosen))
        self._ahead.add(pid)

    def _refuse_ahead(self, creator: int, what: str) -> bool:
        """Whether somebody who has died cannot be stood in for, because its parent forks into another pid namespace."""
        if creator not in self._ahead:
            return False
        self.blockers.append(
            Blocker(
                f"pid {creator}",
                f"forks into another pid namespace, and children of it are in {what}",
                "end it",
            )
        )
        return True

    def _time_to_begin(self, process: Process) -> int | None:
        """The time namespace that a process has made for its children, and is not in itself."""
        members = process.namespaces
        own = members.time_for_children != members.time and process.state != "zombie"
        return members.time_for_children if own else None

    def _refuse_time(
        self, parent: Process, children: Sequence[Process], timens: int, *, inside: bool
    ) -> None:
        """Children that would be born on the wrong side of `timens`."""
        for child in children:
            if (child.namespaces.time == timens) == inside and child.state != "zombie":
                self.blockers.append(
                    Blocker(
                        f"pid {child.pids[0]}",
                        f"its time namespace and that for the children of pid {parent.pids[0]} cannot be given "
                        "to them in the order in which they must be born",
                    )
                )

    def _led_by_living(self, pgid: int) -> bool:
        return pgid in self._spawned and self._state[pgid].pgid == pgid

    def _join(self, process: Process, pgid: int) -> None:
        pid = process.pids[0]
        self.steps.append(JoinGroup(pid, pgid))
        self._state[pid] = _State(self._state[pid].sid, pgid)

    def _join_groups(self) -> None:
        """Groups that could not be joined at birth: a later leader, or a dead one (by a stand-in)."""
        stand_ins: dict[int, int] = {}
        for process in sorted(self.processes.values(), key=_birth_order):
            pid, pgid = process.pids[0], process.pgid
            if pid not in self._spawned or self._state[pid].pgid == pgid:
                continue
            if pgid == 0:
                self.blockers.append(
                    Blocker(
                        f"pid {pid}",
                        "is in a process group outside the tree, and its parent is not",
                        "start the tree in a session of its own (setsid)",
                    )
                )
                continue
            if pgid not in self.processes and pgid not in stand_ins:
                if self._refuse_ahead(pid, f"process group {pgid}, whose leader has ended"):
                    continue
                stand_ins[pgid] = pid
                pids = tuple(process.pgids or [pgid])
                if 0 in pids:
                    self.blockers.append(
                        Blocker(
                            f"pid {pid}", "its group had a leader outside its pid namespace, which is gone"
                        )
                    )
                    continue
                self.steps += [Spawn(pgid, pid, stand_in=True, pids=pids), JoinGroup(pgid, pgid)]
                self._state[pgid] = _State(self._state[pid].sid, pgid)
            leader_sid = self._state[pgid].sid if pgid in self._state else None
            if leader_sid != self._state[pid].sid:
                self.blockers.append(Blocker(f"pid {pid}", f"process group {pgid} is in another session"))
                continue
            self._join(process, pgid)
        self.steps += [Remove(pgid) for pgid in stand_ins]


def _birth_order(process: Process) -> tuple[int, int]:
    return (process.state == "zombie", process.pids[0])


def plan(
    processes: Sequence[Process],
    spaces: Sequence[AddressSpace],
    namespaces: Sequence[Namespace],
    user_namespaces: Sequence[UserNamespace],
) -> Planner:
    """Play the growth of the tree; look at `steps` and `blockers` of the result."""
    planner = Planner(
        {p.pids[0]: p for p in processes},
        {s.space: s for s in spaces},
        {n.index: n for n in namespaces},
        {u.index: u for u in user_namespaces},
    )
    planner.play()
    return planner


def fill_order(steps: Sequence[Step]) -> Iterator[int]:
    """The spaces of processes in the order in which the rebuild wants their pages."""
    return (step.space for step in steps if isinstance(step, Fill))
