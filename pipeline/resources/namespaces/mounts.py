"""Mount namespaces, as differences to the pipeline's own.

A private mount namespace begins as a copy of another. So it is recorded as what was
done to it since: mounts that are only there (in order), mounts that are only here
(unmounted there), flags that differ, and how changes propagate. At the destination the
new namespace begins as a copy of the restorer's, and the same is done again.

Carried: proc of a pid namespace of the tree (or of the external one), sysfs, mqueue,
devpts, empty tmpfs, bind mounts of what the external namespace shows too.
Refused by name: another root filesystem (pivot_root), tmpfs with content, overlayfs,
block devices, anything else; and shared peer groups of the tree's own.

A proc mount belongs to a pid namespace, and can only be mounted from inside it: such
steps wait until the namespace has its first process (`late`).

Sources: mount_namespaces(7), mount(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import U32, Index, Path, Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.mountinfo import Mount, mountinfo
from pipeline.remote.calls import Argument
from pipeline.remote.puppet import Puppet

_FLAGS = {
    b"ro": 1, b"nosuid": 2, b"nodev": 4, b"noexec": 8, b"noatime": 1024, b"nodiratime": 2048,
    b"relatime": 1 << 21, b"nosymfollow": 256,
}  # fmt: skip
_STRICTATIME = 1 << 24
_ATIME = _FLAGS[b"noatime"] | _FLAGS[b"relatime"]
_BIND, _REMOUNT, _REC = 4096, 32, 16384
_PRIVATE, _SLAVE, _SHARED, _UNBINDABLE = 1 << 18, 1 << 19, 1 << 20, 1 << 17
_MNT_DETACH = 2
_SIMPLE = {b"sysfs", b"mqueue", b"devpts", b"tmpfs", b"proc"}
#: what of the super options is passed again
_DATA = {
    b"devpts": (b"gid", b"mode", b"ptmxmode", b"max"),
    b"tmpfs": (b"size", b"nr_inodes", b"mode", b"uid", b"gid"),
    b"proc": (b"hidepid", b"gid", b"subset"),
}


class Step(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing done to a copy of the external namespace.

    `late` is the pid namespace (a `Namespace` index) from inside which a proc is mounted.
    """

    what: Literal["mount", "bind", "umount", "remount", "propagation"]
    point: Path
    source: Path = b""
    kind: Annotated[bytes, Meta(max_length=64)] = b""
    flags: U32 = 0
    data: Path = b""
    late: Index | None = None


class MountState(Record, frozen=True, kw_only=True):
    """The steps, in order, and how the rest propagates (slave or private)."""

    slave: bool = False
    steps: list[Step] = []


def _key(mount: Mount) -> tuple[bytes, bytes, int, bytes]:
    return mount.point, mount.root, mount.device, mount.kind


def _flags(mount: Mount) -> int:
    flags = sum(_FLAGS.get(option, 0) for option in mount.options)
    return flags if flags & _ATIME else flags | _STRICTATIME


class MountsView:
    """Looks at the mount namespace of `pid`, compared with the pipeline's own.

    Args:
        pid: a process in it whose root is the namespace's root.
        pid_namespace_at: the `Namespace` index of the pid namespace that a proc mount shows, by the
            path of its mount point as the pipeline reaches it; None for one that is not the tree's.
    """

    def __init__(self, pid: HostPid, pid_namespace_at: Callable[[str], int | None]) -> None:
        self._pid = pid
        self._pid_namespace_at = pid_namespace_at
        own, there = mountinfo(HostPid(os.getpid())), mountinfo(pid)
        self._own = own
        have = Counter(map(_key, own))
        self._kept: list[Mount] = []
        self._added: list[Mount] = []
        for mount in there:
            if have[_key(mount)]:
                have[_key(mount)] -= 1
                self._kept.append(mount)
            else:
                self._added.append(mount)
        self._gone: list[Mount] = []
        for mount in reversed(own):
            if have[_key(mount)]:
                have[_key(mount)] -= 1
                self._gone.append(mount)
        # mounts are listed in the order of their ids, which is not the same in a copy of a namespace
        roots = [[_key(mount) for mount in mounts if mount.point == b"/"][-1:] for mounts in (own, there)]
        self._root_is_ours = bool(roots[0]) and roots[0] == roots[1]

    def blockers(self, subject: str) -> Iterator[Blocker]:
        """Mounts that are not carried."""
        if not self._root_is_ours:
            yield Blocker(
                subject, "its mount namespace has another root filesystem, which is not carried yet"
            )
            return
        for mount in self._added:
            name = os.fsdecode(mount.point)
            if self._bind_source(mount) is not None:
                continue
            if mount.kind not in _SIMPLE or mount.root != b"/":
                kind = os.fsdecode(mount.kind)
                yield Blocker(subject, f"mount {name} ({kind}) is not carried yet", f"umount {name}")
            elif mount.kind == b"tmpfs" and self._holds_something(mount):
                yield Blocker(
                    subject, f"tmpfs {name} has content, which is not carried yet", f"empty or umount {name}"
                )

    def _holds_something(self, mount: Mount) -> bool:
        try:
            return bool(os.listdir(f"/proc/{self._pid}/root{os.fsdecode(mount.point)}"))
        except OSError:
            return True

    def _bind_source(self, mount: Mount) -> bytes | None:
        """Where the external namespace shows the root of `mount`; None where it does not."""
        for own in self._own:
            if own.device != mount.device or own.kind != mount.kind:
                continue
            if mount.root == own.root or mount.root.startswith(own.root.rstrip(b"/") + b"/"):
                rest = mount.root[len(own.root.rstrip(b"/")) :].strip(b"/")
                return os.path.join(own.point, rest) if rest else own.point
        return None

    def state(self) -> MountState:
        """What is to be done to a copy of the external namespace."""
        steps = [Step("umount", mount.point) for mount in self._gone]
        for mount in self._added:
            source = self._bind_source(mount)
            if source is not None:
                steps.append(Step("bind", mount.point, source, flags=_flags(mount)))
            else:
                late = None
                if mount.kind == b"proc":
                    late = self._pid_namespace_at(f"/proc/{self._pid}/root{os.fsdecode(mount.point)}")
                data = self._data(mount)
                steps.append(Step("mount", mount.point, mount.source, mount.kind, _flags(mount), data, late))
            if mount.shared or mount.unbindable:
                steps.append(Step("propagation", mount.point, flags=_SHARED if mount.shared else _UNBINDABLE))
        before = {_key(mount): mount for mount in self._own}
        steps += [
            Step("remount", mount.point, flags=_flags(mount))
            for mount in self._kept
            if _flags(mount) != _flags(before[_key(mount)])
        ]
        return MountState(slave=any(mount.master for mount in self._kept), steps=steps)

    @staticmethod
    def _data(mount: Mount) -> bytes:
        wanted = _DATA.get(mount.kind, ())
        return b",".join(option for option in mount.super_options if option.partition(b"=")[0] in wanted)


def create(state: MountState, keeper: Puppet) -> None:
    """Do the steps that can be done at once in the namespace that `keeper` has just made."""
    _call(
        keeper, "propagation", b"/", NR.mount, 0, b"/\0", 0, _REC | (_SLAVE if state.slave else _PRIVATE), 0
    )
    for step in state.steps:
        if step.late is None:
            _do(step, keeper)


def late_steps(state: MountState, pidns: int) -> Sequence[Step]:
    """The steps that wait for the first process of pid namespace `pidns`."""
    return [step for step in state.steps if step.late == pidns]


def do_late(steps: Sequence[Step], puppet: Puppet) -> None:
    """Do steps from inside their pid namespace; the puppet has joined the mount namespace."""
    for step in steps:
        _do(step, puppet)


def _do(step: Step, puppet: Puppet) -> None:
    point = step.point + b"\0"
    match step.what:
        case "mount":
            data = step.data + b"\0"
            _call(
                puppet,
                "mount",
                step.point,
                NR.mount,
                step.source + b"\0",
                point,
                step.kind + b"\0",
                step.flags,
                data,
            )
        case "bind":
            _call(puppet, "bind mount", step.point, NR.mount, step.source + b"\0", point, 0, _BIND, 0)
            _call(puppet, "remount", step.point, NR.mount, 0, point, 0, _BIND | _REMOUNT | step.flags, 0)
        case "remount":
            _call(puppet, "remount", step.point, NR.mount, 0, point, 0, _BIND | _REMOUNT | step.flags, 0)
        case "umount":
            _call(puppet, "umount", step.point, NR.umount2, point, _MNT_DETACH)
        case "propagation":
            _call(puppet, "propagation", step.point, NR.mount, 0, point, 0, step.flags, 0)


def _call(puppet: Puppet, what: str, point: bytes, number: NR, *args: Argument) -> None:
    try:
        puppet.syscall(number, *args)
    except OSError as error:
        raise RebuildError(
            f"{what} of {os.fsdecode(point)} in a mount namespace of the tree: {error}"
        ) from error
