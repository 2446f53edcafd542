"""The ipc namespaces of a tree: what was seen of each, and which mappings show their segments.

Source: ipc_namespaces(7).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id
from pipeline.kernel.syscalls import CLONE
from pipeline.resources.memory.scope import CannotCarry
from pipeline.resources.namespaces import ipc_view
from pipeline.resources.namespaces.ipc import IpcState, Semaphores
from pipeline.resources.namespaces.ipc_view import IpcView
from pipeline.userns.forest import Forest, IdKind
from pipeline.userns.visit import Way, as_owner


class IpcCapture:
    """All ipc namespaces of a tree, by their number."""

    def __init__(self) -> None:
        self._views: dict[int, IpcView] = {}
        self._subjects: dict[int, str] = {}
        #: mappings of segments, by namespace and identifier
        self._attached: Counter[tuple[int, int]] = Counter()

    def look(
        self,
        index: int,
        owner: int,
        pid: HostPid,
        opened: Callable[[], LocalFd],
        forest: Forest,
        privileged: bool,
    ) -> IpcView:
        """Look into namespace `index`, in which `pid` was seen first.

        Args:
            owner: the user namespace that it belongs to, in `forest`.
            opened: opens it.
            privileged: it can be joined without that user namespace. Then ids are seen that have no number there.

        Raises:
            OSError: it cannot be joined.
        """
        subject = f"pid {pid}"
        with ExitStack() as fds:
            fd = opened()
            fds.callback(os.close, fd)
            seen_from = 0 if privileged else owner
            way = as_owner(fd, CLONE.NEWIPC, bool(seen_from), fds)
            view = ipc_view.look(subject, way, seen_from, forest.maps_overflow(seen_from))
        if not seen_from:

            def moved(one: Id, kind: IdKind) -> Id:
                return forest.innermost(one.id, owner, kind) if owner else forest.at_a_root(one, kind)

            view = replace(view, state=ipc_view.moved(view.state, moved))
        self._views[index], self._subjects[index] = view, subject
        return view

    def semaphores(self, index: int) -> Sequence[Semaphores]:
        """The semaphore sets of a namespace; none, for one that is not the tree's."""
        return self._views[index].state.semaphores if index in self._views else []

    def segment(self, index: int, identifier: int) -> int:
        """The space of the segment that a mapping of a process in namespace `index` shows.

        Raises:
            CannotCarry: it is not of the tree.
        """
        for segment in self._views[index].state.segments if index in self._views else ():
            if segment.id == identifier:
                self._attached[index, identifier] += 1
                return segment.space
        raise CannotCarry(
            "is a System V shared memory segment of an ipc namespace that is not the tree's",
            "start the program in an ipc namespace of its own (unshare --ipc)",
        )

    def attachment_blockers(self) -> Iterator[Blocker]:
        """Segments that somebody else has attached, once all mappings of the tree have been asked for."""
        for index, view in self._views.items():
            for identifier, count in view.attachments.items():
                own = self._attached[index, identifier]
                if count != own:
                    yield Blocker(
                        self._subjects[index],
                        f"its ipc namespace holds shared memory segment {identifier}, which is attached {count} "
                        f"times, {own} of them by processes of the tree that are in it",
                        "give a tree that holds all of them",
                        transient=True,  # a running program attaches and detaches
                    )

    def with_contents(
        self, way_into: Callable[[int, ExitStack], Way], content: Callable[[LocalFd, int], int]
    ) -> Iterator[tuple[int, IpcState]]:
        """The states of a frozen tree's namespaces, the bytes of their segments registered.

        Args:
            way_into: the way of a visitor that may use everything in a namespace.
            content: registers bytes: a descriptor, which stays the caller's, and their number; returns the space.

        Raises:
            OSError: a segment cannot be attached, or memory is out.
        """
        for index, view in list(self._views.items()):
            with ExitStack() as fds:
                state = ipc_view.with_contents(view.state, way_into(index, fds), content)
            self._views[index] = replace(view, state=state)
            yield index, state
