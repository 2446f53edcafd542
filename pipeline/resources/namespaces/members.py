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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Memberships, Namespace, NamespaceKind
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.resources.cgroups.capture import CgroupCapture
from pipeline.resources.kinds import FdView
from pipeline.resources.namespaces import cgroups, clocks, names, posix_view
from pipeline.resources.namespaces.flags import FLAGS, KINDS
from pipeline.resources.namespaces.ipc import Semaphores
from pipeline.resources.namespaces.ipc_capture import IpcCapture
from pipeline.resources.namespaces.kept_networks import KeptNetworks
from pipeline.resources.namespaces.mounts_capture import MountsCapture, MountSeat
from pipeline.resources.namespaces.network_view import NetworkView
from pipeline.resources.namespaces.pids_view import PidsView
from pipeline.resources.namespaces.shown import Shown
from pipeline.userns.capture import LiveForest, OutsideError, outside_blocker
from pipeline.userns.externals import Externals, opened
from pipeline.userns.lodgers import Lodgers
from pipeline.userns.visit import Way, as_owner

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


class _Seat(msgspec.Struct, frozen=True):
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
        lodgers: sit in mount namespaces that nobody of the tree is in.
        externals: namespaces that are external instead of the pipeline's own.
        groups: the cgroups of the tree.
        kept: who is in its networks already.
    """

    def __init__(
        self,
        pids: Sequence[HostPid],
        forest: LiveForest,
        privileged: bool,
        lodgers: Lodgers,
        externals: Externals | None = None,
        groups: CgroupCapture | None = None,
        kept: KeptNetworks | None = None,
    ) -> None:
        self._forest = forest
        self._kept = kept or KeptNetworks(0)
        self._cgroups = groups or CgroupCapture(pids, set(pids).__contains__)
        self._privileged = privileged
        self._lodgers = lodgers
        self._blockers: list[Blocker] = []
        self._inside: dict[int, list[Blocker]] = {}
        self.namespaces: list[Namespace] = []
        self.memberships: dict[HostPid, Memberships] = {}
        #: to how many descriptors tun and tap devices are attached, by network and name
        self.attached: dict[tuple[int, bytes], int] = {}
        self._numbers: dict[tuple[str, NamespaceKey], int] = {}
        self._seats: dict[int, _Seat] = {}
        self._ipc = IpcCapture()
        self._queues: dict[int, int | None] = {}
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
        self._pids = PidsView(self.namespaces, self.memberships, self._key_of)
        self._blockers.extend(self._pids.without_first())
        self._look_inside_all()

    @property
    def blockers(self) -> list[Blocker]:
        """What stops the namespaces that are known by now from being carried."""
        return [*self._blockers, *(blocker for found in self._inside.values() for blocker in found)]

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
            way = self._way_to_network(netns, fds)
            return self._kept.socket(way, make) if way else make()

    def look_in_network(self, netns: int, look: Callable[[], bytes]) -> bytes:
        """See `CaptureScope.look_in_network`."""
        with ExitStack() as fds:
            way = self._way_to_network(netns, fds)
            return self._kept.look(way, look) if way else look()

    def _way_to_network(self, netns: int, fds: ExitStack) -> Way:
        """Empty where it is the pipeline's own."""
        if not self.namespaces[netns].external:
            return self._way(netns, fds)
        given = fds.enter_context(opened({k: p for k, p in self._externals.items() if k == "net"}))
        return [(given["net"], FLAGS["net"])] if given else []

    def own_network(self) -> int | None:
        """The number of the network namespace that the pipeline itself is in; None if it is not of the image."""
        found = os.stat("/proc/self/ns/net")
        return self._numbers.get(("net", NamespaceKey(found.st_dev, found.st_ino)))

    def _capture(self, pid: HostPid) -> None:
        try:
            user = self._user_of(pid)
        except OutsideError:
            self._blockers.append(outside_blocker(pid, "process"))
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

    def user_of_zombie(self, pid: HostPid) -> int | None:
        """The user namespace of a process that has ended: the only one of its namespaces that it keeps.

        Returns:
            None where it may not be looked at, or is not below the pipeline's own.
        """
        try:
            return self._user_of(pid)
        except (OutsideError, PermissionError, procfs.ProcessGone):
            return None

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
            self._blockers.append(
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
            self._blockers.append(outside_blocker(pid, f"{kind} namespace"))
            return 0
        try:
            return self._forest.number_of(owner)
        except OutsideError:
            self._blockers.append(outside_blocker(pid, f"{kind} namespace"))
            return 0
        finally:
            os.close(owner)

    # -- what is inside ---------------------------------------------------------------

    def _look_inside_all(self) -> None:
        """Look into what has not been looked into; that may hold further namespaces."""
        while new := [n for n in self.namespaces if not n.external and n.index not in self._inside]:
            if any(n.kind == "mnt" for n in new) and "_mounts" in self.__dict__:
                del (
                    self._mounts
                )  # all are looked at anew: they may be copies of one another, and share mounts
                new = [n for n in self.namespaces if n.kind == "mnt" and not n.external] + new
            for namespace in new:
                self._look_inside(namespace)

    def _look_inside(self, namespace: Namespace) -> None:
        blockers: list[Blocker] = []
        self._inside[namespace.index] = blockers
        if namespace.index not in self._seats:
            return
        pid = self._seats[namespace.index].pid
        try:
            with ExitStack() as fds:
                way = self._way(namespace.index, fds)
                found = self._state(namespace, self._seats[namespace.index], way, blockers.extend)
        except procfs.ProcessGone:
            return
        except OSError as error:
            raise_if_exhausted(error)
            blockers.append(
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

    def _state(
        self, namespace: Namespace, seat: _Seat, way: Way, refuse: Callable[[Iterable[Blocker]], None]
    ) -> msgspec.Struct | None:
        pid = seat.pid
        if namespace.kind == "pid" and seat.held:
            reason = f"holds, by {seat.held}, a pid namespace that no process of the tree is in"
            refuse([Blocker(f"pid {pid}", reason, "close or umount it")])
            return None
        if namespace.kind == "pid":
            state, found = self._pids.empty(namespace, pid)
            refuse(found)
            return state
        if namespace.kind == "time":
            return clocks.capture(way)
        if namespace.kind == "net":
            network = self._network(f"pid {pid}", namespace, way)
            refuse(network.blockers)
            self.attached |= {(namespace.index, name): count for name, count in network.attached.items()}
            return network.state
        if namespace.kind == "cgroup":
            members = [pid] if seat.held else self._members("cgroup", namespace.index)
            begins, found = cgroups.capture(members, way, self._cgroups)
            refuse(found)
            return begins
        if namespace.kind == "uts":
            return names.capture_uts(way)
        if namespace.kind == "ipc":
            forest = self._forest.forest()
            view = self._ipc.look(namespace.index, namespace.owner, pid, seat.open, forest, self._privileged)
            refuse(view.blockers)
            return view.state
        state_of_mounts, found = self._mounts.state(namespace.index)
        refuse(found)
        return state_of_mounts

    def _network(self, subject: str, namespace: Namespace, way: Way) -> NetworkView:
        forest = self._forest.forest()
        with ExitStack() as fds:
            return NetworkView(
                subject,
                way,
                self._networks(),
                namespace.index,
                self.external("net"),
                lambda one, kind: forest.innermost(one, namespace.owner, kind),
                as_owner(LocalFd(way[-1][0]), FLAGS["net"], namespace.owner != 0, fds),
                self._kept,
            )

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
        path = self._externals.get("net", "/proc/self/ns/net")
        return found | {self.external("net"): lambda: LocalFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))}

    def _shown(self) -> Shown:
        return Shown(
            own=lambda kind: [n.index for n in self.namespaces if n.kind == kind and not n.external],
            number_of=lambda kind, key: self._numbers.get((kind, key)),
            way=self._way,
            held=self._held_by_mount,
        )

    def queues_of(self, view: FdView) -> int | None:
        """The ipc namespace of an open POSIX message queue: the tree's or the external one; None for another."""
        device = view.stat.st_dev
        if device not in self._queues:
            found = self._shown().queues(device)
            if found is None and posix_view.is_here(view):
                found = self.external("ipc")
            self._queues[device] = found
        return self._queues[device]

    @cached_property
    def _mounts(self) -> MountsCapture:
        seats = {
            n.index: MountSeat(
                n.index,
                n.owner,
                self._who_sees(n.index, self._seats[n.index]),
                self._seats[n.index].open,
                f"pid {self._seats[n.index].pid}",
            )
            for n in self.namespaces
            if n.kind == "mnt" and not n.external
        }
        forest = self._forest.forest()
        return MountsCapture(seats, forest, self._shown(), lambda index: self.namespaces[index].owner)

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

    def _key_of(self, wanted: int) -> NamespaceKey:
        return next(key for (_, key), index in self._numbers.items() if index == wanted)

    def _who_sees(self, mntns: int, seat: _Seat) -> HostPid:
        """Somebody in a mount namespace who has not changed the root directory, as far as there is one."""
        if seat.held:
            with ExitStack() as fds:
                return self._lodgers.in_namespace(mntns, self._way(mntns, fds))
        for pid, members in self.memberships.items():
            if members.mnt == mntns and procfs.read_link(pid, "root") == b"/":
                return pid
        return seat.pid
