"""What stops a tree from being carried, and where it lives.

All of it shows only while it stands still (`tree_blockers`): its open files cannot be looked at without holding them,
and whoever holds one that the program closes keeps its peers and its epoll instances from being told. What shows of a
tree that runs is asked first (`early_blockers`), by who stops it anyway for what comes next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from pipeline.errors import Blocker, Refused, TargetError
from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs
from pipeline.policy import DumpPolicy
from pipeline.resources.namespace_file import LINKS
from pipeline.resources.namespaces.members import NamespaceCapture, check_visible
from pipeline.resources.tasks import credentials, leaders, tracing
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.capture import Capture
from pipeline.stages.freeze import check_killed, check_root, stopped_for_a_look, walk
from pipeline.stages.translate import in_forest
from pipeline.userns import around
from pipeline.userns.capture import LiveForest
from pipeline.userns.cradle import is_privileged
from pipeline.userns.externals import Externals
from pipeline.userns.lodgers import Lodgers
from pipeline.userns.portrait import Portrait, Sitter, paint

#: how often a tree is looked at in which something was not permitted
_LOOKS = 4
#: when something stops it that goes away by itself, it is looked at again so much later each time
_PAUSES_S = (0.01, 0.05)


def _learn_held(pid: HostPid, namespaces: NamespaceCapture) -> None:
    """Look for namespaces that a process holds by descriptors."""
    for number in procfs.list_dir(pid, "fd"):
        with suppress(OSError):  # it is closed by now
            if os.readlink(f"/proc/{pid}/fd/{number}".encode()).startswith(LINKS):
                fd = LocalFd(os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC))
                try:
                    namespaces.number_of(fd, pid, int(number))
                finally:
                    os.close(fd)


def tree_blockers(
    pid: int, externals: Externals | None = None, policy: DumpPolicy | None = None
) -> list[Blocker]:
    """Every blocker of the tree below `pid`, which is stopped for it, for some milliseconds.

    In a tracer's thread. What goes away by itself is looked at again. As long as one and the same thing shows that
    hinders a stop, as that its cgroup is frozen, the tree is not stopped: that might take long. Another each time, as
    one vfork(2) behind the other, is the program at work.

    Args:
        pid: its root.
        externals: namespaces that are external instead of the pipeline's own.
        policy: decisions about states that have more than one good answer.
    """
    found = _settled(pid, partial(_look_around, pid))
    if found:
        return found
    before: Sequence[Blocker] | None = None
    for pause_s in (0.0, *_PAUSES_S):
        time.sleep(pause_s)
        shown = early_blockers(pid, externals, policy)
        lasts = any(blocker.hinders_stop and (before is None or blocker in before) for blocker in shown)
        before = shown
        if lasts:
            found = shown
            continue
        found = _settled(pid, partial(_look_at_stopped, pid, externals, policy, shown))
        if not found or not all(blocker.transient for blocker in found):
            break
    return found


def early_blockers(
    pid: int,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    known: Beforehand | None = None,
) -> list[Blocker]:
    """What seems to stop the tree below `pid`, but for its open files; it goes on running meanwhile.

    It may be no more than the program at work, such as a directory that it removed while it was looked at.

    Args:
        pid, externals, policy: see `tree_blockers`.
        known: remembers what is read once for all looks.
    """
    return _settled(pid, partial(_look, pid, externals, policy, known))


def _settled(pid: int, look: Callable[[], Iterable[Blocker]]) -> list[Blocker]:
    """What a look has found that was permitted."""
    for _ in range(_LOOKS):
        try:
            return list(look())
        except PermissionError as error:
            refused = error  # of a member that ended, the number may be somebody else's now
    return [
        Blocker(
            f"pid {pid}",
            f"a process of its tree may not be looked at: {refused}",
            "run as its user, or as root",
        )
    ]


def _look_at_stopped(
    pid: int, externals: Externals | None, policy: DumpPolicy | None, shown: Sequence[Blocker]
) -> list[Blocker]:
    """`shown`: what was found while it ran; counts only if it cannot be stopped."""
    try:
        with stopped_for_a_look(HostPid(pid), is_privileged()) as tree:
            try:
                with Capture(tree.pids(), tree.zombies(), externals=externals, policy=policy) as capture:
                    return [*capture.blockers(), *check_killed(tree)]
            except (OSError, TargetError):
                if gone := list(check_killed(tree)):
                    return gone
                raise
    except Refused as refused:
        return [*shown, *refused.blockers]
    except TargetError as error:
        return [*shown, Blocker(f"pid {pid}", f"cannot be stopped: {error}", "try again")]


def _look(
    pid: int, externals: Externals | None, policy: DumpPolicy | None, known: Beforehand | None
) -> Iterator[Blocker]:
    found = list(_look_around(pid))
    yield from found
    if found:
        return
    pids = walk(HostPid(pid))
    zombies = []
    for member in pids:
        with suppress(procfs.ProcessGone):
            if leaders.has_ended(member):
                zombies.append(member)
    if known is not None:
        known.limits.open(pids)
    with Capture(pids, zombies, externals=externals, policy=policy, known=known) as capture:
        yield from capture.blockers_besides_files()


def _look_around(pid: int) -> Iterator[Blocker]:
    """Why the tree cannot be stopped, or its members not be seen."""
    at_root = list(check_root(pid))
    yield from at_root
    if at_root:
        return
    pids = walk(HostPid(pid))
    hidden: list[Blocker] = []
    for member in pids:
        with suppress(procfs.ProcessGone):
            hidden += check_visible(member)
    if not hidden:
        with suppress(procfs.ProcessGone):
            hidden += around.check_levels(HostPid(pid))
    yield from hidden
    if hidden:
        return
    for member in pids:
        with suppress(procfs.ProcessGone):
            yield from tracing.check_traced(member)
    yield from tracing.check_tracers(pids)


def portrait(pid: int) -> Portrait | None:
    """The namespaces of the tree below `pid`, and who lives where; None where it may not be looked at."""
    if any(True for _ in check_root(pid)):
        return None
    forest = LiveForest()
    pids = []
    for member in walk(HostPid(pid)):
        with suppress(procfs.ProcessGone):
            if any(True for _ in check_visible(member)):
                return None
            pids.append(member)
    with Lodgers() as lodgers:
        namespaces = NamespaceCapture(pids, forest, is_privileged(), lodgers)
        for member in pids:
            with suppress(procfs.ProcessGone):
                _learn_held(member, namespaces)
    sitters = []
    for member, members in namespaces.memberships.items():
        with suppress(procfs.ProcessGone):
            status = procfs.status(member)
            found = credentials.captured(status, members.user, 0)
            sitters.append(
                Sitter(
                    list(status.ns_pid),
                    status.name.decode(errors="backslashreplace"),
                    members,
                    in_forest(found, members.user, forest.forest()),
                )
            )
    return paint(forest.records, namespaces.namespaces, sitters)
