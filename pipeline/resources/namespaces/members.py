"""Which process is in which namespaces: the other kinds than user, captured for a whole tree.

Namespaces are numbered over all kinds; the first seven are the external ones, which the
pipeline itself is in. pid namespaces form levels; whatever lies between a process and the
pipeline's own is part of the image.

A namespace that nobody of the tree is in may be held by a descriptor: it is carried, too, where
that can be looked into from outside.

Refused by name: members of a pid namespace that is not below the pipeline's, or whose first
process is not part of the tree.

Sources: namespaces(7), pid_namespaces(7), ioctl_ns(2).
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Memberships, Namespace, NamespaceKind
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import cgroups, clocks, names
from pipeline.resources.namespaces.ipc import Semaphores
from pipeline.resources.namespaces.ipc_capture import IpcCapture
from pipeline.resources.namespaces.mounts_capture import MountsCapture, MountSeat
from pipeline.resources.namespaces.network_view import NetworkView
from pipeline.resources.namespaces.pids import PidState
from pipeline.resources.namespaces.shown import Shown
from pipeline.userns.capture import LiveForest, OutsideError, outside_blocker
from pipeline.userns.externals import Externals, opened
from pipeline.userns.visit import Way, as_owner, fetch

KINDS: tuple[NamespaceKind, ...] = ("pid", "mnt", "uts", "ipc", "net", "cgroup", "time")
FLAGS = {
    "pid": CLONE.NEWPID, "mnt": CLONE.NEWNS, "uts": CLONE.NEWUTS, "ipc": CLONE.NEWIPC,
    "net": CLONE.NEWNET, "cgroup": CLONE.NEWCGROUP, "time": CLONE.NEWTIME, "user": CLONE.NEWUSER,
}  # fmt: skip
#: opens the network namespace of a socket (include/uapi/linux/sockios.h)
_SIOCGSKNS = 0x894C
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


def _kind_of(namespace: LocalFd) -> str:
    flag = nsfs.kind_of(namespace)
    return next(name for name, known in FLAGS.items() if known == flag)


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where a namespace was seen first: by a link of `pid` below /proc, which opens it."""

    pid: HostPid
    path: str
    #: nobody of the tree needs to be in the namespace: the link is a descriptor or a mount
    held: str = ""

    def open(self) -> LocalFd:
        """Open it; the caller owns the result. ProcessGone: it is not there any more."""
        try:
            return LocalFd(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except (FileNotFoundError, ProcessLookupError):
            raise procfs.ProcessGone(self.pid) from None


class NamespaceCapture:
    """The namespaces of a tree; blockers are collected, not raised.

    Args:
        pids: living processes of the tree, parents before children.
        forest: the user namespaces, extended with those that own others.
        privileged: whether the pipeline may join namespaces without their user namespace first.
        externals: namespaces that are external instead of the pipeline's own.
    """

    def __init__(
        self,
        pids: Sequence[HostPid],
        forest: LiveForest,
        privileged: bool,
        externals: Externals | None = None,
    ) -> None:
        self._forest = forest
        self._privileged = privileged
        self.blockers: list[Blocker] = []
        self.namespaces: list[Namespace] = []
        self.memberships: dict[HostPid, Memberships] = {}
        self._numbers: dict[tuple[str, NamespaceKey], int] = {}
        self._seats: dict[int, _Seat] = {}
        self._looked_into: set[int] = set()
        self._ipc = IpcCapture()
        self._externals = externals or {}
        own = nsfs.keys(HostPid(os.getpid()))
        with opened(self._externals) as fds:
            own |= {kind: nsfs.key_of(fd) for kind, fd in fds.items()}
        for kind in KINDS:
            index = len(self.namespaces)
            self.namespaces.append(Namespace(index=index, kind=kind, external=True))
            if kind in own:
                self._numbers[kind, own[kind]] = index
        forest.learn_members(pids)
        for pid in pids:
            with suppress(procfs.ProcessGone):
                self._capture(pid)
        self._check_first_processes()
        self._look_inside_all()

    def number_of(self, local: LocalFd, pid: HostPid, fd: int) -> tuple[str, int] | None:
        """The kind and number of the namespace behind an open namespace file of the tree.

        A user namespace is known by its `UserNamespace` index, any other by its `Namespace` index. One that
        nobody of the tree is in becomes part of the tree, too.

        Args:
            local: a duplicate of descriptor `fd` of process `pid`.

        Returns:
            None where it is not the tree's: outside of the pipeline's own user namespace.
        """
        found = self._number_behind(_Seat(pid, f"/proc/{pid}/fd/{fd}", held="a descriptor"), local)
        self._look_inside_all()
        return found

    def _number_behind(self, seat: _Seat, local: LocalFd) -> tuple[str, int] | None:
        """Kind and number of a namespace that may be held only; None where it is not the tree's."""
        kind = _kind_of(local)
        if kind == "user":
            try:
                return kind, self._forest.number_of(local)
            except OutsideError:
                return None
        return kind, self._register(seat, kind, local)

    def _held_by_mount(self, pid: HostPid, point: bytes, only_known: bool) -> tuple[str, int] | None:
        """Kind and number of the namespace whose file is mounted at a point; see `Shown.held`."""
        seat = _Seat(pid, f"/proc/{pid}/root{os.fsdecode(point)}", held=f"the mount {os.fsdecode(point)}")
        local = seat.open()
        try:
            kind = _kind_of(local)
            if only_known and kind != "user" and (kind, nsfs.key_of(local)) not in self._numbers:
                return None
            return self._number_behind(seat, local)
        finally:
            os.close(local)

    def external(self, kind: NamespaceKind) -> int:
        """The number of the external namespace of a kind."""
        return KINDS.index(kind)

    def network_of(self, local: LocalFd) -> int | None:
        """The network namespace of a socket; None if nobody of the tree is in it."""
        try:
            fd = LocalFd(fcntl.ioctl(local, _SIOCGSKNS))
        except PermissionError:
            return None
        try:
            return self._numbers.get(("net", nsfs.key_of(fd)))
        finally:
            os.close(fd)

    def in_network(self, netns: int, make: Callable[[], socket.socket]) -> socket.socket:
        """Make a socket in a network namespace of the tree or the external one; the caller owns it."""
        with ExitStack() as fds:
            if self.namespaces[netns].external:
                given = fds.enter_context(opened({k: p for k, p in self._externals.items() if k == "net"}))
                way = [(given["net"], FLAGS["net"])] if given else []
                return socket.socket(fileno=fetch(way, lambda: make().detach())) if way else make()
            return socket.socket(fileno=fetch(self._way(netns, fds), lambda: make().detach()))

    def own_network(self) -> int | None:
        """The number of the network namespace that the pipeline itself is in; None if it is not of the image."""
        found = os.stat("/proc/self/ns/net")
        return self._numbers.get(("net", NamespaceKey(found.st_dev, found.st_ino)))

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
                unborn = link == "pid_for_children"
                found[link] = self._unborn(user, found["pid"]) if unborn else self.external(kind)  # type: ignore[arg-type]
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
        seat = _Seat(pid, f"/proc/{pid}/ns/{link}")
        fd = seat.open()
        try:
            return self._register(seat, kind, fd)
        finally:
            os.close(fd)

    def _unborn(self, user: int, parent: int) -> int:
        """A pid namespace that waits for its first process. The kernel does not show it to anybody.

        It is taken to be owned by the user namespace of who made it, as `unshare -U -p` does.
        """
        index = len(self.namespaces)
        self.namespaces.append(Namespace(index=index, kind="pid", external=False, owner=user, parent=parent))
        return index

    def _register(self, seat: _Seat, kind: str, fd: LocalFd) -> int:
        pid = seat.pid
        key = nsfs.key_of(fd)
        if (kind, key) in self._numbers:
            return self._numbers[kind, key]
        parent = None
        if kind == "pid":
            parent = self._parent_of(seat, fd)
        owner = self._owner_of(pid, kind, fd)
        index = len(self.namespaces)
        self._numbers[kind, key] = index
        self._seats[index] = seat
        self.namespaces.append(
            Namespace(index=index, kind=kind, external=False, owner=owner, parent=parent)  # type: ignore[arg-type]
        )
        return index

    def _parent_of(self, seat: _Seat, fd: LocalFd) -> int:
        try:
            above = nsfs.parent(fd)
        except PermissionError:
            self.blockers.append(
                Blocker(f"pid {seat.pid}", "its pid namespace is not below the pipeline's own")
            )
            return self.external("pid")
        try:
            return self._register(seat, "pid", above)
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

    def _look_inside_all(self) -> None:
        """Look into what has not been looked into; that may hold further namespaces."""
        while new := [n for n in self.namespaces if not n.external and n.index not in self._looked_into]:
            for namespace in new:
                self._looked_into.add(namespace.index)
                self._look_inside(namespace)

    def _look_inside(self, namespace: Namespace) -> None:
        if namespace.index not in self._seats:
            return
        pid = self._seats[namespace.index].pid
        try:
            with ExitStack() as fds:
                found = self._state(namespace, self._seats[namespace.index], self._way(namespace.index, fds))
        except procfs.ProcessGone:
            return
        except OSError as error:
            self.blockers.append(
                Blocker(
                    f"pid {pid}", f"its {namespace.kind} namespace cannot be looked into: {error.strerror}"
                )
            )
            return
        if found is not None:
            self._keep(namespace, found)

    def _keep(self, namespace: Namespace, found: msgspec.Struct) -> None:
        state = msgspec.to_builtins(found, builtin_types=(bytes,))
        self.namespaces[namespace.index] = replace(namespace, state=state)

    def _state(self, namespace: Namespace, seat: _Seat, way: Way) -> msgspec.Struct | None:
        pid = seat.pid
        if namespace.kind in ("mnt", "pid", "cgroup") and seat.held:
            self.blockers.append(
                Blocker(
                    f"pid {pid}",
                    f"holds, by {seat.held}, a {namespace.kind} namespace that no process of the tree is in",
                    "close or umount it",
                )
            )
            return None
        if namespace.kind == "pid":
            return self._state_of_pids(namespace, seat)
        if namespace.kind == "time":
            return clocks.capture(way)
        if namespace.kind == "net":
            network = NetworkView(f"pid {pid}", way, self._networks(), namespace.index, self.external("net"))
            self.blockers.extend(network.blockers)
            return network.state
        if namespace.kind == "cgroup":
            self.blockers.extend(cgroups.check(self._members("cgroup", namespace.index), way))
            return None
        if namespace.kind == "uts":
            return names.capture_uts(way)
        if namespace.kind == "ipc":
            forest = self._forest.forest()
            view = self._ipc.look(namespace.index, namespace.owner, pid, seat.open, forest)
            self.blockers.extend(view.blockers)
            return view.state
        state_of_mounts, found = self._mounts.state(namespace.index)
        self.blockers.extend(found)
        return state_of_mounts

    def semaphores(self, pid: HostPid) -> Sequence[Semaphores]:
        """The semaphore sets of the ipc namespace of a process, if that is the tree's."""
        return self._ipc.semaphores(self.memberships[pid].ipc)

    def segment(self, pid: HostPid, identifier: int) -> int:
        """The space of the segment that a mapping of a process shows; see `IpcCapture.segment`."""
        return self._ipc.segment(self.memberships[pid].ipc, identifier)

    def attachment_blockers(self) -> Iterator[Blocker]:
        """See `IpcCapture.attachment_blockers`."""
        return self._ipc.attachment_blockers()

    def _networks(self) -> dict[int, Callable[[], LocalFd]]:
        """How to open each network namespace, the external one too."""
        found: dict[int, Callable[[], LocalFd]] = {
            namespace.index: self._seats[namespace.index].open
            for namespace in self.namespaces
            if namespace.kind == "net" and not namespace.external
        }
        return found | {self.external("net"): lambda: nsfs.open_namespace(HostPid(os.getpid()), "net")}

    @cached_property
    def _mounts(self) -> MountsCapture:
        seats = {
            n.index: MountSeat(
                n.index,
                n.owner,
                self._unconfined(n.index, self._seats[n.index].pid),
                self._seats[n.index].open,
            )
            for n in self.namespaces
            if n.kind == "mnt" and not n.external and not self._seats[n.index].held
        }
        forest = self._forest.forest()
        shown = Shown(
            own=lambda kind: [n.index for n in self.namespaces if n.kind == kind and not n.external],
            number_of=lambda kind, key: self._numbers.get((kind, key)),
            way=self._way,
            held=self._held_by_mount,
        )
        return MountsCapture(seats, forest, shown, lambda index: self.namespaces[index].owner)

    def take_contents(self, content: Callable[[LocalFd, int], int]) -> None:
        """Copy the bytes that segments and tmpfs of a frozen tree hold.

        Args:
            content: registers bytes: a descriptor, which stays the caller's, and their number; returns the space.

        Raises:
            OSError: something cannot be read, or memory is out.
        """
        for index, objects in self._ipc.with_contents(self._way, content):
            self._keep(self.namespaces[index], objects)
        if any(n.kind == "mnt" and not n.external for n in self.namespaces):
            for index, mounts in self._mounts.with_contents(content):
                self._keep(self.namespaces[index], mounts)

    def _way(self, index: int, fds: ExitStack) -> Way:
        """What a visitor joins to be in namespace `index`; the descriptors are closed by `fds`."""
        fd = self._seats[index].open()
        fds.callback(os.close, fd)
        return as_owner(fd, FLAGS[self.namespaces[index].kind], not self._privileged, fds)

    def _members(self, kind: str, index: int) -> list[HostPid]:
        """The processes of the tree that are in a namespace."""
        return [pid for pid, members in self.memberships.items() if getattr(members, kind) == index]

    # -- pid namespaces -----------------------------------------------------------------

    def _check_first_processes(self) -> None:
        """A pid namespace can only be made again together with its first process."""
        for namespace in self.namespaces:
            members = self._members("pid", namespace.index)
            if namespace.kind != "pid" or namespace.external or not members:
                continue
            depth = len(self._levels(namespace.index))
            firsts = []
            for pid in members:
                with suppress(procfs.ProcessGone):
                    firsts.append(procfs.status(pid).ns_pid[depth - 1 :] == (1,))
            if not any(firsts):
                first = self._outer_first(namespace.index, depth)
                self.blockers.append(
                    Blocker(
                        f"pid {members[0]}",
                        "is in a pid namespace whose first process is not part of the tree",
                        f"give that one: --pid {first}" if first else "give a tree that holds all of it",
                    )
                )

    def _outer_first(self, pidns: int, depth: int) -> HostPid | None:
        """The first process of a pid namespace, which is not of the tree."""
        key = next(key for (_, key), index in self._numbers.items() if index == pidns)
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError, procfs.ProcessGone):
                    pid = HostPid(int(name))
                    if nsfs.keys(pid).get("pid") == key and procfs.status(pid).ns_pid[depth - 1 :] == (1,):
                        return pid
        return None

    def _levels(self, pidns: int) -> list[int]:
        levels: list[int] = []
        at: int | None = pidns
        while at is not None:
            levels.append(at)
            at = self.namespaces[at].parent
        return levels

    def _state_of_pids(self, namespace: Namespace, seat: _Seat) -> PidState | None:
        """A pid namespace in which nobody lives: all have ended, or they are not of the tree."""
        if self._members("pid", namespace.index) or any(n.parent == namespace.index for n in self.namespaces):
            return None
        if namespace.owner != self.memberships[seat.pid].user:
            self.blockers.append(
                Blocker(
                    f"pid {seat.pid}",
                    "forks into a pid namespace that has ended, or that others live in, and that a user namespace "
                    "further out owns",
                    "end it",
                )
            )
            return None
        key = next(key for key, index in self._numbers.items() if index == namespace.index)[1]
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError, procfs.ProcessGone):
                    if nsfs.keys(HostPid(int(name))).get("pid") == key:
                        self.blockers.append(
                            Blocker(
                                f"pid {seat.pid}",
                                f"forks into a pid namespace of others, such as pid {name}",
                                "give the pid of a tree that holds the whole pid namespace",
                            )
                        )
                        return None
        return PidState(ended=True)

    def _unconfined(self, mntns: int, first: HostPid) -> HostPid:
        """A member of a mount namespace that has not changed its root directory, as far as there is one."""
        for pid, members in self.memberships.items():
            if members.mnt == mntns and procfs.read_link(pid, "root") == b"/":
                return pid
        return first
