"""Looking at a mount namespace: what was done to it since it was a copy of another.

Carried: proc of a pid namespace of the tree, mqueue of an ipc namespace of the tree,
devpts, tmpfs with what is in it, bind mounts of what the external namespace shows too (sysfs, cgroups
and the external proc are that: mounted twice they are one file system) or an earlier
mount does (a read-only /proc/sys); one tmpfs or devpts that several mount namespaces show; mounts that are
gone; flags; propagation that is the same everywhere, and single shared mounts. After pivot_root: all mounts, if the
new root is a directory that the external namespace shows.

Refused by name: a root file system that is not to be seen from outside, overlayfs, block devices, idmapped mounts,
options that are not known here, mounts with a state that are covered by others or lie on one that was moved, and
peer groups within the tree.

Sources: mount_namespaces(7), mount(2), proc_pid_mountinfo(5), tmpfs(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields

from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel.mountinfo import Mount, mountinfo
from pipeline.resources.namespaces.mounts import (
    RECURSIVE,
    SHARED,
    UNBINDABLE,
    MountState,
    Propagation,
    Step,
)
from pipeline.resources.namespaces.mounts_compare import Comparison, PeerGroups, key
from pipeline.resources.namespaces.tmpfs import Entry

_FLAGS = {
    b"rw": 0, b"ro": 1, b"nosuid": 2, b"nodev": 4, b"noexec": 8, b"noatime": 1024, b"nodiratime": 2048,
    b"relatime": 1 << 21, b"nosymfollow": 256,
}  # fmt: skip
_RDONLY = 1
_STRICTATIME = 1 << 24
_ATIME = _FLAGS[b"noatime"] | _FLAGS[b"relatime"]
#: options of the file system that are passed again; those of ids are translated
_DATA = {
    b"devpts": {b"gid", b"uid", b"mode", b"ptmxmode", b"max"},
    b"tmpfs": {b"size", b"nr_inodes", b"nr_blocks", b"huge"},
    b"proc": {b"hidepid", b"gid", b"subset"},
    b"mqueue": set(),
}
#: file systems that are made again from their options alone, also where another mount covers them
_WITHOUT_STATE = {b"proc", b"mqueue"}
#: options that say nothing: defaults, or said by what `MountsView` reads from the root directory
_PASSED_OVER = {b"rw", b"ro", b"inode32", b"inode64", b"seclabel"}
_FROM_ROOT = {b"tmpfs": {b"mode", b"uid", b"gid"}}
#: file systems that exist once for each time they were mounted, and that have no other name
NAMELESS = {b"tmpfs", b"devpts"}
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
        list_tmpfs: lists what the tmpfs that is mounted at a path holds.
    """

    uid: Callable[[int], int | None]
    gid: Callable[[int], int | None]
    pid_namespace_at: Callable[[str], int | None]
    ipc_namespace_of: Callable[[int], int | None]
    pid_namespace_of: Callable[[int], int | None]
    groups: PeerGroups
    instances: Mapping[int, tuple[int, bool]]
    list_tmpfs: Callable[[bytes], list[Entry]]


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
        self._below = below
        self._own = comparison.original
        self._kept = comparison.kept
        self._added = comparison.added
        self._gone = comparison.gone
        #: where in the external namespace the root of this one is, if it is another one
        self._prefix = b""
        #: mounts, by id, that are made together with the one they lie on
        self._came_along: set[int] = set()
        self.state = self._state() if comparison.same_root else self._state_of_another_root(mountinfo(pid))

    def _refuse(self, reason: str, remedy: str = "") -> None:
        self.blockers.append(Blocker(self._subject, reason, remedy))

    def _state(self) -> MountState:
        propagation = self._propagation()
        steps = [Step("umount", mount.point) for mount in self._gone]
        reached = {mount.id for mount, _ in self._kept}
        for mount in self._added:
            made = self._steps_of(mount)
            if mount.parent not in reached:
                made = []
                self._refuse_mount(mount, "lies on a mount that was moved, which is not carried")
            reached.add(mount.id)
            if made:
                steps += [*made, *self._own_propagation(mount, None)]
        for mount, before in self._kept:
            if mount.options != before.options:
                self._check_options(mount)
                steps.append(Step("remount", mount.point, flags=_flags(mount)))
            steps += self._own_propagation(mount, before)
        return MountState(propagation=propagation, steps=steps)

    def _state_of_another_root(self, there: Sequence[Mount]) -> MountState:
        """A namespace after pivot_root: all of its mounts, made below the place where its root is in ours."""
        roots = [mount for mount in there if mount.point == b"/"]
        self._kept, self._gone = [], []
        self._added = list(there)
        source = self._bind_source(roots[0]) if len(roots) == 1 else None
        if source is None or source == b"/":
            self._refuse("its mount namespace has a root filesystem that is not to be seen from outside")
            return MountState()
        self._prefix = source
        steps = []
        for mount in there:
            if mount is roots[0]:
                self._check_options(mount)
                made = [Step("bind", b"", source, flags=_flags(mount))]
            else:
                made = self._steps_of(mount)
            if made:
                steps += [*made, *self._own_propagation(mount, None)]
            if mount.master:
                self._refuse_mount(
                    mount, "is a slave of another mount, which is not carried after pivot_root"
                )
        steps = [replace(step, point=source + step.point.rstrip(b"/")) for step in steps]
        return MountState(steps=[*steps, Step("pivot", source)])

    # -- propagation --------------------------------------------------------------------

    def _propagation(self) -> Propagation:
        """How the mounts that came with the copy propagate: in the same way, all of them."""
        linked = [(mount, own) for mount, own in self._kept if own.shared or own.master]
        if any(mount.shared and mount.shared == own.shared for mount, own in linked):
            odd = [m for m, own in linked if (m.shared, m.master) != (own.shared, own.master)]
            found: Propagation = "shared"
        elif any(mount.master for mount, _ in linked):
            odd = [m for m, own in linked if m.master != (own.shared or own.master)]
            found = "slave"
        else:
            odd, found = [], "private"
        for mount in odd:
            self._refuse_mount(mount, f"propagates in another way than the rest, which is {found}")
        masters = {own.shared or own.master for _, own in linked} if found == "slave" else set()
        for mount in (*(mount for mount, _ in self._kept), *self._added):
            if mount.master and mount.master not in masters and mount not in odd:
                self._refuse_mount(mount, "is a slave of a mount of the tree, which is not carried")
        return found

    def _own_propagation(self, mount: Mount, own: Mount | None) -> Iterator[Step]:
        """A shared mount, alone in its group, or an unbindable one."""
        if mount.shared and (own is None or mount.shared != own.shared):
            if not self._around.groups.alone(mount.shared):
                self._refuse_mount(mount, "shares its mounts with others of the tree, which is not carried")
            yield Step("propagation", mount.point, flags=SHARED)
        if mount.unbindable:
            yield Step("propagation", mount.point, flags=UNBINDABLE)

    # -- one mount --------------------------------------------------------------------------

    def _refuse_mount(self, mount: Mount, reason: str, remedy: str | None = None) -> None:
        point, kind = os.fsdecode(mount.point), os.fsdecode(mount.kind)
        self._refuse(f"mount {point} ({kind}) {reason}", f"umount {point}" if remedy is None else remedy)

    def _check_options(self, mount: Mount) -> None:
        for option in mount.options:
            if option not in _FLAGS:
                self._refuse_mount(mount, f"has the option {os.fsdecode(option)}, which is not carried")

    def _at(self, point: bytes) -> str:
        return f"/proc/{self._pid}/root{os.fsdecode(point)}"

    def _steps_of(self, mount: Mount) -> list[Step]:
        """How a mount that is only there is made again; empty where it is refused."""
        self._check_options(mount)
        if mount.id in self._came_along:
            return [Step("remount", mount.point, flags=_flags(mount))]
        source = self._bind_source(mount)
        if source is not None:
            return [Step("bind", mount.point, source, flags=_flags(mount) | self._whole(mount, source))]
        instance, maker = self._around.instances.get(mount.device, (0, True))
        if mount.kind not in _DATA or mount.root != b"/":
            self._refuse_mount(mount, "is not carried yet")
            return []
        if not maker:
            return [Step("attach", mount.point, flags=_flags(mount), instance=instance)]
        try:
            root = os.stat(self._at(mount.point))
        except OSError as error:
            self._refuse_mount(mount, f"cannot be looked at: {error.strerror}", "")
            return []
        covered = root.st_dev != mount.device
        if covered and mount.kind not in _WITHOUT_STATE:
            self._refuse_mount(mount, "is covered by another mount, which is not carried")
            return []
        if mount.kind == b"tmpfs":
            return self._tmpfs(mount, self._data(mount, root), instance)
        late = ipc = None
        if mount.kind == b"proc":
            late = self._around.pid_namespace_of(mount.device)
            if late is None and not covered:
                late = self._around.pid_namespace_at(self._at(mount.point))
            if late is None:
                self._refuse_mount(mount, "shows a pid namespace that is not the tree's")
        elif mount.kind == b"mqueue":
            ipc = self._around.ipc_namespace_of(mount.device)
            if ipc is None:
                self._refuse_mount(mount, "shows an ipc namespace that is not the tree's")
        flags = _flags(mount) | (_RDONLY if b"ro" in mount.super_options else 0)
        data = self._data(mount, root)
        return [Step("mount", mount.point, mount.source, mount.kind, flags, data, late, ipc, instance)]

    def _tmpfs(self, mount: Mount, data: bytes, instance: int) -> list[Step]:
        """Mount it so that it can be written to, fill it, and then make it what it was."""
        try:
            entries = self._around.list_tmpfs(mount.point)
        except OSError as error:
            why = _WHY_NOT_LISTED.get(error.errno or 0, f"cannot be listed: {error.strerror}")
            self._refuse_mount(mount, why, "empty or umount it")
            return []
        flags = _flags(mount)
        steps = [
            Step("mount", mount.point, mount.source, mount.kind, flags & ~_RDONLY, data, instance=instance),
            Step("fill", mount.point, entries=entries),
        ]
        if b"ro" in mount.super_options:
            steps.append(Step("reconfigure", mount.point, flags=flags | _RDONLY))
        if flags & _RDONLY or b"ro" in mount.super_options:
            steps.append(Step("remount", mount.point, flags=flags))
        return steps

    def _data(self, mount: Mount, root: os.stat_result) -> bytes:
        """The options of the file system, ids as its owner knows them."""
        told = []
        for option in mount.super_options:
            name, _, value = option.partition(b"=")
            if name in {b"uid", b"gid"} and name in _DATA[mount.kind]:
                told.append(self._id_option(mount, name, int(value)))
            elif name in _DATA[mount.kind]:
                told.append(option)
            elif option not in _PASSED_OVER and name not in _FROM_ROOT.get(mount.kind, ()):
                self._refuse_mount(mount, f"has the option {os.fsdecode(option)}, which is not carried")
        if mount.kind == b"tmpfs":
            told += [
                b"mode=%o" % (root.st_mode & 0o7777),
                self._id_option(mount, b"uid", root.st_uid),
                self._id_option(mount, b"gid", root.st_gid),
            ]
        return b",".join(told)

    def _id_option(self, mount: Mount, name: bytes, seen: int) -> bytes:
        inner = (self._around.uid if name == b"uid" else self._around.gid)(seen)
        if inner is None:
            what = os.fsdecode(name)
            self._refuse_mount(mount, f"belongs to {what} {seen}, which its user namespace does not map")
            return name + b"=0"
        return b"%s=%d" % (name, inner)

    def _whole(self, mount: Mount, source: bytes) -> int:
        """MS_REC if `mount` shows `source` of the external namespace with all mounts below it, which come along.

        A less privileged namespace may not bind a directory without the mounts that lie on it: they are locked.
        """
        below = [other for other in self._own if other.point.startswith(source.rstrip(b"/") + b"/")]
        later = self._added[self._added.index(mount) + 1 :]
        found = []
        for other in below:
            point = mount.point.rstrip(b"/") + other.point[len(source.rstrip(b"/")) :]
            wanted = (point, other.root, other.device, other.kind)
            found.append(next((m for m in later if key(m) == wanted and m.id not in self._came_along), None))
        if not found or None in found:
            return 0
        self._came_along |= {each.id for each in found if each is not None}
        return RECURSIVE

    def _bind_source(self, mount: Mount) -> bytes | None:
        """Where the root of `mount` was to be seen when it was made; None where that is not sure.

        In the external namespace, or on a mount that came before it in this one.
        """
        try:
            wanted = os.stat(self._at(mount.point))
        except OSError:
            return None
        earlier = self._added[: self._added.index(mount)]
        here = (
            [with_fields(other, point=self._prefix + other.point) for other in earlier]
            if self._prefix
            else earlier
        )
        places = [(b"", other, here) for other in self._own if other not in self._gone]
        places += [(self._prefix, other, earlier[index + 1 :]) for index, other in enumerate(earlier)]
        for number, (prefix, other, between) in enumerate(places):
            source = _path_on(other, mount)
            if source is None or _cover(between, source):
                continue
            inside = number >= len(places) - len(earlier)
            path = (self._at(b"") if inside else self._below) + os.fsdecode(source)
            if _shows(path, wanted) or (wanted.st_dev != mount.device and _is_on(path, mount.device)):
                return prefix + source
        return None


def _path_on(other: Mount, mount: Mount) -> bytes | None:
    """The path at which `other` shows the directory that is the root of `mount`."""
    top = other.root.rstrip(b"/")
    if (other.device, other.kind) != (mount.device, mount.kind):
        return None
    if mount.root != other.root and not mount.root.startswith(top + b"/"):
        return None
    return os.path.join(other.point, mount.root[len(top) :].strip(b"/")).rstrip(b"/") or b"/"


def _cover(mounts: Sequence[Mount], path: bytes) -> bool:
    """Whether one of these mounts lies on `path`, or above it."""
    return any(path == mount.point or path.startswith(mount.point + b"/") for mount in mounts)


def _is_on(path: str, device: int) -> bool:
    """Whether a path leads to a file system: all that can be said of what another mount covers."""
    try:
        return os.stat(path).st_dev == device
    except OSError:
        return False


def _shows(path: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), wanted)
    except OSError:
        return False
