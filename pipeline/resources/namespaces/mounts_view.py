"""Looking at a mount namespace: what was done to it since it was a copy of another.

Carried: what shows a namespace of the tree (proc, mqueue, sysfs, cgroup hierarchies, namespace files), devpts, tmpfs
with what is in it, overlayfs whose layers are to be seen where it is mounted again, bind mounts of what the other
namespace shows too (external sysfs, cgroups and proc are that: mounted twice they are one file system) or an earlier
mount does (a read-only /proc/sys), idmapped ones among them; one tmpfs or devpts that several mount namespaces show;
mounts that are gone; flags. After pivot_root: all mounts, made below the place where the root is to be seen, or below a
directory that nothing is bound from. Who shares mount events with whom is in
`pipeline.resources.namespaces.mounts_propagation`.

Refused by name: other file systems that are mounted only there, options that are not known here, a devpts or namespace
file that another mount covers, a tmpfs that cannot be listed, mounts that lie on one that was moved.

Sources: mount_namespaces(7), mount(2), proc_pid_mountinfo(5), tmpfs(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

import msgspec
from msgspec import structs

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.ids import HostPid
from pipeline.kernel.mountinfo import Mount, mountinfo
from pipeline.resources.namespaces.idmapped import MountIdmap
from pipeline.resources.namespaces.mounts import SHOWN, MountState, Step, comes_behind_copies
from pipeline.resources.namespaces.mounts_compare import Comparison, PeerGroups, parents_first
from pipeline.resources.namespaces.mounts_options import (
    MOUNTED_AGAIN,
    RDONLY,
    Options,
    mount_flags,
    root_options,
)
from pipeline.resources.namespaces.mounts_propagation import PropagationView
from pipeline.resources.namespaces.mounts_sources import Sources
from pipeline.resources.namespaces.shown import Shown
from pipeline.resources.namespaces.tmpfs import Entry

_IDMAPPED = b"idmapped"
_CGROUPS = {b"cgroup", b"cgroup2"}
#: file systems that exist once for each time they were mounted, and that have no other name
NAMELESS = {b"tmpfs", b"devpts"}
#: where a root is mounted that is not to be seen from outside, before it becomes the root
_PLACES = (b"/mnt", b"/srv", b"/media", b"/opt", b"/tmp")
_WHY_NOT_LISTED = {
    errno.EINVAL: "has mounts on it that another user namespace has locked, which hide what is below them",
    errno.E2BIG: "holds too many names",
    errno.EOVERFLOW: "holds files of ids which its user namespace does not map",
}


class Surroundings(msgspec.Struct, frozen=True):
    """What a mount namespace of a tree is looked at with.

    Args:
        uid: from an id as the pipeline sees it to one of the owning user namespace; `gid` likewise.
        shown: which namespaces mounts show.
        shown_by_kind: the index of the namespace of a kind that a mount shows, see `SHOWN`, as far as the owner of this
            one may mount it.
        pid_namespace_of: that of the pid namespace which a proc with this st_dev shows, wherever it is seen.
        idmap_of: how an idmapped mount maps ids.
        groups: of the whole tree.
        instances: of file systems that several mount namespaces of the tree show, by st_dev: number, and whether
            this namespace is the one that mounts it.
        tops: by st_dev of such a file system, the directory in it that shows all that is to be seen of it.
        list_tmpfs: lists what a tmpfs holds on which other mounts may lie, at these points, the last one first.
        owner: the user namespace that the mount namespace belongs to; `index`: its number.
    """

    uid: Callable[[int], int | None]
    gid: Callable[[int], int | None]
    shown: Shown
    shown_by_kind: Callable[[Mount], int | None]
    pid_namespace_of: Callable[[int], int | None]
    groups: PeerGroups
    instances: Mapping[int, tuple[int, bool]]
    tops: Mapping[int, bytes]
    list_tmpfs: Callable[[Mount, list[bytes]], list[Entry]]
    idmap_of: Callable[[Mount], MountIdmap]
    owner: int
    index: int


class MountsView:
    """The mount namespace of `pid`, compared with the one that it is taken to be a copy of.

    Args:
        pid: a process in it whose root is the namespace's root.
        subject: whom it is refused to, in words.
        comparison: of the two.
        below: a path to the root of the other one; empty for the pipeline's own.
        surroundings: of the namespace.

    `blockers` and `state` are complete when it is made.
    """

    def __init__(
        self, pid: HostPid, subject: str, comparison: Comparison, below: str, surroundings: Surroundings
    ) -> None:
        self._pid = pid
        self._subject = subject
        self._around = surroundings
        self.blockers: list[Blocker] = []
        if not comparison.same_root:
            comparison = structs.replace(comparison, kept=[], added=parents_first(mountinfo(pid)), gone=[])
        self._kept = comparison.kept
        self._added = comparison.added
        self._gone = comparison.gone
        self._sources = Sources(pid, comparison, below, self._added)
        self._options = Options(surroundings.owner, surroundings.uid, surroundings.gid, self._refuse_mount)
        self._propagation = PropagationView(
            comparison,
            surroundings.index,
            surroundings.groups,
            lambda mount: bool(self._sources.covers(mount)),
            self._refuse_mount,
        )
        self.state = self._state() if comparison.same_root else self._state_of_another_root()

    def _refuse(self, reason: str, remedy: str = "") -> None:
        self.blockers.append(Blocker(self._subject, reason, remedy))

    def _state(self) -> MountState:
        steps = [Step("umount", mount.point) for mount in self._gone]
        behind: list[Step] = []
        reached = {mount.id for mount, _ in self._kept}
        for mount in self._added:
            made = self._steps_of(mount)
            if mount.parent not in reached:
                made = []
                self._refuse_mount(mount, "lies on a mount that was moved, which is not carried")
            reached.add(mount.id)
            if made:
                which = behind if comes_behind_copies(made[0]) else steps
                which += [*made, *self._propagation.at_once(mount, self._sources.copied.get(mount.id))]
        for mount, before in self._kept:
            if mount.options != before.options:
                self._options.check(mount)
                steps.append(Step("remount", mount.point, flags=mount_flags(mount)))
        steps += self._propagation.at_last()
        return MountState(propagation=self._propagation.mode, steps=[*steps, *behind])

    def _state_of_another_root(self) -> MountState:
        """A namespace after pivot_root: all of its mounts, made below a place in the other one.

        That is where its root is to be seen there; or, for one that is to be seen nowhere, a directory that
        nothing is bound from.
        """
        roots = [mount for mount in self._added if mount.point == b"/"]
        if len(roots) != 1:
            self._refuse("its mount namespace has several root file systems on one another")
            return MountState()
        source = self._sources.of(roots[0])
        if source is not None and source != b"/":
            return self._made_below(source, roots[0], source)
        before, best = self.blockers, None
        for place in _PLACES:
            if os.path.isdir(self._sources.outside(place)):
                self.blockers = list(before)
                state = self._made_below(place, roots[0], None)
                if not self._sources.needs(place):
                    if len(self.blockers) == len(before):
                        return state
                    best = best or (state, self.blockers)
        if best is not None:
            self.blockers = best[1]
            return best[0]
        self.blockers = before
        self._refuse("its mount namespace has a root file system that is not to be seen from outside")
        return MountState()

    def _made_below(self, place: bytes, root: Mount, source: bytes | None) -> MountState:
        """All mounts below `place`, the root being a bind mount of `source` or mounted itself."""
        self._sources.begin_below(place)
        steps: list[Step] = []
        behind: list[Step] = []
        for mount in self._added:
            if mount is root and source is not None:
                self._options.check(mount)
                made = [Step("bind", b"", source, flags=mount_flags(mount))]
            else:
                made = self._steps_of(mount)
            if made:
                which = behind if comes_behind_copies(made[0]) else steps
                which += [*made, *self._propagation.at_once(mount, self._sources.copied.get(mount.id))]
        steps += [
            structs.replace(step, source=place + step.source.rstrip(b"/")) if step.what == "group" else step
            for step in self._propagation.at_last()
        ]
        steps = [structs.replace(step, point=place + step.point.rstrip(b"/")) for step in steps]
        return MountState(steps=[*steps, Step("pivot", place), *behind])

    # -- one mount --------------------------------------------------------------------------

    def _refuse_mount(self, mount: Mount, reason: str, remedy: str | None = None) -> None:
        point, kind = os.fsdecode(mount.point), os.fsdecode(mount.kind)
        self._refuse(f"mount {point} ({kind}) {reason}", f"umount {point}" if remedy is None else remedy)

    def _steps_of(self, mount: Mount) -> list[Step]:
        """How a mount that is only there is made again; empty where it is refused."""
        self._options.check(mount)
        if mount.id in self._sources.came_along:
            if _IDMAPPED in mount.options:
                self._refuse_mount(
                    mount, "is idmapped and lies on another that it came with, which is not carried"
                )
            return [Step("remount", mount.point, flags=mount_flags(mount))]
        if mount.kind == b"nsfs" and (file := self._namespace_file(mount)):
            return [file]
        shows = self._around.shown_by_kind(mount) if mount.kind in _CGROUPS else None
        source = self._sources.of(mount) if shows is None else None
        if source is not None:
            return [self._bound(mount, source)]
        if _IDMAPPED in mount.options:
            self._refuse_mount(mount, "is idmapped, and of a file system that is not to be seen as it is")
            return []
        instance, maker = self._around.instances.get(mount.device, (0, True))
        whole = self._around.tops.get(mount.device, b"/")
        if mount.kind not in MOUNTED_AGAIN or (mount.root != whole and shows is None):
            self._refuse_mount(mount, "is not carried yet")
            return []
        if mount.kind in NAMELESS and self._sources.is_outside(mount):
            self._refuse_mount(mount, "is of outside of the tree, and not to be seen there any more")
            return []
        if not maker:
            return [Step("attach", mount.point, flags=mount_flags(mount), instance=instance)]
        covered = bool(self._sources.covers(mount))
        if covered and mount.kind == b"devpts":
            self._refuse_mount(mount, "is covered by another mount, which is not carried")
            return []
        if mount.kind == b"tmpfs":
            return self._tmpfs(mount, instance)
        if mount.kind == b"overlay":
            self._options.check_overlay(mount, self._sources)
        late = None
        if mount.kind == b"proc":
            late = self._around.pid_namespace_of(mount.device)
            if late is None and not covered:
                late = self._around.shown.pids(self._sources.at(mount.point))
            if late is None:
                self._refuse_mount(mount, "shows a pid namespace that is not the tree's")
        elif mount.kind in SHOWN and shows is None:
            shows = self._around.shown_by_kind(mount)
            if shows is None:
                kind = SHOWN[mount.kind]
                self._refuse_mount(
                    mount, f"shows a namespace ({kind}) that is not the tree's, or has another owner"
                )
        flags = mount_flags(mount)
        read_only = RDONLY if b"ro" in mount.super_options else 0
        data = b",".join(self._options.of(mount))
        steps = [
            Step(
                "mount", mount.point, mount.source, mount.kind, flags | read_only, data, late, shows, instance
            )
        ]
        if flags | read_only != flags:  # only the file system is read-only
            steps.append(Step("remount", mount.point, flags=flags, late=late))
        return steps

    def _bound(self, mount: Mount, source: bytes) -> Step:
        idmap = None
        if _IDMAPPED in mount.options:
            try:
                idmap = self._around.idmap_of(mount)
            except OSError as error:
                raise_if_exhausted(error)
                self._refuse_mount(mount, f"is idmapped, and how is not to be learnt: {error.strerror}")
        whole = self._sources.whole(mount, source)
        if whole and idmap is not None:
            self._refuse_mount(
                mount, "is idmapped, and others that came with it lie on it, which is not carried"
            )
        return Step("bind", mount.point, source, flags=mount_flags(mount) | whole, idmap=idmap)

    def _namespace_file(self, mount: Mount) -> Step | None:
        """How the file of a namespace is bound; None for one of outside, which is bound as anything else is."""
        if self._sources.covers(mount):
            self._refuse_mount(mount, "is covered by another mount, which is not carried")
            return Step("namespace", mount.point)
        found = self._around.shown.held(self._pid, mount.point, self._sources.is_outside_root(mount))
        if found is None:
            return None
        kind, index = found
        return Step("namespace", mount.point, kind=kind.encode(), flags=mount_flags(mount), shows=index)

    def _tmpfs(self, mount: Mount, instance: int) -> list[Step]:
        """Mount it so that it can be written to, fill it, and then make it what it was."""
        try:
            entries = self._around.list_tmpfs(mount, self._sources.covers(mount))
        except OSError as error:
            raise_if_exhausted(error)
            why = _WHY_NOT_LISTED.get(error.errno or 0, f"cannot be listed: {error.strerror}")
            self._refuse_mount(mount, why, "empty or umount it")
            return []
        flags = mount_flags(mount)
        data = b",".join([*self._options.of(mount), *root_options(mount, entries[0], self._around.owner)])
        steps = [
            Step("mount", mount.point, mount.source, mount.kind, flags & ~RDONLY, data, instance=instance),
            Step("fill", mount.point, entries=entries),
        ]
        if b"ro" in mount.super_options:
            steps.append(Step("reconfigure", mount.point, flags=flags | RDONLY))
        if flags & RDONLY or b"ro" in mount.super_options:
            steps.append(Step("remount", mount.point, flags=flags))
        return steps
