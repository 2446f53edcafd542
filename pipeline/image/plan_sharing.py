"""Who is born by whom so that processes share what they shared (`Together`). Pure; part of `pipeline.image.plan`.

A share is given by clone(2) alone: to a child, or with CLONE_PARENT to a sibling, once the creator is what it shall be.
Whoever executes a program loses memory, descriptor table and signal actions to itself, so a process that shares a
descriptor table and has memory of its own must have got that by fork, from its parent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from pipeline.errors import Blocker
from pipeline.image.schema import Process

#: fields of `Together`, and what people call them
_NAMES = {
    "vm": "memory",
    "files": "descriptor table",
    "fs": "working directory",
    "sighand": "signal actions",
    "sysvsem": "semaphore adjustments",
}
_REMEDY = "end one of them"

#: a thing that is shared: a field of `Together`, and the first process that has it
Group = tuple[str, int]


class Sharing:
    """What the processes of a tree share.

    Args:
        children: by their parents, in the order of birth; 0 is outside.
    """

    def __init__(self, children: Mapping[int, Sequence[Process]]) -> None:
        self._of: dict[int, set[Group]] = defaultdict(set)
        self._born: set[Group] = set()
        self._beside: dict[int, list[Process]] = defaultdict(list)
        self._is_beside: set[int] = set()
        for siblings in children.values():
            for process in siblings:
                for kind in _NAMES:
                    first = getattr(process.together, kind)
                    if first:
                        self._of[process.pids[0]].add((kind, first))
                        self._of[first].add((kind, first))
        for parent, siblings in children.items():
            self._find_hosts(parent, siblings)

    def _find_hosts(self, parent: int, siblings: Sequence[Process]) -> None:
        """Children that share with a sibling what their parent does not have are cloned by that sibling."""
        firsts: dict[Group, int] = {}
        for child in siblings:
            pid = child.pids[0]
            lacking = self._of.get(pid, set()) - self._of.get(parent, set())
            host = next((firsts[group] for group in sorted(lacking) if group in firsts), None)
            if host is not None:
                self._beside[host].append(child)
                self._is_beside.add(pid)
            for group in lacking:
                firsts.setdefault(group, pid)

    def beside(self, pid: int) -> Sequence[Process]:
        """The siblings that process `pid` clones."""
        return self._beside.get(pid, ())

    def is_beside(self, pid: int) -> bool:
        """Whether a process is cloned by a sibling."""
        return pid in self._is_beside

    def given(
        self, child: Process, by: Process | None, sibling: bool, settled: Collection[int]
    ) -> tuple[tuple[str, ...], list[Blocker]]:
        """What a process gets from its creator at its birth, which is now; and what it cannot get.

        Args:
            child: is born.
            by: its creator; None where that is no process of the tree.
            sibling: whether that is its sibling, not its parent.
            settled: processes that have their namespaces and their memory.
        """
        pid = child.pids[0]
        shared = self._of.get(pid)
        if not shared:
            return (), []
        given = sorted(shared & self._of.get(by.pids[0], set())) if by is not None else []
        lacking = sorted((shared & self._born) - set(given))
        self._born |= shared
        reasons = [(lacking[0], "the one that has cloned it is gone")] if lacking else []
        if by is not None and given:
            if by.namespaces != child.namespaces:
                reasons.append((given[0], "is in other namespaces"))
            if by.pids[0] not in settled:
                reasons.append((given[0], "has to be born before its creator is what it was"))
            if sibling and by.exit_signal != child.exit_signal:
                reasons.append((given[0], "tells its parent of its end by another signal"))
            if sibling and child.sid not in (by.sid, pid):
                reasons.append((given[0], "is in another session"))
            kinds = {kind for kind, _ in given}
            if sibling and "files" in kinds and "vm" not in kinds:
                reasons.append((given[0], "has memory of its own, and the one that has cloned both is gone"))
        return tuple(kind for kind, _ in given), [self._refusal(pid, *reason) for reason in reasons]

    def _refusal(self, pid: int, group: Group, why: str) -> Blocker:
        kind, first = group
        with_whom = f"pid {first}" if first != pid else "another process"
        return Blocker(
            f"pid {pid}", f"shares its {_NAMES[kind]} with {with_whom} (clone), and {why}", _REMEDY
        )
