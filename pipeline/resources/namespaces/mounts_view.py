"""Looking at a mount namespace: what was done to it since it was a copy of another.

Carried: proc of a pid namespace of the tree, mqueue of an ipc namespace of the tree, devpts, tmpfs with what is in
it, overlayfs whose layers are to be seen where it is mounted again, bind mounts of what the other namespace shows too
(sysfs, cgroups and the external proc are that: mounted twice they are one file system) or an earlier mount does (a
read-only /proc/sys); one tmpfs or devpts that several mount namespaces show; mounts that are gone; flags. After
pivot_root: all mounts, made below the place where the root is to be seen, or below a directory that nothing is bound
from. Who shares mount events with whom is in `pipeline.resources.namespaces.mounts_propagation`.

Refused by name: other file systems that are mounted only there, idmapped mounts, options that are not known here, a
devpts that another mount covers, a tmpfs that cannot be listed, mounts that lie on one that was moved.

Sources: mount_namespaces(7), mount(2), proc_pid_mountinfo(5), tmpfs(5).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from msgspec import structs

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel.mountinfo import Mount, mountinfo
from pipeline.resources.namespaces.mounts import MountState, Step
from pipeline.resources.namespaces.mounts_compare import Comparison, PeerGroups, parents_first
from pipeline.resources.namespaces.mounts_propagation import PropagationView
from pipeline.resources.namespaces.mounts_sources import Sources
from pipeline.resources.namespaces.tmpfs import Entry

_FLAGS = {
    b"rw": 0, b"ro": 1, b"nosuid": 2, b"nodev": 4, b"noexec": 8, b"noatime": 1024, b"nodiratime": 2048,
    b"relatime": 1 << 21, b"nosymfollow": 256,
}  # fmt: skip
_RDONLY = 1
_STRICTATIME = 1 << 24
_ATIME = _FLAGS[b"noatime"] | _FLAGS[b"relatime"]
#: options of overlayfs that only the initial user namespace may set
_MODULE_DEFAULTS = {b"redirect_dir", b"metacopy"}
_LAYERS = {b"lowerdir+", b"datadir+", b"upperdir", b"workdir"}
#: options of the file system that are passed again; those of ids are translated
_DATA = {
    b"devpts": {b"gid", b"uid", b"mode", b"ptmxmode", b"max"},
    b"tmpfs": {b"size", b"nr_inodes", b"nr_blocks", b"huge"},
    b"proc": {b"hidepid", b"gid", b"subset"},
    b"mqueue": set(),
    b"overlay": {
        *_LAYERS, b"lowerdir", b"redirect_dir", b"index", b"userxattr", b"metacopy", b"xino", b"nfs_export", b"uuid",
        b"volatile", b"verity",
    },
}  # fmt: skip
#: options that say nothing: defaults, or said by what `MountsView` reads from the root directory
_PASSED_OVER = {b"rw", b"ro", b"inode32", b"inode64", b"seclabel"}
_FROM_ROOT = {b"tmpfs": {b"mode", b"uid", b"gid"}}
#: file systems that exist once for each time they were mounted, and that have no other name
NAMELESS = {b"tmpfs", b"devpts"}
#: where a root is mounted that is not to be seen from outside, before it becomes the root
_PLACES = (b"/mnt", b"/srv", b"/media", b"/opt", b"/tmp")
_WHY_NOT_LISTED = {
    errno.EINVAL: "has mounts on it that another user namespace has locked, which hide what is below them",
    errno.E2BIG: "holds too many names",
    errno.EOVERFLOW: "holds files of ids which its user namespace does not map",
}


@dataclass(frozen=True)
class Surroundings:
    """What a mount namespace of a tree is looked at with.

    Args:
        uid: from an id as the pipeline sees it to one of the owning user namespace; `gid` likewise.
        pid_namespace_at: the `Namespace` index of the pid namespace that the proc at a path shows; None
            for one that is not the tree's.
        ipc_namespace_of: the index of the ipc namespace that an mqueue with this st_dev shows, likewise.
        pid_namespace_of: that of the pid namespace which a proc with this st_dev shows, wherever it is seen.
        groups: of the whole tree.
        instances: of file systems that several mount namespaces of the tree show, by st_dev: number, and whether
            this namespace is the one that mounts it.
        list_tmpfs: lists what a tmpfs holds on which other mounts may lie, at these points, the last one first.
        owner: the user namespace that the mount namespace belongs to; `index`: its number.
    """

    uid: Callable[[int], int | None]
    gid: Callable[[int], int | None]
    pid_namespace_at: Callable[[str], int | None]
    ipc_namespace_of: Callable[[int], int | None]
    pid_namespace_of: Callable[[int], int | None]
    groups: PeerGroups
    instances: Mapping[int, tuple[int, bool]]
    list_tmpfs: Callable[[Mount, list[bytes]], list[Entry]]
    owner: int
    index: int


def _flags(mount: Mount) -> int:
    flags = sum(_FLAGS.get(option, 0) for option in mount.options)
    return flags if flags & _ATIME else flags | _STRICTATIME


class MountsView:
    """The mount namespace of `pid`, compared with the one that it is taken to be a copy of.

    Args:
        pid: a process in it whose root is the namespace's root.
        comparison: of the two.
        below: a path to the root of the other one; empty for the pipeline's own.
        surroundings: of the namespace.

    `blockers` and `state` are complete when it is made.
    """

    def __init__(self, pid: HostPid, comparison: Comparison, below: str, surroundings: Surroundings) -> None:
        self._pid = pid
        self._subject = f"pid {pid}"
        self._around = surroundings
        self.blockers: list[Blocker] = []
        if not comparison.same_root:
            comparison = replace(comparison, kept=[], added=parents_first(mountinfo(pid)), gone=[])
        self._kept = comparison.kept
        self._added = comparison.added
        self._gone = comparison.gone
        self._sources = Sources(pid, comparison, below, self._added)
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
        reached = {mount.id for mount, _ in self._kept}
        for mount in self._added:
            made = self._steps_of(mount)
            if mount.parent not in reached:
                made = []
                self._refuse_mount(mount, "lies on a mount that was moved, which is not carried")
            reached.add(mount.id)
            if made:
                steps += [*made, *self._propagation.at_once(mount, self._sources.copied.get(mount.id))]
        for mount, before in self._kept:
            if mount.options != before.options:
                self._check_options(mount)
                steps.append(Step("remount", mount.point, flags=_flags(mount)))
        return MountState(propagation=self._propagation.mode, steps=[*steps, *self._propagation.at_last()])

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
        steps = []
        for mount in self._added:
            if mount is root and source is not None:
                self._check_options(mount)
                made = [Step("bind", b"", source, flags=_flags(mount))]
            else:
                made = self._steps_of(mount)
            if made:
                steps += [*made, *self._propagation.at_once(mount, self._sources.copied.get(mount.id))]
        steps += [
            structs.replace(step, source=place + step.source.rstrip(b"/")) if step.what == "group" else step
            for step in self._propagation.at_last()
        ]
        steps = [structs.replace(step, point=place + step.point.rstrip(b"/")) for step in steps]
        return MountState(steps=[*steps, Step("pivot", place)])

    # -- one mount --------------------------------------------------------------------------

    def _refuse_mount(self, mount: Mount, reason: str, remedy: str | None = None) -> None:
        point, kind = os.fsdecode(mount.point), os.fsdecode(mount.kind)
        self._refuse(f"mount {point} ({kind}) {reason}", f"umount {point}" if remedy is None else remedy)

    def _check_options(self, mount: Mount) -> None:
        for option in mount.options:
            if option not in _FLAGS:
                self._refuse_mount(mount, f"has the option {os.fsdecode(option)}, which is not carried")

    def _steps_of(self, mount: Mount) -> list[Step]:
        """How a mount that is only there is made again; empty where it is refused."""
        self._check_options(mount)
        if mount.id in self._sources.came_along:
            return [Step("remount", mount.point, flags=_flags(mount))]
        source = self._sources.of(mount)
        if source is not None:
            return [
                Step("bind", mount.point, source, flags=_flags(mount) | self._sources.whole(mount, source))
            ]
        instance, maker = self._around.instances.get(mount.device, (0, True))
        if mount.kind not in _DATA or mount.root != b"/":
            self._refuse_mount(mount, "is not carried yet")
            return []
        if mount.kind in NAMELESS and self._sources.is_outside(mount):
            self._refuse_mount(mount, "is of outside of the tree, and not to be seen there any more")
            return []
        if not maker:
            return [Step("attach", mount.point, flags=_flags(mount), instance=instance)]
        covered = bool(self._sources.covers(mount))
        if covered and mount.kind == b"devpts":
            self._refuse_mount(mount, "is covered by another mount, which is not carried")
            return []
        if mount.kind == b"tmpfs":
            return self._tmpfs(mount, instance)
        if mount.kind == b"overlay":
            self._check_overlay(mount)
        late = ipc = None
        if mount.kind == b"proc":
            late = self._around.pid_namespace_of(mount.device)
            if late is None and not covered:
                late = self._around.pid_namespace_at(self._sources.at(mount.point))
            if late is None:
                self._refuse_mount(mount, "shows a pid namespace that is not the tree's")
        elif mount.kind == b"mqueue":
            ipc = self._around.ipc_namespace_of(mount.device)
            if ipc is None:
                self._refuse_mount(mount, "shows an ipc namespace that is not the tree's")
        flags = _flags(mount)
        read_only = _RDONLY if b"ro" in mount.super_options else 0
        data = b",".join(self._options(mount))
        steps = [
            Step("mount", mount.point, mount.source, mount.kind, flags | read_only, data, late, ipc, instance)
        ]
        if flags | read_only != flags:  # only the file system is read-only
            steps.append(Step("remount", mount.point, flags=flags, late=late))
        return steps

    def _tmpfs(self, mount: Mount, instance: int) -> list[Step]:
        """Mount it so that it can be written to, fill it, and then make it what it was."""
        try:
            entries = self._around.list_tmpfs(mount, self._sources.covers(mount))
        except OSError as error:
            why = _WHY_NOT_LISTED.get(error.errno or 0, f"cannot be listed: {error.strerror}")
            self._refuse_mount(mount, why, "empty or umount it")
            return []
        flags = _flags(mount)
        data = b",".join([*self._options(mount), *_root_options(entries[0], self._around.owner)])
        steps = [
            Step("mount", mount.point, mount.source, mount.kind, flags & ~_RDONLY, data, instance=instance),
            Step("fill", mount.point, entries=entries),
        ]
        if b"ro" in mount.super_options:
            steps.append(Step("reconfigure", mount.point, flags=flags | _RDONLY))
        if flags & _RDONLY or b"ro" in mount.super_options:
            steps.append(Step("remount", mount.point, flags=flags))
        return steps

    def _options(self, mount: Mount) -> Iterator[bytes]:
        """The options of the file system, ids as its owner knows them."""
        for option in mount.super_options:
            name, _, value = option.partition(b"=")
            if name in {b"uid", b"gid"} and name in _DATA[mount.kind]:
                yield self._id_option(mount, name, int(value))
            elif mount.kind == b"overlay" and name in _MODULE_DEFAULTS and self._around.owner:
                continue  # nobody may set it there, so it was not set
            elif name in _DATA[mount.kind]:
                yield option
            elif option not in _PASSED_OVER and name not in _FROM_ROOT.get(mount.kind, ()):
                self._refuse_mount(mount, f"has the option {os.fsdecode(option)}, which is not carried")

    def _check_overlay(self, mount: Mount) -> None:
        """Its layers must be where the options say, seen from where it is mounted again."""
        here = self._sources.earlier(mount)
        for option in mount.super_options:
            name, _, value = option.partition(b"=")
            for path in _layers(name, value):
                inside = not self._sources.prefix and any(path.startswith(m.point + b"/") for m in here)
                seen = self._sources.at(path) if inside else self._sources.outside(path)
                if not path.startswith(b"/") or not os.path.isdir(seen):
                    self._refuse_mount(
                        mount, f"has a layer {os.fsdecode(path)} that is not to be seen from outside"
                    )

    def _id_option(self, mount: Mount, name: bytes, seen: int) -> bytes:
        inner = (self._around.uid if name == b"uid" else self._around.gid)(seen)
        if inner is None:
            what = os.fsdecode(name)
            self._refuse_mount(mount, f"belongs to {what} {seen}, which its user namespace does not map")
            return name + b"=0"
        return b"%s=%d" % (name, inner)


def _layers(name: bytes, value: bytes) -> list[bytes]:
    """The directories that an option of overlayfs names; a backslash takes a colon's meaning away."""
    if name == b"lowerdir":
        return [part.replace(b"\\:", b":") for part in re.split(rb"(?<!\\)::?", value)]
    return [value] if name in _LAYERS else []


def _root_options(root: Entry, owner: int) -> Iterator[bytes]:
    """What a tmpfs is mounted with so that its owner may change its root directory; filling does the rest."""
    yield b"mode=%o" % (root.mode & 0o7777)
    if owner:
        yield b"uid=%d" % root.uid.id
        yield b"gid=%d" % root.gid.id
