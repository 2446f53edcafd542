"""What processes share by clone(2) although they are no threads of one process.

The kernel holds an address space, a descriptor table, the place in the file system (root, working directory, umask),
signal actions and adjustments of semaphores apart from the task, and clone(2) lets the new task use its creator's:
CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_SYSVSEM. kcmp(2) tells who shares, and puts all of one kind in an
order, so that many processes are sorted with few comparisons.

A share can only be given at birth. So the growth plan has a process cloned by its parent, or by a sibling, that has
everything already that the new process has in common with anybody (`pipeline.image.plan`).

Refused by name: shares with a process outside the tree; shares across namespaces, which no program can bring about
but by leaving them afterwards; a share whose heir can only be born by somebody who does not have it.

Not preserved: a shared I/O context (CLONE_IO); each process gets its own, with the I/O priority it had.

Sources: clone(2), kcmp(2), unshare(2); kernel/fork.c, kernel/nsproxy.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cmp_to_key

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Together
from pipeline.kernel import procfs
from pipeline.kernel.syscalls import CLONE, KCMP, kcmp
from pipeline.resources.support import Support
from pipeline.resources.tasks.semaphore_undo import has_any

#: field of `Together` -> how kcmp(2) calls it, how clone(2) shares it, what people call it
_KINDS = {
    "vm": (KCMP.VM, CLONE.VM, "memory"),
    "files": (KCMP.FILES, CLONE.FILES, "descriptor table"),
    "fs": (KCMP.FS, CLONE.FS, "working directory, root and umask"),
    "sighand": (KCMP.SIGHAND, CLONE.SIGHAND, "signal actions"),
    "sysvsem": (KCMP.SYSVSEM, CLONE.SYSVSEM, "semaphore adjustments"),
}
_LESS, _GREATER = 1, 2

SUPPORT = Support(
    kind="shared by processes",
    carried=(
        "memory, descriptor tables, working directories, signal actions, semaphore adjustments shared by clone(2)",
    ),
    refused=(
        "what is shared with a process outside the tree, or with one that is neither parent nor sibling",
    ),
    shown_by=("programs/together.c", "test_tasks_refused.py"),
)


def flags(kinds: Sequence[str]) -> int:
    """The CLONE_* flags that share these fields of `Together`."""
    found = 0
    for kind in kinds:
        found |= _KINDS[kind][1]
    return found


def capture(
    pids: Sequence[HostPid], semaphores: bool, leaders: Mapping[HostPid, HostPid]
) -> dict[HostPid, Together]:
    """What each of these processes shares with one that comes before it.

    Args:
        pids: processes with tasks, in the order of the tree; all of them may be compared.
        semaphores: whether there are semaphore sets, whose adjustments could be shared.
        leaders: the processes themselves, where one is looked at by another than its first thread.
    """
    if len(pids) < 2:
        return {}
    found: dict[HostPid, dict[str, int]] = {}
    for name, (kind, _, _) in _KINDS.items():
        asked = pids if name != "sysvsem" else has_any(pids) if semaphores else ()
        for group in _groups(asked, kind):
            first, *others = (leaders.get(pid, pid) for pid in sorted(group, key=pids.index))
            for pid in others:
                found.setdefault(pid, {})[name] = first
    return {pid: Together(**shares) for pid, shares in found.items()}


def _groups(pids: Sequence[HostPid], kind: KCMP) -> Iterator[list[HostPid]]:
    """Processes that share a thing of one kind, as far as there are two of them."""

    def order(one: HostPid, other: HostPid) -> int:
        try:
            return {0: 0, _LESS: -1, _GREATER: 1}[kcmp(one, other, kind)]
        except OSError:
            return one - other  # it has ended, or may not be compared with: the tree runs, this is a check

    run: list[HostPid] = []
    for pid in sorted(pids, key=cmp_to_key(order)):
        if run and order(run[-1], pid) != 0:
            if len(run) > 1:
                yield run
            run = []
        run.append(pid)
    if len(run) > 1:
        yield run


def check_outside(pids: Sequence[HostPid]) -> Iterator[Blocker]:
    """Whatever the tree shares with the parent and the siblings of its root, who may have cloned it so.

    Args:
        pids: its processes that have tasks, the root first.
    """
    others = set(_relatives(pids[0])) - set(pids)
    comparable = [pid for pid in others if _may_compare(pids[0], pid)]
    for name, (kind, _, what) in _KINDS.items():
        if name == "sysvsem" or not comparable:
            continue  # most have no adjustments at all, and are equal in that
        for group in _groups([*pids, *comparable], kind):
            outside = sorted(others & set(group))
            for pid in sorted(set(group) - others) if outside else ():
                with suppress(procfs.ProcessGone):
                    yield Blocker(
                        f"pid {pid}",
                        f"shares its {what} with pid {outside[0]} ({procfs.comm(outside[0])}), "
                        "which is not part of the tree",
                        "give --pid of a common ancestor, or end that process",
                    )


def _may_compare(one: HostPid, other: HostPid) -> bool:
    try:
        kcmp(one, other, KCMP.FS)
    except OSError:
        return False
    return True


def _relatives(root: HostPid) -> Iterator[HostPid]:
    """The parent of a process, its siblings and theirs: who can have cloned it, or been cloned beside it."""
    with suppress(procfs.ProcessGone):
        parent = HostPid(procfs.stat(root).ppid)
        if parent:
            yield parent
            yield from procfs.children(parent)
