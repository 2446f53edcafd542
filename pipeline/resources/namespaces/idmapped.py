"""Idmapped mounts: a mount that shows the ids of its files as others.

The kernel holds two maps, of uids and of gids, in a user namespace that the mount keeps and that nobody else can
name afterwards. The ids of the file system are those of the host that has it and stay what they are; what they are
shown as lies where the ids of the tree lie, so these go through the destination's map (`pipeline.userns.destination`).

Such a mount is made from a detached copy of another by somebody with CAP_SYS_ADMIN in the user namespace of the *file
system*: for a disk, real root. Refused by name: a file system that is idmapped as a whole, because what it holds cannot
be read as it is; an idmapped mount that came along with others; a kernel that does not tell the maps (before 6.16).

Sources: mount_setattr(2) on MOUNT_ATTR_IDMAP, statmount(2); Documentation/filesystems/idmappings.rst.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct

from pipeline.ids import LocalFd
from pipeline.image.schema import Extents
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.statmount import idmap_of
from pipeline.kernel.syscalls import CLONE, syscall
from pipeline.remote.files import put
from pipeline.remote.puppet import Puppet
from pipeline.userns.forest import IdKind
from pipeline.userns.idmap import IDENTITY, IdMap, MapError, parse
from pipeline.userns.visit import Way, read_file, visit

_MOUNT_ATTR_IDMAP = 0x0010_0000
_AT_EMPTY_PATH = 0x1000
_ATTRIBUTES = struct.Struct("<4Q")


class MountIdmap(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Lines of the two maps: ids of the file system (`inner`), and the ids of namespace 0 that they are shown as."""

    uid_map: Extents
    gid_map: Extents


def capture(way: Way, mount_id: int) -> MountIdmap:
    """How a mount maps ids.

    Args:
        way: into its mount namespace, in the pipeline's own user namespace.
        mount_id: as mountinfo shows it.

    Raises:
        OSError: EOPNOTSUPP: the kernel does not tell; EPERM: only root of the initial user namespace is told all.
    """
    for kind in ("uid", "gid"):
        if IdMap(parse(read_file(f"/proc/self/{kind}_map"))) != IDENTITY:
            raise OSError(errno.EPERM, "only root of the initial user namespace is told all of it")
    return msgspec.msgpack.decode(
        visit(way, lambda: msgspec.msgpack.encode(MountIdmap(*idmap_of(mount_id)))), type=MountIdmap
    )


def create(
    detached: LocalFd, wanted: MountIdmap, launcher: Puppet, outside: Callable[[IdKind], IdMap]
) -> None:
    """Make a detached mount an idmapped one.

    Args:
        launcher: a puppet that may write any map.
        outside: from ids of namespace 0 to ids here.

    Raises:
        OSError: EPERM: not privileged over the file system; EINVAL: it cannot be idmapped.
        MapError: what it shows has no place here.
    """
    with _user_namespace(wanted, launcher, outside) as userns:
        attributes = _ATTRIBUTES.pack(_MOUNT_ATTR_IDMAP, 0, 0, userns)
        syscall(NR.mount_setattr, detached, b"\0", _AT_EMPTY_PATH, attributes, _ATTRIBUTES.size)


@contextmanager
def _user_namespace(
    wanted: MountIdmap, launcher: Puppet, outside: Callable[[IdKind], IdMap]
) -> Iterator[LocalFd]:
    """A user namespace with these maps, that nobody is in."""
    helper = launcher.clone(CLONE.PARENT)
    try:
        helper.syscall(NR.unshare, CLONE.NEWUSER)
        kinds: tuple[tuple[IdKind, Extents], ...] = (("gid", wanted.gid_map), ("uid", wanted.uid_map))
        for kind, lines in kinds:
            placed = IdMap(lines).compose(outside(kind))
            if sum(line.count for line in placed.extents) != sum(line.count for line in lines):
                raise MapError(f"{kind}s that it shows have no place here")
            if not lines:
                raise MapError(f"it has no {kind} map")
            put(launcher, f"/proc/{helper.pid}/{kind}_map", placed.text())
        fd = LocalFd(os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        helper.kill_and_reap()
    try:
        yield fd
    finally:
        os.close(fd)
