"""The options of a mount: what mountinfo says of them, and how they are said again.

Some belong to the mount, the others to the file system. Ids among them are passed as the owner of the mount namespace
knows them. An option that is not known here is refused by name: nothing is lost in silence.

Sources: mount(2), tmpfs(5), proc(5), devpts, overlayfs and cgroup-v1 in the kernel's documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import msgspec

from pipeline.kernel.mountinfo import Mount
from pipeline.resources.namespaces.mounts_sources import Sources
from pipeline.resources.namespaces.tmpfs import Entry

_FLAGS = {
    b"rw": 0, b"ro": 1, b"nosuid": 2, b"nodev": 4, b"noexec": 8, b"noatime": 1024, b"nodiratime": 2048,
    b"relatime": 1 << 21, b"nosymfollow": 256,
}  # fmt: skip
RDONLY = 1
_STRICTATIME = 1 << 24
_ATIME = _FLAGS[b"noatime"] | _FLAGS[b"relatime"]
#: said by `pipeline.resources.namespaces.idmapped`
_IDMAPPED = b"idmapped"
#: options of overlayfs that only the initial user namespace may set
_MODULE_DEFAULTS = {b"redirect_dir", b"metacopy"}
_LAYERS = {b"lowerdir+", b"datadir+", b"upperdir", b"workdir"}
#: file systems that are mounted again, with those of their options that are passed again
MOUNTED_AGAIN = {
    b"devpts": {b"gid", b"uid", b"mode", b"ptmxmode", b"max"},
    b"tmpfs": {b"size", b"nr_inodes", b"nr_blocks", b"huge"},
    b"proc": {b"hidepid", b"gid", b"subset"},
    b"mqueue": set(),
    b"sysfs": set(),
    b"cgroup2": set(),
    b"cgroup": set(),
    b"overlay": {
        *_LAYERS, b"lowerdir", b"redirect_dir", b"index", b"userxattr", b"metacopy", b"xino", b"nfs_export", b"uuid",
        b"volatile", b"verity",
    },
}  # fmt: skip
#: options that say nothing: defaults, or said by what `MountsView` reads from the root directory
_PASSED_OVER = {b"rw", b"ro", b"inode32", b"inode64", b"seclabel"}
_FROM_ROOT = {b"tmpfs": {b"mode", b"uid", b"gid"}}


def mount_flags(mount: Mount) -> int:
    """The MS_* flags of the mount itself."""
    flags = sum(_FLAGS.get(option, 0) for option in mount.options)
    return flags if flags & _ATIME else flags | _STRICTATIME


class Options(msgspec.Struct, frozen=True):
    """The options of the mounts of one namespace.

    Args:
        owner: the user namespace that it belongs to.
        uid: from an id as the pipeline sees it to one of the owning user namespace; `gid` likewise.
        refuse: takes a mount and why it is not carried.
    """

    owner: int
    uid: Callable[[int], int | None]
    gid: Callable[[int], int | None]
    refuse: Callable[[Mount, str], None]

    def check(self, mount: Mount) -> None:
        """Refuse options of the mount that are not known."""
        for option in mount.options:
            if option not in _FLAGS and option != _IDMAPPED:
                self.refuse(mount, f"has the option {os.fsdecode(option)}, which is not carried")

    def of(self, mount: Mount) -> Iterator[bytes]:
        """The options of the file system, ids as its owner knows them."""
        for option in mount.super_options:
            name, _, value = option.partition(b"=")
            if name in {b"uid", b"gid"} and name in MOUNTED_AGAIN[mount.kind]:
                yield self._id_option(mount, name, int(value))
            elif mount.kind == b"overlay" and name in _MODULE_DEFAULTS and self.owner:
                continue  # nobody may set it there, so it was not set
            elif name in MOUNTED_AGAIN[mount.kind] or (mount.kind == b"cgroup" and name not in _PASSED_OVER):
                yield option  # of a cgroup hierarchy its name and controllers say which it is
            elif mount.kind == b"cgroup2":
                continue  # they hold for all of the host
            elif option not in _PASSED_OVER and name not in _FROM_ROOT.get(mount.kind, ()):
                self.refuse(mount, f"has the option {os.fsdecode(option)}, which is not carried")

    def check_overlay(self, mount: Mount, sources: Sources) -> None:
        """Its layers must be where the options say, seen from where it is mounted again."""
        here = sources.earlier(mount)
        for option in mount.super_options:
            name, _, value = option.partition(b"=")
            for path in _layers(name, value):
                inside = not sources.prefix and any(path.startswith(m.point + b"/") for m in here)
                seen = sources.at(path) if inside else sources.outside(path)
                if not path.startswith(b"/") or not os.path.isdir(seen):
                    self.refuse(mount, f"has a layer {os.fsdecode(path)} that is not to be seen from outside")

    def _id_option(self, mount: Mount, name: bytes, seen: int) -> bytes:
        inner = (self.uid if name == b"uid" else self.gid)(seen)
        if inner is None:
            what = os.fsdecode(name)
            self.refuse(mount, f"belongs to {what} {seen}, which its user namespace does not map")
            return name + b"=0"
        return b"%s=%d" % (name, inner)


def _layers(name: bytes, value: bytes) -> list[bytes]:
    """The directories that an option of overlayfs names; a backslash takes a colon's meaning away."""
    if name == b"lowerdir":
        return [part.replace(b"\\:", b":") for part in re.split(rb"(?<!\\)::?", value)]
    return [value] if name in _LAYERS else []


def root_options(mount: Mount, root: Entry, owner: int) -> Iterator[bytes]:
    """What a tmpfs is mounted with so that its owner may change its root directory; filling does the rest.

    The permissions are those that it was mounted with before: mountinfo shows them whatever they have become.
    """
    yield from (option for option in mount.super_options if option.startswith(b"mode="))
    if owner:
        yield b"uid=%d" % root.uid.id
        yield b"gid=%d" % root.gid.id
