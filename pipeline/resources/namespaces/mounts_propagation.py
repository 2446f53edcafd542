"""Who shares mount events with whom: how the peer groups of a mount namespace are put together again.

A copy of a namespace has for every mount a peer or a slave of the original's; the *mode* says what most of them
have become (`begin` of `pipeline.resources.namespaces.mounts` does it to all), and the rest is set one by one. While
mounts are made nobody shares events with anybody: a mount would appear twice otherwise. At last the first
mount of every group becomes shared, and the others are put into its group.

Refused by name: a group with members in two namespaces, neither of which is a copy of the other; slaves of a mount
that is nowhere to be seen; a member that shows more of its file system than the others do, or is covered.

Source: mount_namespaces(7), mount(2), move_mount(2) on MOVE_MOUNT_SET_GROUP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.kernel.mountinfo import Mount
from pipeline.resources.namespaces.mounts import PRIVATE, SHARED, SLAVE, UNBINDABLE, Propagation, Step
from pipeline.resources.namespaces.mounts_compare import Comparison, PeerGroups, within

#: peer group, and that of which it is a slave; 0 for none
_Standing = tuple[int, int]
_MODES: tuple[Propagation, ...] = ("private", "slave", "shared")
_REFUSED_SLAVE = "is a slave of a mount that is not to be seen in its namespace, which is not carried"


def _standing(mount: Mount) -> _Standing:
    return mount.shared, mount.master


def _copied(original: Mount, mode: Propagation) -> _Standing:
    """What the copy of a mount is after `begin`."""
    match mode:
        case "private":
            return 0, 0
        case "slave":
            return 0, original.shared or original.master
        case "shared":
            return _standing(original)


class PropagationView:
    """The propagation of one mount namespace.

    Args:
        comparison: with the namespace that it begins as a copy of.
        index: of the namespace.
        groups: of the whole tree.
        covered: whether a path to an added mount leads to another one at last.
        refuse: takes a mount and why it is not carried.
    """

    def __init__(
        self,
        comparison: Comparison,
        index: int,
        groups: PeerGroups,
        covered: Callable[[Mount], bool],
        refuse: Callable[[Mount, str], None],
    ) -> None:
        self._kept = comparison.kept
        self._added = comparison.added
        self._index = index
        self._groups = groups
        self._covered = covered
        self._refuse = refuse
        linked = [(mount, before) for mount, before in self._kept if before.shared or before.master]
        #: what most mounts that came with the copy have become
        self.mode = max(
            _MODES, key=lambda mode: sum(_copied(before, mode) == _standing(m) for m, before in linked)
        )
        self._unchanged = {b.id for m, b in self._kept if _copied(b, self.mode) == _standing(m)}
        self._done: set[int] = set()
        self._alone = {m.id for m in self._added if m.shared and not m.master and groups.alone(m.shared)}

    def at_once(self, mount: Mount, source: Mount | None) -> Iterator[Step]:
        """What follows the making of an added mount.

        Args:
            source: the mount of the original namespace that it is a copy of, if it is one: a bind mount shares
                events as its source does. That cannot always be had afterwards: not for a mount with locked ones on
                it.
        """
        if source is not None and source.id in self._unchanged and not mount.unbindable:
            standing = _copied(source, self.mode)
            if standing == _standing(mount) != (0, 0):
                self._done.add(mount.id)
                return
        if mount.id in self._alone:
            yield Step("propagation", mount.point, flags=SHARED)
        elif mount.unbindable:
            yield Step("propagation", mount.point, flags=UNBINDABLE)
        elif self._alone or self.mode != "private":  # it may have become a peer of what it lies on or shows
            yield Step("propagation", mount.point, flags=PRIVATE)

    def at_last(self) -> Iterator[Step]:
        """What follows when all mounts are made."""
        peers: dict[int, Mount] = {}
        slaves: dict[int, Mount] = {}
        waiting: list[Mount] = []
        for mount, before in self._kept:
            if before.id in self._unchanged:
                self._learn(mount, peers, slaves)
            else:
                if _copied(before, self.mode) != (0, 0):
                    yield Step("propagation", mount.point, flags=PRIVATE)
                waiting.append(mount)
            if mount.unbindable and not before.unbindable:
                yield Step("propagation", mount.point, flags=UNBINDABLE)
        waiting += [mount for mount in self._added if mount.id not in self._alone | self._done]
        waiting = [mount for mount in waiting if mount.shared or mount.master]
        waiting.sort(key=lambda mount: len(mount.root.rstrip(b"/")))
        yield from self._join(waiting, peers, slaves)

    @staticmethod
    def _learn(mount: Mount, peers: dict[int, Mount], slaves: dict[int, Mount]) -> None:
        if mount.shared:
            peers.setdefault(mount.shared, mount)
        elif mount.master:
            slaves.setdefault(mount.master, mount)

    def _join(
        self, waiting: Sequence[Mount], peers: dict[int, Mount], slaves: dict[int, Mount]
    ) -> Iterator[Step]:
        """Put mounts that are private by now into their groups, masters before slaves."""
        while waiting:
            left = []
            for mount in waiting:
                example = peers.get(mount.shared) or peers.get(mount.master) or slaves.get(mount.master)
                if example is None and mount.master:
                    left.append(mount)
                    continue
                self._check(mount, example, mount.shared in peers)
                if example is not None:
                    yield Step("group", mount.point, example.point)
                if mount.shared not in peers:
                    if example is not None and example.shared:
                        yield Step("propagation", mount.point, flags=SLAVE)
                    if mount.shared:
                        yield Step("propagation", mount.point, flags=SHARED)
                self._learn(mount, peers, slaves)
            if len(left) == len(waiting):
                for mount in left:
                    self._refuse(mount, _REFUSED_SLAVE)
                return
            waiting = left

    def _check(self, mount: Mount, example: Mount | None, joins: bool) -> None:
        if mount.id in {m.id for m in self._added} and self._covered(mount):
            self._refuse(mount, "shares its mounts with others and is covered, which is not carried")
        if mount.shared and not joins and self._groups.elsewhere(mount.shared, self._index):
            self._refuse(mount, "shares its mounts with those of another namespace, which is not carried")
        if example is not None and not within(mount.root, example.root):
            self._refuse(mount, "shares its mounts with a mount of another directory, which is not carried")
