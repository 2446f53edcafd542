"""Which namespace a mount shows.

A proc shows a pid namespace, an mqueue an ipc namespace, a sysfs a network, a cgroup hierarchy the part of it that a
cgroup namespace begins at, a namespace file (nsfs) a namespace of any kind. The kernel says it of none of them in
words. A proc has a process 1; of mqueue and sysfs there is one file system for each namespace, so a visitor that mounts
it there tells which; seen from a cgroup namespace, what begins at its root is called `/`.

Sources: namespaces(7), mq_overview(7), cgroup_namespaces(7); fs/sysfs/mount.c, cgroup_show_path in kernel/cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import msgspec

from pipeline.errors import passed_over
from pipeline.ids import HostPid
from pipeline.image.schema import NamespaceKind
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.mountinfo import Mount, parse_mountinfo
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import CLONE, syscall, unshare
from pipeline.resources.namespaces import posix_view
from pipeline.userns.visit import Way, visit

_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 6


class Shown(msgspec.Struct, frozen=True):
    """Finds the namespace of the tree behind a mount; the answers are `Namespace` indexes, None where it is not one.

    Args:
        own: the namespaces of the tree of a kind, by index.
        number_of: the number of a namespace, the external one's too; None if it is not known.
        way: what a visitor joins to be in a namespace; opened descriptors are closed by the stack.
        held: of the namespace whose file a process sees at a path, its kind and its number, which is a `UserNamespace`
            index for kind `user`. It becomes part of the tree, unless only those that are known already are asked for.
            None where it is not the tree's.
    """

    own: Callable[[NamespaceKind], Iterable[int]]
    number_of: Callable[[str, NamespaceKey], int | None]
    way: Callable[[int, ExitStack], Way]
    held: Callable[[HostPid, bytes, bool], tuple[str, int] | None]
    #: where the mounts that a process sees begin, seen from a cgroup namespace: one visit tells of all
    _roots: dict[tuple[int, HostPid], dict[int, bytes]] = msgspec.field(default_factory=dict)

    def pids(self, path: str) -> int | None:
        """The pid namespace that the proc at a path shows: that of its process 1."""
        with suppress(OSError):
            result = os.stat(f"{path}/1/ns/pid")
            return self._ours("pid", NamespaceKey(result.st_dev, result.st_ino))
        return None

    def queues(self, device: int) -> int | None:
        """The ipc namespace whose message queues have this st_dev."""
        return self._first("ipc", lambda _, way: posix_view.mqueue_device(way) == device)

    def network(self, device: int) -> int | None:
        """The network that the sysfs with this st_dev shows."""
        return self._first("net", lambda _, way: _sysfs_device(way) == device)

    def cgroups(self, pid: HostPid, mount: Mount) -> int | None:
        """A cgroup namespace at whose root a mount, which `pid` sees, begins."""

        def begins_there(index: int, way: Way) -> bool:
            if (index, pid) not in self._roots:
                text = visit(way, lambda: procfs.read_file(pid, "mountinfo"))
                self._roots[index, pid] = {one.id: one.root for one in parse_mountinfo(text)}
            return self._roots[index, pid].get(mount.id) == b"/"

        return self._first("cgroup", begins_there)

    def _ours(self, kind: NamespaceKind, key: NamespaceKey) -> int | None:
        number = self.number_of(kind, key)
        return number if number is not None and number in self.own(kind) else None

    def _first(self, kind: NamespaceKind, is_it: Callable[[int, Way], bool]) -> int | None:
        """The first namespace of a kind that a visitor says it is; one that cannot be visited is not."""
        for index in self.own(kind):
            with ExitStack() as fds, passed_over(), suppress(procfs.ProcessGone):
                if is_it(index, self.way(index, fds)):
                    return index
        return None


def _sysfs_device(way: Way) -> int:
    """st_dev of the sysfs of a network namespace."""

    def look() -> bytes:
        unshare(CLONE.NEWNS)  # mounting wants a mount namespace of the same owner
        with ExitStack() as fds:  # a visitor that is a thread shares them with us
            context = syscall(NR.fsopen, b"sysfs\0", _CLOEXEC)
            fds.callback(os.close, context)
            syscall(NR.fsconfig, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            made = syscall(NR.fsmount, context, _CLOEXEC, 0)
            fds.callback(os.close, made)
            return b"%d" % os.fstat(made).st_dev

    return int(visit(way, look))
