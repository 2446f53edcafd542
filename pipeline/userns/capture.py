"""Reading the forest of user namespaces of a live tree.

A namespace is known by its file (st_dev, st_ino); its parent by NS_GET_PARENT, its
creator by NS_GET_OWNER_UID. Namespaces without a process count too, where they are a
parent or own another namespace. The walk up ends at the pipeline's own namespace: the
external one, number 0.

A map file shows its lower ids in the *reader's* namespace, so what is read is put
relative to the parent before it becomes a record.

Sources: user_namespaces(7), namespaces(7), ioctl_ns(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import get_args

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import UserNamespace
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import CLONE
from pipeline.userns.forest import Forest, IdKind
from pipeline.userns.idmap import IDENTITY, IdMap, parse, relative_to_parent
from pipeline.userns.limits import Limits, limits_of
from pipeline.userns.visit import read_file, visit


class OutsideError(Exception):
    """A namespace is not below the pipeline's own user namespace."""


@dataclass
class LiveForest:
    """The user namespaces of a tree: their keys, and what is known of each.

    `limits`: the files of those that were seen before the tree stood still; the owner's.
    """

    numbers: dict[NamespaceKey, int] = field(default_factory=dict)
    records: list[UserNamespace] = field(default_factory=list)
    limits: Limits | None = None
    _members: dict[NamespaceKey, HostPid] = field(default_factory=dict)

    def forest(self) -> Forest:
        """The records as a forest."""
        return Forest(self.records)

    def learn_members(self, pids: Iterable[HostPid]) -> None:
        """Remember one process of every user namespace, to read maps from."""
        for pid in pids:
            with suppress(procfs.ProcessGone):
                key = nsfs.key(pid, "user")
                if key is not None:
                    self._members.setdefault(key, pid)

    def number_of(self, fd: LocalFd) -> int:
        """The number of the user namespace behind `fd`; it and its ancestors are registered on first sight.

        Raises:
            OutsideError: it is not the pipeline's own user namespace, nor below it.
        """
        key = nsfs.key_of(fd)
        if not self.records:
            self.records.append(UserNamespace(index=0))
            own = os.stat("/proc/self/ns/user")
            self.numbers[NamespaceKey(own.st_dev, own.st_ino)] = 0
        if key in self.numbers:
            return self.numbers[key]
        try:
            above = nsfs.parent(fd)
        except PermissionError:
            raise OutsideError from None
        try:
            parent = self.number_of(above)
        finally:
            os.close(above)
        index = len(self.records)
        self.records.append(self._record(fd, key, index, parent))
        self.numbers[key] = index
        return index

    def _record(self, fd: LocalFd, key: NamespaceKey, index: int, parent: int) -> UserNamespace:
        forest = self.forest()
        member = self._members.get(key)
        creator = nsfs.owner_uid(fd)
        maps, setgroups = self._maps(fd, member, parent, forest)
        return UserNamespace(
            index=index,
            parent=parent,
            owner=forest.innermost(creator, parent, "uid"),
            uid_map=list(maps["uid"].extents),
            gid_map=list(maps["gid"].extents),
            projid_map=list(maps["projid"].extents),
            setgroups="deny" if setgroups == b"deny" else "allow",
            limits=limits_of(fd) if self.limits is None else self.limits.of(fd, key),
        )

    @staticmethod
    def _maps(
        fd: LocalFd, member: HostPid | None, parent: int, forest: Forest
    ) -> tuple[dict[IdKind, IdMap], bytes]:
        """The maps, relative to the parent, and what /proc/PID/setgroups says."""
        kinds: tuple[IdKind, ...] = get_args(IdKind)
        names = [*(f"{kind}_map".encode() for kind in kinds), b"setgroups"]
        if member is None:
            # read from inside, where the lower ids are said relative to the parent
            answer = visit(
                [(fd, CLONE.NEWUSER)],
                lambda: b"\0".join(read_file(b"/proc/self/" + name) for name in names),
            )
            *maps, setgroups = answer.split(b"\0")
            return {
                kind: IdMap(parse(text)) for kind, text in zip(kinds, maps, strict=True)
            }, setgroups.strip()
        *maps, setgroups = (procfs.read_file(member, name.decode()) for name in names)
        above = {kind: forest.to_ancestor(parent, 0, kind) if parent else IDENTITY for kind in kinds}
        return {
            kind: relative_to_parent(parse(text), above[kind]) for kind, text in zip(kinds, maps, strict=True)
        }, setgroups.strip()


def outside_blocker(pid: HostPid, what: str) -> Blocker:
    """Why a namespace that is not below ours cannot be carried."""
    return Blocker(
        f"pid {pid}",
        f"its {what} belongs to a user namespace that is not below the pipeline's own",
        "run the pipeline in the user namespace that contains the whole tree (on the host, as root)",
    )
