"""Where the root of a mount is to be seen elsewhere: what a bind mount is made from.

In the namespace that the one of the mount is a copy of, or on a mount that came before it in its own. A path only
counts if it leads to the same directory or file when it is tried.

Source: mount(2) on MS_BIND, proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec.structs import replace

from pipeline.ids import HostPid
from pipeline.kernel.mountinfo import Mount
from pipeline.resources.namespaces.mounts import RECURSIVE
from pipeline.resources.namespaces.mounts_compare import Comparison, key, within


class Sources:
    """Where mounts of one namespace can be bound from.

    Args:
        pid: a process in the namespace whose root is the namespace's root.
        comparison: with the namespace that it is taken to be a copy of.
        below: a path to the root of that one; empty for the pipeline's own.
        added: the mounts that are to be made, in order.
    """

    def __init__(self, pid: HostPid, comparison: Comparison, below: str, added: Sequence[Mount]) -> None:
        self._pid = pid
        self._below = below
        self._own = comparison.original
        self._gone = {mount.id for mount in comparison.gone}
        self._added = added
        #: where the root of this namespace is in the other one, if it is another one
        self.prefix = b""
        #: mounts, by id, that are made together with the one they lie on
        self.came_along: set[int] = set()
        #: of which mount of the other namespace a mount is a copy, by id
        self.copied: dict[int, Mount] = {}
        self._used: set[tuple[bytes, bool]] = set()

    def begin_below(self, place: bytes) -> None:
        """From now on the root of this namespace is at `place` in the other one."""
        self.prefix = place
        self.came_along.clear()
        self._used.clear()

    def needs(self, place: bytes) -> bool:
        """Whether a directory of the other namespace is shown by a mount that was looked for, or lies below one."""
        return any(
            within(source, place) or (recursive and within(place, source)) for source, recursive in self._used
        )

    def at(self, point: bytes) -> str:
        """A path to a point of the namespace."""
        return f"/proc/{self._pid}/root{os.fsdecode(point)}"

    def outside(self, path: bytes) -> str:
        """A path to what `path` is in the namespace that this one is a copy of."""
        return self._below + os.fsdecode(path)

    def is_outside(self, mount: Mount) -> bool:
        """Whether the other namespace shows this file system, somewhere."""
        return any(mount.device == other.device for other in self._own)

    def is_outside_root(self, mount: Mount) -> bool:
        """Whether the other namespace has a mount with this root, somewhere."""
        return any((mount.device, mount.root) == (other.device, other.root) for other in self._own)

    def earlier(self, mount: Mount) -> Sequence[Mount]:
        """The mounts that were added before."""
        return self._added[: self._added.index(mount)]

    def covers(self, mount: Mount) -> list[bytes]:
        """Where later mounts lie on `mount` or on a directory above it; the last one first."""
        point = mount.point
        later = self._added[self._added.index(mount) + 1 :]
        return [m.point for m in reversed(later) if within(point, m.point)]

    def whole(self, mount: Mount, source: bytes) -> int:
        """MS_REC if `mount` shows `source` of the other namespace with all mounts below it, which come along.

        A less privileged namespace may not bind a directory without the mounts that lie on it: they are locked.
        """
        below = [other for other in self._own if other.point.startswith(source.rstrip(b"/") + b"/")]
        later = self._added[self._added.index(mount) + 1 :]
        found = []
        for other in below:
            point = mount.point.rstrip(b"/") + other.point[len(source.rstrip(b"/")) :]
            wanted = (point, other.root, other.device, other.kind)
            found.append(next((m for m in later if key(m) == wanted and m.id not in self.came_along), None))
        if not found or None in found:
            return 0
        for each, other in zip(found, below, strict=True):
            if each is not None:
                self.came_along.add(each.id)
                self.copied[each.id] = other
        self._used.add((source, True))
        return RECURSIVE

    def of(self, mount: Mount) -> bytes | None:
        """Where the root of `mount` was to be seen when it was made; None where that is not sure."""
        try:
            wanted = os.stat(self.at(mount.point))
        except OSError:
            return None
        earlier = self.earlier(mount)
        here = (
            [replace(other, point=self.prefix + other.point) for other in earlier] if self.prefix else earlier
        )
        places = [(b"", other, here) for other in self._own if other.id not in self._gone]
        places += [(self.prefix, other, earlier[index + 1 :]) for index, other in enumerate(earlier)]
        for number, (prefix, other, between) in enumerate(places):
            source = _path_on(other, mount)
            if source is None or _cover(between, source):
                continue
            inside = number >= len(places) - len(earlier)
            path = self.at(source) if inside else self.outside(source)
            if _shows(path, wanted) or (wanted.st_dev != mount.device and _is_on(path, mount.device)):
                if not inside:
                    self._used.add((source, False))
                    self.copied[mount.id] = other
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
    return any(within(path, mount.point) for mount in mounts)


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
