"""Mount namespaces, as differences to another: the pipeline's own, or one of the tree.

A private mount namespace begins as a copy of another. So it is recorded as what was
done to it since: mounts that are only there (in order), mounts that are only in the other
(unmounted there), flags that differ, and how changes propagate. At the destination the
new namespace begins as a copy of the restorer's or of the one of the tree, and the same is done again.

This file makes them; `pipeline.resources.namespaces.mounts_view` records them, and says
what is carried and what is refused.

Some file systems show another namespace: a proc mount a pid namespace, and can only be
mounted from inside it, so this step, and those behind it, wait until that has its first
process (`late`); an mqueue an ipc namespace, a sysfs a network and a cgroup hierarchy a cgroup namespace, which the
keeper joins first (`shows`). A namespace file that is bound somewhere (`namespace`) waits until the namespace is there.

A tmpfs is filled as soon as it is mounted (`fill`), because it may hold the directories and files that later
steps mount on. One file system that several mount namespaces show is an *instance*: one of them mounts it, and the
others wait for a copy of that mount (`attach`).

Sources: mount_namespaces(7), mount(2), move_mount(2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pipeline.errors import ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, Index, NamespaceKind, Path, Record
from pipeline.kernel.arch.x86_64 import NR, call_name
from pipeline.remote.calls import Argument
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces import tmpfs
from pipeline.resources.namespaces.idmapped import MountIdmap
from pipeline.resources.support import Support

SUPPORT = Support(
    "mnt",
    carried=(
        "what was done since it was a copy of another: mounts made, moved, taken away; flags; peer groups; locks",
        "a root of its own",
        "bind mounts, idmapped ones, too; tmpfs with what is in it; overlayfs; devpts",
        "what shows a namespace of the tree: proc, mqueue, sysfs, cgroup hierarchies, namespace files",
        "one that only a descriptor or a mount holds",
    ),
    refused=(
        "other file systems that are only mounted there",
        "a tmpfs with mounts on it that another user namespace has locked",
        "peers in two namespaces neither of which is a copy of the other",
        "slaves of mounts that are nowhere to be seen",
    ),
    shown_by=(
        "programs/mounted.py",
        "resources/test_namespaces_mounts.py",
    ),
)

_BIND, _REMOUNT = 4096, 32
RECURSIVE = 16384
UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
_MNT_DETACH = 2
_HERE, _EMPTY_PATH, _SET_GROUP = -100, 0x4, 0x100
_OPEN_TREE_CLONE, _AT_EMPTY_PATH = 1, 0x1000
#: file systems that show the namespace of this kind which their mounter is in
SHOWN: Mapping[bytes, NamespaceKind] = {
    b"mqueue": "ipc", b"sysfs": "net", b"cgroup": "cgroup", b"cgroup2": "cgroup",
}  # fmt: skip

Propagation = Literal["private", "slave", "shared"]


class Step(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing done to a copy of the external namespace.

    `pivot`: the directory at `point` becomes the root; points before it lie below that directory.
    `group`: the mount at `point`, which is private, becomes a peer of that at `source`, and a slave as it is one.
    `flags`: MS_*; a bind may be recursive. `data`: the options of the file system, ids in it as the owning user
    namespace knows them.
    `late`: the pid namespace (a `Namespace` index) from inside which a proc is mounted. `shows`: the namespace of
    the kind `SHOWN` that is joined first; of a `namespace`, which one is bound, `kind` being its kind (of kind user a
    `UserNamespace` index). `idmap`: how an idmapped bind maps ids, see `pipeline.resources.namespaces.idmapped`.
    `instance`: of a file system that other mount namespaces show, too, counted from 1; `attach` mounts it.
    `entries`, `space`: what a tmpfs is filled with, and the content with the bytes of its files (0: none has any).
    """

    what: Literal[
        "mount", "fill", "reconfigure", "attach", "bind", "namespace", "umount", "remount", "propagation", "group",
        "pivot",
    ]  # fmt: skip
    point: Path
    source: Path = b""
    kind: Annotated[bytes, Meta(max_length=64)] = b""
    flags: U32 = 0
    data: Path = b""
    late: Index | None = None
    shows: Index | None = None
    instance: Index = 0
    entries: tmpfs.Entries = []
    space: Index = 0
    idmap: MountIdmap | None = None


#: the old root comes to lie over the new one, and goes
_PIVOT: tuple[tuple[int, tuple[Argument, ...]], ...] = (
    (NR.pivot_root, (b".\0", b".\0")),
    (NR.umount2, (b".\0", _MNT_DETACH)),
    (NR.chdir, (b"/\0",)),
)


class MountState(Record, frozen=True, kw_only=True):
    """How mounts that were there from the beginning propagate, and the steps, in order.

    `base`: the mount namespace of the tree that it begins as a copy of, once all of that one's steps are done;
    None for the external one.
    `shared` leaves them as the copy made them: peers of the external ones.
    """

    base: Index | None = None
    propagation: Propagation = "private"
    steps: list[Step] = []


def comes_behind_copies(step: Step) -> bool:
    """Whether a step is not for namespaces that are copies of its one: nobody's copy has files of mount namespaces."""
    return step.what == "namespace" and step.kind == b"mnt"


def begin(state: MountState, keeper: Puppet) -> None:
    """Set how the mounts of the copy propagate; `keeper` has just made the namespace."""
    if state.propagation != "shared":
        flags = RECURSIVE | (SLAVE if state.propagation == "slave" else PRIVATE)
        _call(keeper, "propagation", b"/", NR.mount, 0, b"/\0", 0, flags, 0)


def do(step: Step, puppet: Puppet) -> None:
    """Do a step that needs nothing but system calls of a puppet.

    Args:
        step: neither `fill`, `attach` nor `namespace`, nor an idmapped `bind`.
        puppet: is in the namespace with all capabilities in its owner, and in the namespaces that the step shows.

    Raises:
        RebuildError: names the step and the mount point.
    """
    point = step.point + b"\0"
    match step.what:
        case "mount":
            source, kind, data = step.source + b"\0", step.kind + b"\0", step.data + b"\0"
            _call(puppet, "mount", step.point, NR.mount, source, point, kind, step.flags, data)
        case "bind":
            how = _BIND | step.flags & RECURSIVE
            _call(puppet, "bind mount", step.point, NR.mount, step.source + b"\0", point, 0, how, 0)
            flags = _BIND | _REMOUNT | step.flags & ~RECURSIVE
            _call(puppet, "remount", step.point, NR.mount, 0, point, 0, flags, 0)
        case "remount":
            _call(puppet, "remount", step.point, NR.mount, 0, point, 0, _BIND | _REMOUNT | step.flags, 0)
        case "reconfigure":
            _call(puppet, "remount", step.point, NR.mount, 0, point, 0, _REMOUNT | step.flags, 0)
        case "umount":
            _call(puppet, "umount", step.point, NR.umount2, point, _MNT_DETACH)
        case "propagation":
            _call(puppet, "propagation", step.point, NR.mount, 0, point, 0, step.flags, 0)
        case "group":
            source = step.source + b"\0"
            _call(puppet, "peer group", step.point, NR.move_mount, _HERE, source, _HERE, point, _SET_GROUP)
        case "pivot":
            _call(puppet, "chdir to the new root", step.point, NR.chdir, point)
            for number, arguments in _PIVOT:
                _call(puppet, call_name(number), step.point, number, *arguments)
        case _:
            raise ImageError(f"a mount namespace cannot {step.what} by itself")


def attach(step: Step, puppet: Puppet, detached: LocalFd) -> None:
    """Mount a copy of a mount of another mount namespace.

    Raises:
        RebuildError: names the mount point.
    """
    (number,) = puppet.send_fds([detached])
    try:
        _attach(step, puppet, number)
    finally:
        puppet.syscall(NR.close, number)


def bind_namespace(step: Step, puppet: Puppet, namespace: LocalFd) -> None:
    """Mount a namespace file.

    Args:
        namespace: an open one; stays the caller's.

    Raises:
        RebuildError: names the mount point.
    """
    (number,) = puppet.send_fds([namespace])
    try:
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
        detached = _call(puppet, "namespace file", step.point, NR.open_tree, number, b"\0", flags)
    finally:
        puppet.syscall(NR.close, number)
    try:
        _attach(step, puppet, detached)
    finally:
        puppet.syscall(NR.close, detached)


def _attach(step: Step, puppet: Puppet, detached: int) -> None:
    point = step.point + b"\0"
    _call(puppet, "mount of a copy", step.point, NR.move_mount, detached, b"\0", _HERE, point, _EMPTY_PATH)
    flags = _BIND | _REMOUNT | step.flags & ~RECURSIVE
    _call(puppet, "remount", step.point, NR.mount, 0, point, 0, flags, 0)


def _call(puppet: Puppet, what: str, point: bytes, number: int, *args: Argument) -> int:
    try:
        return puppet.syscall(number, *args)
    except OSError as error:
        raise RebuildError(
            f"{what} of {os.fsdecode(point)} in a mount namespace of the tree: {error}{hint(error)}"
        ) from error


def hint(error: OSError) -> str:
    """What to do about a refusal, behind its message."""
    if error.errno != errno.EACCES:
        return ""
    return " (who made the user namespace has to be able to get there: chmod o+x on the directories above it)"
