"""A running tree, looked at without touching it: what stops it from being carried, and where it lives."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs
from pipeline.policy import DumpPolicy
from pipeline.resources.namespace_file import LINKS
from pipeline.resources.namespaces.members import NamespaceCapture, check_visible
from pipeline.resources.tasks import credentials, leaders, tracing
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.capture import Capture
from pipeline.stages.freeze import check_root, walk
from pipeline.stages.translate import in_forest
from pipeline.userns import around
from pipeline.userns.capture import LiveForest
from pipeline.userns.cradle import is_privileged
from pipeline.userns.externals import Externals
from pipeline.userns.lodgers import Lodgers
from pipeline.userns.portrait import Portrait, Sitter, paint

#: how often a tree is looked at in which something was not permitted
_LOOKS = 4
#: when something stops it, it is looked at again so much later each time: a vfork(2) may take some milliseconds
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
    pid: int,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    known: Beforehand | None = None,
) -> list[Blocker]:
    """Every blocker of the tree below `pid`, which goes on running meanwhile.

    What is not there at each look was the program at work, such as a file that it removed while it was looked at. It
    may do so over and over, and be met at it twice: by the same number and name. Whatever matters of it is found when
    the tree stands still.

    Args:
        pid: its root.
        externals: namespaces that are external instead of the pipeline's own.
        policy: decisions about states that have more than one good answer.
        known: remembers what is read once for all looks.
    """
    for _ in range(_LOOKS):
        try:
            found = list(_look(pid, externals, policy, known))
            for pause_s in _PAUSES_S:
                if found:
                    time.sleep(pause_s)
                    again = set(_look(pid, externals, policy, known))
                    found = [blocker for blocker in found if blocker in again]
            return found
        except PermissionError as error:
            refused = error  # of a member that ended, the number may be somebody else's now
    return [
        Blocker(
            f"pid {pid}",
            f"a process of its tree may not be looked at: {refused}",
            "run as its user, or as root",
        )
    ]


def _look(
    pid: int, externals: Externals | None, policy: DumpPolicy | None, known: Beforehand | None
) -> Iterator[Blocker]:
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
    zombies = []
    for member in pids:
        with suppress(procfs.ProcessGone):
            if leaders.has_ended(member):
                zombies.append(member)
    if known is not None:
        known.limits.open(pids)
    with Capture(pids, zombies, externals=externals, policy=policy, known=known) as capture:
        yield from capture.blockers()


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
