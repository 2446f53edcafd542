"""Who makes the System V objects of the ipc namespaces of a tree again.

A visitor with the ids of the user namespace that owns the ipc namespace: it may set the limits, and make objects
of whoever has a number there. An object of somebody who has none there was made from outside, and is again: by a
visitor in the user namespace of the restorer.

Source: sysvipc(7), ipc_namespaces(7); ipc/ipc_sysctl.c (ipc_permissions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Id
from pipeline.resources.namespaces import ipc
from pipeline.resources.namespaces.ipc import IpcState, Numbers, Permissions, Translate
from pipeline.resources.namespaces.seats import Seats
from pipeline.userns.forest import Forest, IdKind
from pipeline.userns.visit import become, visit

#: what an id of the image is called in one of its user namespaces (0: here); None where it has no number there
Number = Callable[[Id, int, IdKind], int | None]


class IpcMaking:
    """What the ipc namespaces of a tree hold.

    Args:
        seats: of the namespaces.
        forest: for the ids to make things with.
        number: translates ids, with the policy for those that have no place.
    """

    def __init__(self, seats: Seats, forest: Forest, number: Number) -> None:
        self._seats = seats
        self._forest = forest
        self._number = number
        self._states: dict[int, IpcState] = {}

    def add(self, index: int, state: IpcState) -> None:
        """Remember what namespace `index` shall hold; ImageError: no ipc namespace can."""
        ipc.check(state)
        self._states[index] = state

    def state(self, index: int) -> IpcState:
        """What a namespace holds; nothing, for one that is not the tree's."""
        return self._states.get(index, IpcState())

    def create(self, contents: Callable[[int], LocalFd]) -> None:
        """Make everything, open to everybody at first; see `pipeline.resources.namespaces.ipc`.

        Args:
            contents: the bytes of segments, by space: complete; the descriptors stay their owner's.

        Raises:
            RebuildError: somebody has no place here, or the kernel refuses a step; says in which namespace.
        """
        for index, state in self._states.items():
            fds: Mapping[int, LocalFd] = {s.space: contents(s.space) for s in state.segments}
            self._act(index, partial(ipc.create, contents=fds))

    def settle(self) -> None:
        """Give everything its owner and permissions, once processes have what they need of it. Raises as `create`."""
        for index, state in self._states.items():
            if not ipc.is_settled(state):  # a visitor takes 5 ms
                self._act(index, ipc.settle)

    def _act(self, index: int, act: Callable[[IpcState, Translate], bytes]) -> None:
        state = self._states[index]
        owner = self._seats.records[index].owner
        everybody = {one.permissions for one in _objects(state)}
        try:
            if all(self._numbers(one, owner) for one in everybody):
                self._visit(index, owner, partial(act, state), everybody)
                return
            limits = IpcState(sysctls=state.sysctls)
            self._visit(index, owner, partial(act, limits), [])
            self._visit(index, 0, partial(act, replace(state, sysctls={})), everybody)
        except OSError as error:
            raise RebuildError(f"ipc namespace {index}: {error.strerror}") from error

    def _visit(
        self, index: int, userns: int, act: Callable[[Translate], bytes], everybody: Iterable[Permissions]
    ) -> None:
        """Let a visitor act that is in ipc namespace `index`, and in `userns`: its owner, or 0."""
        numbers = {}
        for one in everybody:
            found = self._numbers(one, userns)
            if found is None:
                ids = f"{one.uid.id}:{one.gid.id}, made by {one.cuid.id}:{one.cgid.id}"
                raise RebuildError(
                    f"ipc namespace {index}: an object belongs to {ids}, who has no place here (restore with --map "
                    "auto or --map BASE:COUNT, as root, or with --unmapped overflow)"
                )
            numbers[one] = found
        ids_there = self._forest.makers_ids(userns)

        def work() -> bytes:
            if userns:
                become(*ids_there)
            return act(numbers.__getitem__)

        with self._seats.way_into(index) as way:
            # the user namespace comes first on the way
            visit(way if userns == self._seats.records[index].owner else way[1:], work, alone=True)

    def _numbers(self, permissions: Permissions, userns: int) -> Numbers | None:
        """Who may use an object, as a user namespace knows them; None where it does not know all."""
        wanted: list[tuple[Id, IdKind]] = [
            (permissions.uid, "uid"),
            (permissions.gid, "gid"),
            (permissions.cuid, "uid"),
            (permissions.cgid, "gid"),
        ]
        found = [self._number(one, userns, kind) for one, kind in wanted]
        return None if None in found else Numbers(*found)  # type: ignore[arg-type]


def _objects(state: IpcState) -> Iterable[ipc.Segment | ipc.Semaphores | ipc.Queue | ipc.PosixQueue]:
    return (*state.segments, *state.semaphores, *state.queues, *state.posix)
