"""Control groups as the kernel shows them: who is where, and where the hierarchies are mounted.

A hierarchy has a name here: of version 2 the empty one, of version 1 its controllers (``cpu,cpuacct``) or
``name=systemd``. A path is one of /proc/PID/cgroup: it begins at the root of the *reader's* cgroup namespace, and
goes up with ``..`` where a process is outside of that.

Sources: cgroups(7), cgroup_namespaces(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

import msgspec

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.mountinfo import mountinfo

#: of version 2
UNIFIED = ""


def parse_places(content: bytes) -> dict[str, bytes]:
    """The path in every hierarchy, by its name, from the text of /proc/PID/cgroup.

    The path of a cgroup that was removed under a zombie ends with `` (deleted)``; such a place is left out.
    """
    found: dict[str, bytes] = {}
    for line in filter(None, content.split(b"\n")):
        _, name, path = line.split(b":", 2)
        if not path.endswith(b" (deleted)"):
            found[name.decode()] = path
    return found


def places(pid: HostPid, tid: int | None = None) -> dict[str, bytes]:
    """Where a process is, or one of its threads. Raises `procfs.ProcessGone`."""
    return parse_places(procfs.read_file(pid, "cgroup" if tid is None else f"task/{tid}/cgroup"))


def is_outside(path: bytes) -> bool:
    """Whether a path leads out of the reader's cgroup namespace."""
    return path == b"/.." or path.startswith(b"/../")


class Hierarchy(msgspec.Struct, frozen=True):
    """A mounted hierarchy: its `name`, where it is mounted, and the path of what is seen there."""

    name: str
    point: bytes
    root: bytes

    def directory(self, path: bytes) -> bytes | None:
        """The directory of the cgroup at a path; None where this mount does not show it."""
        if self.root == b"/":
            below = path
        elif path == self.root or path.startswith(self.root + b"/"):
            below = path[len(self.root) :]
        else:
            return None
        return self.point + (b"" if below == b"/" else below)


def hierarchies(names: Mapping[str, bytes]) -> dict[str, Hierarchy]:
    """Where the hierarchies of these names are mounted here; those that are not are left out.

    Args:
        names: as `places` gives them.
    """
    found: dict[str, Hierarchy] = {}
    mounts = [mount for mount in mountinfo(HostPid(os.getpid())) if mount.kind in {b"cgroup", b"cgroup2"}]
    for name in names:
        kind = b"cgroup2" if name == UNIFIED else b"cgroup"
        controllers = {part.encode() for part in name.split(",") if part}
        for mount in mounts:
            if mount.kind != kind or not controllers <= set(mount.super_options) or is_outside(mount.root):
                continue
            here = Hierarchy(name, mount.point, mount.root)
            if name not in found or len(here.root) < len(found[name].root):
                found[name] = here
    return found


def members(directory: bytes) -> list[int]:
    """Who is in the cgroup itself, not below: processes, or threads where it is a threaded one; 0 for a stranger."""
    try:
        return _numbers(directory + b"/cgroup.procs")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    return _numbers(directory + b"/cgroup.threads")


def _numbers(path: bytes) -> list[int]:
    with open(path, "rb") as file:
        return [int(word) for word in file.read().split()]


def children(directory: bytes) -> list[bytes]:
    """The directories of the cgroups below, sorted."""
    with os.scandir(directory) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
