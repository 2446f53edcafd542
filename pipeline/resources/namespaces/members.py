"""Which process is in which namespaces: the other kinds than user, captured for a whole tree.

Namespaces are numbered over all kinds; the first seven are the external ones, which the
pipeline itself is in. pid namespaces form levels; whatever lies between a process and the
pipeline's own is part of the image.

Not carried yet, and refused by name: own network, cgroup and time namespaces; a pid
namespace that waits for its first process; members of a pid namespace that is not
below the pipeline's.

Sources: namespaces(7), pid_namespaces(7), ioctl_ns(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property

import msgspec

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id, Memberships, Namespace, NamespaceKind
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import names
from pipeline.resources.namespaces.mounts_view import MountsView, PeerGroups, Surroundings
from pipeline.userns.capture import LiveForest, OutsideError, outside_blocker

KINDS: tuple[NamespaceKind, ...] = ("pid", "mnt", "uts", "ipc", "net", "cgroup", "time")
FLAGS = {
    "pid": CLONE.NEWPID, "mnt": CLONE.NEWNS, "uts": CLONE.NEWUTS, "ipc": CLONE.NEWIPC,
    "net": CLONE.NEWNET, "cgroup": CLONE.NEWCGROUP, "time": CLONE.NEWTIME, "user": CLONE.NEWUSER,
}  # fmt: skip
_REFUSED = {
    "net": "start it in the host's network namespace (without --net)",
    "cgroup": "start it without a cgroup namespace of its own",
    "time": "start it without a time namespace of its own",
}
_LINKS = (*KINDS, "pid_for_children", "time_for_children")


def check_visible(pid: HostPid) -> Iterator[Blocker]:
    """Whether the pipeline may look at a process at all.

    Raises:
        procfs.ProcessGone: it has ended.
    """
    try:
        nsfs.keys(pid)
    except PermissionError:
        yield Blocker(
            f"pid {pid}",
            "may not be looked at: it runs for another user, has raised its privileges, "
            "or is in a user namespace that is not below the pipeline's own",
            "run the pipeline as its user, or as root in the user namespace that contains the whole tree",
        )


class NamespaceCapture:
    """The namespaces of a tree; blockers are collected, not raised.

    Args:
        pids: living processes of the tree, parents before children.
        forest: the user namespaces, extended with those that own others.
        privileged: whether the pipeline may join namespaces without their user namespace first.
    """

    def __init__(self, pids: Sequence[HostPid], forest: LiveForest, privileged: bool) -> None:
        self._forest = forest
        self._privileged = privileged
        self.blockers: list[Blocker] = []
        self.namespaces: list[Namespace] = []
        self.memberships: dict[HostPid, Memberships] = {}
        self._numbers: dict[tuple[str, NamespaceKey], int] = {}
        self._first_seen: dict[int, HostPid] = {}
        own = nsfs.keys(HostPid(os.getpid()))
        for kind in KINDS:
            index = len(self.namespaces)
            self.namespaces.append(Namespace(index=index, kind=kind, external=True))
            if kind in own:
                self._numbers[kind, own[kind]] = index
        forest.learn_members(pids)
        for pid in pids:
            with suppress(procfs.ProcessGone):
                self._capture(pid)
        for namespace in [n for n in self.namespaces if not n.external]:
            self._look_inside(namespace)

    def external(self, kind: NamespaceKind) -> int:
        """The number of the external namespace of a kind."""
        return KINDS.index(kind)

    def _capture(self, pid: HostPid) -> None:
        try:
            user = self._user_of(pid)
        except OutsideError:
            self.blockers.append(outside_blocker(pid, "process"))
            return
        keys = nsfs.keys(pid)
        found: dict[str, int] = {}
        for link in _LINKS:
            kind = link.removesuffix("_for_children")
            if link not in keys:
                if link == "pid_for_children":
                    self.blockers.append(
                        Blocker(
                            f"pid {pid}",
                            "has made a pid namespace for its children that has no first process yet",
                            "let it fork once",
                        )
                    )
                found[link] = self.external(kind)  # type: ignore[arg-type]
                continue
            found[link] = self._number(pid, kind, link, keys[link])
        self.memberships[pid] = Memberships(user=user, **found)

    def _user_of(self, pid: HostPid) -> int:
        fd = nsfs.open_namespace(pid, "user")
        try:
            return self._forest.number_of(fd)
        finally:
            os.close(fd)

    def _number(self, pid: HostPid, kind: str, link: str, key: NamespaceKey) -> int:
        if (kind, key) in self._numbers:
            return self._numbers[kind, key]
        fd = nsfs.open_namespace(pid, link)
        try:
            return self._register(pid, kind, fd)
        finally:
            os.close(fd)

    def _register(self, pid: HostPid, kind: str, fd: LocalFd) -> int:
        key = nsfs.key_of(fd)
        if (kind, key) in self._numbers:
            return self._numbers[kind, key]
        parent = None
        if kind == "pid":
            parent = self._parent_of(pid, fd)
        owner = self._owner_of(pid, kind, fd)
        index = len(self.namespaces)
        self._numbers[kind, key] = index
        self._first_seen[index] = pid
        self.namespaces.append(
            Namespace(index=index, kind=kind, external=False, owner=owner, parent=parent)  # type: ignore[arg-type]
        )
        if kind in _REFUSED:
            self.blockers.append(
                Blocker(
                    f"pid {pid}",
                    f"is in a {kind} namespace of its own, which is not carried yet",
                    _REFUSED[kind],
                )
            )
        return index

    def _parent_of(self, pid: HostPid, fd: LocalFd) -> int:
        try:
            above = nsfs.parent(fd)
        except PermissionError:
            self.blockers.append(Blocker(f"pid {pid}", "its pid namespace is not below the pipeline's own"))
            return self.external("pid")
        try:
            return self._register(pid, "pid", above)
        finally:
            os.close(above)

    def _owner_of(self, pid: HostPid, kind: str, fd: LocalFd) -> int:
        try:
            owner = nsfs.owner(fd)
        except PermissionError:
            self.blockers.append(outside_blocker(pid, f"{kind} namespace"))
            return 0
        try:
            return self._forest.number_of(owner)
        except OutsideError:
            self.blockers.append(outside_blocker(pid, f"{kind} namespace"))
            return 0
        finally:
            os.close(owner)

    # -- what is inside ---------------------------------------------------------------

    def _look_inside(self, namespace: Namespace) -> None:
        if namespace.kind not in ("uts", "ipc", "mnt"):
            return
        pid = self._first_seen[namespace.index]
        try:
            with ExitStack() as fds:
                found = self._state(namespace, pid, self._way(namespace.index, fds))
        except procfs.ProcessGone:
            return
        except OSError as error:
            self.blockers.append(
                Blocker(
                    f"pid {pid}", f"its {namespace.kind} namespace cannot be looked into: {error.strerror}"
                )
            )
            return
        state = msgspec.to_builtins(found, builtin_types=(bytes,))
        self.namespaces[namespace.index] = msgspec.structs.replace(namespace, state=state)

    def _state(self, namespace: Namespace, pid: HostPid, way: names.Way) -> msgspec.Struct:
        if namespace.kind == "uts":
            return names.capture_uts(way)
        if namespace.kind == "ipc":
            state, blockers = names.capture_ipc(f"pid {pid}", way)
            self.blockers.extend(blockers)
            return state
        view = MountsView(self._unconfined(namespace.index, pid), self._surroundings(namespace.owner))
        self.blockers.extend(view.blockers)
        return view.state

    def _surroundings(self, owner: int) -> Surroundings:
        forest = self._forest.forest()
        return Surroundings(
            uid=lambda number: forest.number_in(Id(0, number), owner, "uid"),
            gid=lambda number: forest.number_in(Id(0, number), owner, "gid"),
            pid_namespace_at=self._pid_namespace_at,
            ipc_namespace_of=self._ipc_namespace_of,
            groups=self._peer_groups,
        )

    @cached_property
    def _peer_groups(self) -> PeerGroups:
        groups = PeerGroups()
        for namespace in self.namespaces:
            if namespace.kind == "mnt" and not namespace.external:
                groups.learn(mountinfo(self._unconfined(namespace.index, self._first_seen[namespace.index])))
        return groups

    def _way(self, index: int, fds: ExitStack) -> names.Way:
        """What a visitor joins to be in namespace `index`; the descriptors are closed by `fds`."""
        pid, kind = self._first_seen[index], self.namespaces[index].kind
        way = []
        for link in (kind,) if self._privileged else ("user", kind):
            fd = nsfs.open_namespace(pid, link)
            fds.callback(os.close, fd)
            way.append((fd, FLAGS[link]))
        return way

    def _ipc_namespace_of(self, device: int) -> int | None:
        """The ipc namespace of the tree whose mqueue file system has this st_dev."""
        for namespace in self.namespaces:
            if namespace.kind == "ipc" and not namespace.external:
                with ExitStack() as fds, suppress(OSError, procfs.ProcessGone):
                    if names.mqueue_device(self._way(namespace.index, fds)) == device:
                        return namespace.index
        return None

    def _unconfined(self, mntns: int, first: HostPid) -> HostPid:
        """A member of a mount namespace that has not changed its root directory, as far as there is one."""
        for pid, members in self.memberships.items():
            if members.mnt == mntns and procfs.read_link(pid, "root") == b"/":
                return pid
        return first

    def _pid_namespace_at(self, path: str) -> int | None:
        """The pid namespace that a mounted proc shows: that of its process 1."""
        with suppress(OSError):
            result = os.stat(f"{path}/1/ns/pid")
            number = self._numbers.get(("pid", NamespaceKey(result.st_dev, result.st_ino)))
            return number if number != self.external("pid") else None
        return None
