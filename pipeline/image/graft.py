"""Births into a tree that stands already. Pure; beside `pipeline.image.plan`, which lets a tree grow from nothing.

A tree that was built from an early look at it lacks the processes that were born since. Those that are like what
fork(2) makes of their parent are born here as they were there: in the namespaces, and in the session of their parent,
or as the founder of a session; with the parent's memory, or with that of another program. What is asked of the parent
has to be as it is now: a session that it has left, or a namespace in which it no longer is, cannot be given any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pipeline.errors import Blocker
from pipeline.image.codec import Image
from pipeline.image.plan import SIGCHLD, Planner
from pipeline.image.schema import Process, Together
from pipeline.image.steps import Become, Fill, FoundSession, Inherit, JoinGroup, Spawn, Step


def graft(image: Image, born: Collection[int]) -> Planner:
    """The births of some processes of `image`; look at `steps` and `blockers` of the result.

    Args:
        image: the tree as it is to be.
        born: level-0 pids, not of its root; all others stand, with their memory.
    """
    planner = Planner(image.processes, image.spaces, image.namespaces, image.user_namespaces)
    groups = {pid: process.pgid for pid, process in image.processes.items() if pid not in born}
    joins: list[Step] = []
    for pid, process in image.processes.items():  # parents first
        if pid not in born:
            continue
        if process.parent not in groups:
            planner.blockers.append(Blocker(f"pid {pid}", "its parent is not there before it"))
            continue
        planner.blockers += _blockers(planner, process)
        planner.steps.append(Spawn(pid, process.parent))
        groups[pid] = groups[process.parent]
        if process.sid == pid:
            planner.steps.append(FoundSession(pid))
            groups[pid] = pid
        elif process.pgid == pid:
            planner.steps.append(JoinGroup(pid, pid))
            groups[pid] = pid
        elif process.pgid != groups[pid]:  # whose leader may not be born yet
            joins.append(JoinGroup(pid, process.pgid))
        if process.state == "zombie":
            continue
        planner.steps.append(Inherit(pid) if planner.inherits(process) else Become(pid))
        if process.space is not None:
            planner.steps.append(Fill(process.space))
    planner.steps += joins
    return planner


def _blockers(planner: Planner, process: Process) -> Iterator[Blocker]:
    """What about a process cannot be given by its parent any more."""
    pid, here = process.pids[0], process.namespaces
    parent = planner.processes[process.parent]
    there = parent.namespaces
    if here != there or (here.pid_for_children, here.time_for_children) != (here.pid, here.time):
        yield Blocker(f"pid {pid}", "is in other namespaces than its parent, or forks into others")
    if process.together != Together() or any(pid in _named(other) for other in planner.processes.values()):
        yield Blocker(f"pid {pid}", "shares more with another process than what fork gives")
    if process.sid not in (pid, parent.sid):
        yield Blocker(f"pid {pid}", "is in a session that its parent is not in")
    leader = planner.processes.get(process.pgid)
    if process.pgid not in (pid, parent.pgid) and (
        leader is None or (leader.sid, leader.pgid) != (process.sid, process.pgid)
    ):
        yield Blocker(f"pid {pid}", "is in a process group whose leader is not there")
    if process.state != "zombie" and process.exit_signal != SIGCHLD and not planner.inherits(process):
        yield Blocker(f"pid {pid}", "tells its parent of its end by another signal than SIGCHLD")


def _named(process: Process) -> set[int]:
    together = process.together
    return {together.vm, together.files, together.fs, together.sighand, together.sysvsem}
