"""What was done to a copy of a mount namespace since it was made, as far as mountinfo tells.

Nothing in the kernel says which namespace another was copied from. It is taken to be the one that it has most in
common with: the pipeline's own, or another one of the tree that the same user namespace or one further out owns.
A copy keeps what no list of mounts could tell: mounts that a less privileged namespace may not take away, and who
shares mount events with whom.

Source: mount_namespaces(7).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from pipeline.kernel.mountinfo import Mount


def key(mount: Mount) -> tuple[bytes, bytes, int, bytes]:
    """What a mount has in common with its copy."""
    return mount.point, mount.root, mount.device, mount.kind


def within(path: bytes, directory: bytes) -> bool:
    """Whether `path` is `directory` or lies below it."""
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def parents_first(mounts: Sequence[Mount]) -> list[Mount]:
    """In the order of the list, but every mount behind the one it lies on: one that was moved may be older."""
    place = {mount.id: number for number, mount in enumerate(mounts)}
    below: dict[int, list[int]] = defaultdict(list)
    waiting: list[int] = []
    for number, mount in enumerate(mounts):
        root = mount.parent not in place or mount.parent == mount.id
        (waiting if root else below[mount.parent]).append(number)
    heapq.heapify(waiting)
    found = []
    while waiting:
        found.append(mounts[heapq.heappop(waiting)])
        for number in below[found[-1].id]:
            heapq.heappush(waiting, number)
    return found


class Comparison(msgspec.Struct, frozen=True):
    """Two mount namespaces, the original and what may be its copy.

    `original`: all mounts of the first. `kept`: pairs of a mount of the second and that of the first.
    `added`: only in the second, in order. `gone`: only in the first, the last one first.
    """

    original: Sequence[Mount]
    kept: Sequence[tuple[Mount, Mount]]
    added: Sequence[Mount]
    gone: Sequence[Mount]
    same_root: bool

    @property
    def differences(self) -> int:
        """How many mounts only one of them has."""
        return len(self.added) + len(self.gone)

    @property
    def links(self) -> int:
        """How many mounts share events with those that they are copies of."""
        return sum(1 for mount, before in self.kept if _linked(mount, before))


def _linked(mount: Mount, before: Mount) -> bool:
    groups = {before.shared, before.master} - {0}
    return mount.shared in groups or mount.master in groups


def compare(original: Sequence[Mount], there: Sequence[Mount]) -> Comparison:
    """Compare two namespaces; mounts are listed in the order in which they lie on one another."""
    there = parents_first(there)
    have = defaultdict(list)
    for mount in original:
        if not _is_never_copied(mount):
            have[key(mount)].append(mount)
    kept, added = [], []
    for mount in there:
        same = have[key(mount)]
        if same:
            kept.append((mount, same.pop(0)))
        else:
            added.append(mount)
    left = {mount.id for same in have.values() for mount in same}
    gone = [mount for mount in reversed(original) if mount.id in left]
    # mounts are listed in the order of their ids, which is not the same in a copy of a namespace
    roots = [[key(mount) for mount in mounts if mount.point == b"/"] for mounts in (original, there)]
    return Comparison(original, kept, added, gone, bool(roots[0]) and roots[0][-1:] == roots[1][-1:])


def _is_never_copied(mount: Mount) -> bool:
    """Files of mount namespaces: a copy that has one could hold the other one, and itself, for ever."""
    return mount.kind == b"nsfs" and mount.root.startswith(b"mnt:")


@dataclass
class PeerGroups:
    """Who shares mount events in all mount namespaces of the tree, by group number and namespace.

    Without those mounts which copying a namespace makes peers and slaves again.
    """

    members: dict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    masters: set[int] = field(default_factory=set)

    def learn(self, index: int, comparison: Comparison) -> None:
        """Take in the mounts of one namespace."""
        for mount in _not_linked(comparison):
            if mount.shared:
                self.members[mount.shared][index] += 1
            if mount.master:
                self.masters.add(mount.master)

    def alone(self, group: int) -> bool:
        """Whether a group has one member and nobody follows it."""
        return self.members[group].total() == 1 and group not in self.masters

    def elsewhere(self, group: int, index: int) -> bool:
        """Whether a group has members in another namespace than this one."""
        return bool(self.members[group].keys() - {index})


def _not_linked(comparison: Comparison) -> Iterator[Mount]:
    yield from comparison.added
    for mount, before in comparison.kept:
        if not _linked(mount, before):
            yield mount
