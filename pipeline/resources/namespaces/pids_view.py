"""Looking at pid namespaces: whether all of one is part of the tree, and what is left of one that nobody lives in.

Source: pid_namespaces(7).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Memberships, Namespace
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.resources.namespaces.pids import PidState


class PidsView:
    """The pid namespaces of a tree.

    Args:
        namespaces: of every kind, by index; may become more.
        memberships: of the processes of the tree.
        key_of: what the kernel knows a namespace of the tree by.
    """

    def __init__(
        self,
        namespaces: Sequence[Namespace],
        memberships: Mapping[HostPid, Memberships],
        key_of: Callable[[int], NamespaceKey],
    ) -> None:
        self._namespaces = namespaces
        self._memberships = memberships
        self._key_of = key_of

    def without_first(self) -> Iterator[Blocker]:
        """Namespaces of the tree whose first process is not: one can only be made again together with it."""
        for namespace in self._namespaces:
            within = [pid for pid, at in self._memberships.items() if namespace.index in self._levels(at.pid)]
            if namespace.kind != "pid" or namespace.external or not within:
                continue
            depth = len(self._levels(namespace.index))
            if not any(self._is_first(pid, depth) for pid in self._members(namespace.index)):
                first = next((p for p in self._living(namespace.index) if self._is_first(p, depth)), None)
                yield Blocker(
                    f"pid {within[0]}",
                    "is in a pid namespace whose first process is not part of the tree",
                    f"give that one: --pid {first}" if first else "give a tree that holds all of it",
                )

    def empty(self, namespace: Namespace, holder: HostPid) -> tuple[PidState | None, list[Blocker]]:
        """What there is to say of a namespace, if nobody of the tree lives in it: all have ended, or they are others.

        Args:
            holder: who forks into it.
        """
        below = any(other.parent == namespace.index for other in self._namespaces)
        if self._members(namespace.index) or below:
            return None, []
        subject = f"pid {holder}"
        if namespace.owner != self._memberships[holder].user:
            reason = (
                "forks into a pid namespace that has ended, or that others live in, and that a user namespace further "
                "out owns"
            )
            return None, [Blocker(subject, reason, "end it")]
        other = next(self._living(namespace.index), None)
        if other is not None:
            reason = f"forks into a pid namespace of others, such as pid {other}"
            return None, [
                Blocker(subject, reason, "give the pid of a tree that holds the whole pid namespace")
            ]
        return PidState(ended=True), []

    def _members(self, index: int) -> list[HostPid]:
        return [pid for pid, members in self._memberships.items() if members.pid == index]

    def _levels(self, index: int) -> list[int]:
        """A pid namespace, the one around it, and so on to the external one."""
        levels: list[int] = []
        at: int | None = index
        while at is not None:
            levels.append(at)
            at = self._namespaces[at].parent
        return levels

    @staticmethod
    def _is_first(pid: HostPid, depth: int) -> bool:
        with suppress(procfs.ProcessGone):
            return procfs.status(pid).ns_pid[depth - 1 :] == (1,)
        return False

    def _living(self, index: int) -> Iterator[HostPid]:
        """Everybody in a namespace, of the tree or not, as far as it may be looked at."""
        key = self._key_of(index)
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError, procfs.ProcessGone):
                    if nsfs.key(HostPid(int(name)), "pid") == key:
                        yield HostPid(int(name))
