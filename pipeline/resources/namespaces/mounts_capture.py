"""The mount namespaces of a tree: which is a copy of which, what they have in common, and what their tmpfs hold.

Source: mount_namespaces(7).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker, passed_over
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id
from pipeline.kernel.mountinfo import Mount, mountinfo
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.namespaces import idmapped, tmpfs
from pipeline.resources.namespaces.idmapped import MountIdmap
from pipeline.resources.namespaces.mounts import SHOWN, MountState
from pipeline.resources.namespaces.mounts_compare import Comparison, PeerGroups, compare, within
from pipeline.resources.namespaces.mounts_view import NAMELESS, MountsView, Surroundings
from pipeline.resources.namespaces.shown import Shown
from pipeline.userns.forest import Forest
from pipeline.userns.visit import Way, as_owner, fetch, visit


class MountSeat(msgspec.Struct, frozen=True):
    """A mount namespace of the tree.

    `index`, `owner`: of its record. `pid`: a process in it, if possible one whose root is that of the namespace.
    `open`: opens it; raises ProcessGone. `subject`: whom it is refused to, in words.
    """

    index: int
    owner: int
    pid: HostPid
    open: Callable[[], LocalFd]
    subject: str


class MountsCapture:
    """All mount namespaces of a tree.

    Args:
        seats: of the tree, by number.
        forest: its user namespaces.
        shown: which namespaces mounts show.
        owner_of: the `UserNamespace` index that owns a namespace of the tree.

    Raises:
        ProcessGone: a process that is in one has ended.
    """

    def __init__(
        self,
        seats: Mapping[int, MountSeat],
        forest: Forest,
        shown: Shown,
        owner_of: Callable[[int], int],
    ) -> None:
        self._seats = seats
        self._forest = forest
        self._shown = shown
        self._owner_of = owner_of
        self._states: dict[int, MountState] = {}
        #: every tmpfs that is filled again, by namespace and mount id
        self._listed: dict[int, dict[int, tuple[tmpfs.Place, list[tmpfs.Entry]]]] = defaultdict(dict)
        self._outside = mountinfo(HostPid(os.getpid()))
        self._mounts = {index: mountinfo(seat.pid) for index, seat in seats.items()}
        self._copies: dict[int, tuple[int | None, Comparison]] = {}
        ordered = sorted(seats.values(), key=self._order)
        for place, seat in enumerate(ordered):
            self._copies[seat.index] = self._original(seat, ordered[:place])

    def _order(self, seat: MountSeat) -> tuple[int, int]:
        return len(list(self._forest.ancestors(seat.owner))), seat.index

    def _original(self, seat: MountSeat, earlier: Sequence[MountSeat]) -> tuple[int | None, Comparison]:
        """The namespace that `seat` is taken to be a copy of; None for the external one."""
        there = self._mounts[seat.index]
        best: tuple[int | None, Comparison] = None, compare(self._outside, there)
        for other in earlier:
            found = compare(self._mounts[other.index], there)
            # what came from a more privileged namespace cannot be unmounted
            possible = other.owner == seat.owner or not found.gone
            if not found.same_root or not possible or not self._forest.is_within(seat.owner, other.owner):
                continue
            now = (found.differences, -found.links)
            if not best[1].same_root or now < (best[1].differences, -best[1].links):
                best = other.index, found
        return best

    def state(self, index: int) -> tuple[MountState, list[Blocker]]:
        """What was done to a namespace since it was a copy."""
        base, comparison = self._copies[index]
        seat = self._seats[index]
        below = f"/proc/{self._seats[base].pid}/root" if base is not None else ""
        view = MountsView(seat.pid, seat.subject, comparison, below, self._surroundings(seat))
        self._states[index] = replace(view.state, base=base)
        return self._states[index], view.blockers

    def _surroundings(self, seat: MountSeat) -> Surroundings:
        forest, owner = self._forest, seat.owner
        return Surroundings(
            uid=lambda number: forest.number_in(Id(0, number), owner, "uid"),
            gid=lambda number: forest.number_in(Id(0, number), owner, "gid"),
            shown=self._shown,
            shown_by_kind=lambda mount: self._shown_by(seat, mount),
            pid_namespace_of=self._pid_namespaces_by_device.get,
            groups=self._peer_groups,
            instances={
                device: (number, maker == seat.index) for device, (number, maker) in self._instances.items()
            },
            tops=self._tops,
            list_tmpfs=lambda mount, covers: self._list_tmpfs(seat, mount, covers),
            idmap_of=lambda mount: self._idmap_of(seat, mount),
            owner=owner,
            index=seat.index,
        )

    def _shown_by(self, seat: MountSeat, mount: Mount) -> int | None:
        """The namespace that a mount shows, if who owns the mount namespace may mount what shows it."""
        match SHOWN[mount.kind]:
            case "ipc":
                found = self._shown.queues(mount.device)
            case "net":
                found = self._shown.network(mount.device)
            case _:
                found = self._shown.cgroups(seat.pid, mount)
        allowed = found is not None and self._forest.is_within(self._owner_of(found), seat.owner)
        return found if allowed else None

    @staticmethod
    def _idmap_of(seat: MountSeat, mount: Mount) -> MountIdmap:
        inside = seat.open()
        try:
            return idmapped.capture([(inside, CLONE.NEWNS)], mount.id)
        finally:
            os.close(inside)

    @cached_property
    def _peer_groups(self) -> PeerGroups:
        groups = PeerGroups()
        for index, (_, comparison) in self._copies.items():
            groups.learn(index, comparison)
        return groups

    @cached_property
    def _instances(self) -> dict[int, tuple[int, int]]:
        """File systems that several namespaces mount: st_dev to a number, and the namespace that does it.

        That is the one that belongs to the outermost user namespace; the others have it from there.
        """
        outside = {mount.device for mount in self._outside}
        shown: dict[int, list[MountSeat]] = defaultdict(list)
        for index, (_, comparison) in self._copies.items():
            for device in {m.device for m in comparison.added if m.kind in NAMELESS} - outside:
                shown[device].append(self._seats[index])
        several = {device: seats for device, seats in shown.items() if len(seats) > 1}
        return {
            device: (number, min(seats, key=self._order).index)
            for number, (device, seats) in enumerate(several.items(), start=1)
        }

    @cached_property
    def _tops(self) -> dict[int, bytes]:
        """The directory of a tmpfs that all its mounts show, or show a part of, by st_dev; as far as there is one.

        What lies beside or above it nobody can see: it becomes the root directory of the file system.
        """
        roots: dict[int, set[bytes]] = defaultdict(set)
        for _, comparison in self._copies.values():
            for mount in comparison.added:
                if mount.kind == b"tmpfs":
                    roots[mount.device].add(mount.root)
        tops = {device: min(found, key=len) for device, found in roots.items()}
        return {device: top for device, top in tops.items() if all(within(r, top) for r in roots[device])}

    @cached_property
    def _pid_namespaces_by_device(self) -> dict[int, int]:
        """Pid namespaces of the tree by the st_dev of their proc, as far as one is to be seen somewhere."""
        found: dict[int, int] = {}
        for index, mounts in self._mounts.items():
            for mount in mounts:
                if mount.kind == b"proc" and mount.root == b"/":
                    path = self._path(index, mount)
                    with passed_over():
                        number = self._shown.pids(path)
                        if number is not None:
                            found[os.stat(path).st_dev] = number
        return found

    def _path(self, index: int, mount: Mount) -> str:
        return f"/proc/{self._seats[index].pid}/root{os.fsdecode(mount.point)}"

    # -- what tmpfs hold ------------------------------------------------------------------

    @contextmanager
    def _way_into(self, seat: MountSeat) -> Iterator[Way]:
        """The way of a visitor that acts in a namespace with the ids of its owner."""
        with ExitStack() as fds:
            inside = seat.open()
            fds.callback(os.close, inside)
            yield as_owner(inside, CLONE.NEWNS, bool(seat.owner), fds)

    def _list_tmpfs(self, seat: MountSeat, mount: Mount, covers: list[bytes]) -> list[tmpfs.Entry]:
        known = self._listed[seat.index]
        if mount.id not in known:
            place = tmpfs.Place(mount.point, covers)
            known[mount.id] = place, self._list(seat, place)
        return known[mount.id][1]

    def _list(self, seat: MountSeat, place: tmpfs.Place) -> list[tmpfs.Entry]:
        forest, owner = self._forest, seat.owner
        with self._way_into(seat) as way:
            answer = visit(way, lambda: tmpfs.scan(place, owner, forest.maps_overflow(owner)))
        entries = tmpfs.unpack(answer)
        if owner:
            return entries
        return [
            replace(entry, uid=forest.at_a_root(entry.uid, "uid"), gid=forest.at_a_root(entry.gid, "gid"))
            for entry in entries
        ]

    def with_contents(self, content: Callable[[LocalFd, int], int]) -> Iterator[tuple[int, MountState]]:
        """Copy the bytes that every tmpfs of a frozen tree holds.

        Args:
            content: registers bytes: a descriptor, which stays the caller's, and their number; returns the space.

        Yields:
            The states, complete, by number.

        Raises:
            OSError: a file cannot be read, or memory is out.
        """
        for index, state in self._states.items():
            listed = iter(self._listed[index].values())  # in the order of the steps
            steps = []
            for step in state.steps:
                if step.what == "fill":
                    place, entries = next(listed)
                    step = replace(step, space=self._copied(self._seats[index], place, entries, content))
                steps.append(step)
            yield index, replace(state, steps=steps)

    def _copied(
        self,
        seat: MountSeat,
        place: tmpfs.Place,
        entries: Sequence[tmpfs.Entry],
        content: Callable[[LocalFd, int], int],
    ) -> int:
        size = tmpfs.content_bytes(entries)
        if not size:
            return 0
        with self._way_into(seat) as way:
            fd = fetch(way, lambda: tmpfs.pack(place, entries))
        try:
            return content(fd, size)
        finally:
            os.close(fd)
