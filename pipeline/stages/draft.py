"""How a tree that was built from one look at it becomes that of a later look. Pure; asked by both sides.

While a tree is sent that runs, the destination builds from a *draft*: namespaces, processes, mappings, memory. When the
tree stands still, it is looked at once more, and what was built is changed to that: mappings and pages that differ.
Processes and threads that are there no longer are ended, and those that are new are born. What a process gets only at
the end (descriptors, timers, registers...) may be anything. Of what it gets at its birth nothing can be changed: if
something of that is not as it was, the process of the draft is ended with all that it has borne, and born anew.

Everything else that had a part in the building has to be the same. If it is not, the tree is built anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from pipeline.image import numbers
from pipeline.image.codec import Image
from pipeline.image.graft import graft
from pipeline.image.plan import Planner, fill_order
from pipeline.image.schema import Credentials, Namespace, Process, SharedMemory, Together
from pipeline.resources import external_state, pty_state
from pipeline.resources.memory.alike import is_forked
from pipeline.resources.memory.rebuild import find_hole, leaves_free
from pipeline.stages.memory_layout import HOLE_BYTES

#: descriptors that a tree may have more of in the end than in its draft
SPARE_DESCRIPTORS = 256


class Mending(NamedTuple):
    """What becomes of the processes of a draft.

    `reasons`: why it cannot become the later tree, in words; with any of them the rest is not to be used.
    `ended`: level-0 pids of the draft, children before parents. `births`: the plan of those that are born then, some of
    them with the pid of one that was ended.
    """

    reasons: Sequence[str]
    ended: Sequence[int]
    births: Planner

    @property
    def new_spaces(self) -> list[int]:
        """The spaces of those that are born, in the order in which their pages are wanted: behind all others."""
        return list(fill_order(self.births.steps))


def mending(draft: Image, now: Image) -> Mending:
    """How what was built from `draft` becomes `now`."""
    ended = _ended(draft, now)
    born = [pid for pid in now.processes if pid not in draft.processes or pid in ended]
    if draft.head.root in ended:
        reasons = ["its first process is in other namespaces, sessions or groups, or is another program"]
        return Mending(reasons, [], graft(now, ()))
    births = graft(now, born)
    reasons = [*differences(draft, now), *map(str, births.blockers)]
    if any(draft.processes[pid].together != Together() for pid in ended):
        reasons.append(
            "of processes that share memory or descriptors one has ended, or has become another one"
        )
    if any(draft.processes[pid].parent not in draft.processes for pid in ended):
        reasons.append("a process without a parent in the tree has ended")
    if not ended.isdisjoint(_terminal_sessions(draft)):
        reasons.append("the leader of a session with a terminal has ended, or has become another process")
    cgroups = {index for process in draft.processes.values() for index in process.cgroups}
    if not all(cgroups.issuperset(now.processes[pid].cgroups) for pid in born):
        reasons.append("a new process is in a cgroup where none was")
    last_first = [pid for pid in reversed(draft.processes) if pid in ended]
    return Mending(reasons, sorted(last_first, key=lambda pid: -_depth(draft, pid)), births)


def _depth(image: Image, pid: int) -> int:
    """How many processes of the tree are above one."""
    depth = 0
    while (pid := image.processes[pid].parent) in image.processes:
        depth += 1
    return depth


def _ended(draft: Image, now: Image) -> set[int]:
    """Who of the draft does not stay: who has ended, or cannot become what it is now, and whoever depends on such."""
    ended = {pid for pid in draft.processes if not _stays(draft, now, pid)}
    found = -1
    while len(ended) != found:
        found = len(ended)
        # a number is not free for another process while a session or group is called by it
        again = ended & now.processes.keys()
        for pid, process in draft.processes.items():
            if process.parent in ended or process.sid in again or process.pgid in again:
                ended.add(pid)
    return ended


def _stays(draft: Image, now: Image, pid: int) -> bool:
    """Whether a process of the draft can become that of the same pid."""
    before, after = draft.processes[pid], now.processes.get(pid)
    if after is None or _birth(before) != _birth(after):
        return False
    if before.space is None or after.space is None:
        return before.space == after.space
    one, other = draft.spaces[before.space], now.spaces[after.space]
    return one.exe == other.exe and is_forked(one.vmas, other.vmas)


def differences(draft: Image, now: Image) -> Iterator[str]:
    """What is not as it was of all that cannot be changed, and is no process; in words."""
    if _host(draft) != _host(now):
        yield "it is on another host, or no job any more"
    yield from _other("user namespace", draft.user_namespaces, now.user_namespaces)
    names = {index: f"{one.kind} namespace" for index, one in {**draft.namespaces, **now.namespaces}.items()}
    for index, name in names.items():
        if _lasting(draft.namespaces.get(index)) != _lasting(now.namespaces.get(index)):
            yield f"{name} {index} is not what it was"
    yield from _other("cgroup", draft.cgroups, now.cgroups)
    yield from _other("file that goes along", draft.taken_files, now.taken_files)
    for space, shared in now.shared_memory.items():
        if space in draft.shared_memory and _identity(draft.shared_memory[space]) != _identity(shared):
            yield f"shared memory {space} has other seals"
    if _prepared_files(draft) != _prepared_files(now):
        yield "its terminals or ends outside are others"
    if numbers.most_descriptors(now) > numbers.most_descriptors(draft) + SPARE_DESCRIPTORS:
        yield "it has many more descriptors"
    own = numbers.puppet_descriptors(draft, SPARE_DESCRIPTORS)
    if not numbers.descriptors(now).isdisjoint(own):
        yield "it has a descriptor under a number that who builds it has"
    hole = find_hole([space.vmas for space in draft.spaces.values()], HOLE_BYTES)
    if not all(leaves_free(hole, HOLE_BYTES, space.vmas) for space in now.spaces.values()):
        yield "it has mapped memory where it is worked on"


def _host(image: Image) -> tuple[object, ...]:
    head = image.head
    return head.root, head.machine, head.xfeatures, head.xstate_size_bytes, head.vdso, head.job


def _other(name: str, draft: Mapping[int, object], now: Mapping[int, object]) -> Iterator[str]:
    for index in sorted(draft.keys() | now.keys()):
        if draft.get(index) != now.get(index):
            yield f"{name} {index} is not what it was"


def _lasting(namespace: Namespace | None) -> Namespace | None:
    """A namespace without what goes on by itself: clocks."""
    return replace(namespace, state={}) if namespace is not None and namespace.kind == "time" else namespace


def _birth(process: Process) -> tuple[Process, Credentials | None]:
    """What a process has from the beginning."""
    first = process.threads[0].credentials if process.threads else None
    return (
        replace(
            process,
            state="zombie" if process.state == "zombie" else "running",
            exit_status=0,
            stop_signal=0,
            notice="",
            fds=[],
            cwd=None,
            cwd_removed=None,
            root=None,
            umask=0,
            actions=[],
            pending=[],
            limits=[],
            itimers=[],
            timers=[],
            undo=[],
            oom_score_adj=0,
            autogroup_nice=0,
            child_subreaper=False,
            threads=[],
            comm=b"",
        ),
        first,
    )


def _identity(shared: SharedMemory) -> SharedMemory:
    return replace(shared, size_bytes=0)


def _terminal_sessions(image: Image) -> set[int]:
    """The leaders of sessions that have a terminal of the tree."""
    states = [
        msgspec.convert(f.state, pty_state.PtyState)
        for f in image.files.values()
        if f.kind == pty_state.KIND_NAME
    ]
    return {state.terminal.session for state in states if state.terminal is not None} - {0}


def _prepared_files(image: Image) -> dict[int, object]:
    """Open files that are made before the processes."""
    found: dict[int, object] = {}
    for index, file in image.files.items():
        if file.kind == external_state.KIND_NAME:
            found[index] = (file.flags, file.state)
        elif file.kind == pty_state.KIND_NAME:
            state = msgspec.convert(file.state, pty_state.PtyState)
            if state.terminal is not None and state.terminal.session:
                found[index] = (state.number, state.ptmx, state.terminal.session)
    return found
