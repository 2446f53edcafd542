"""Looking at a stopped tree: everything that is known from outside becomes a record.

What comes out of here still speaks of the source host: each `Id` says namespace 0 and
the id as the pipeline sees it. The next stage (`pipeline.stages.translate`) moves every
one of them into the forest of the image. Pids need no translation: level 0 of an image
is the pipeline's own pid namespace.

The same code answers `check`: `blockers` touches nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Content, FdEntry, Id, OpenFile, PathRef, Record
from pipeline.kernel import procfs
from pipeline.ledger import LEDGER
from pipeline.policy import DumpPolicy
from pipeline.remote.tracer import check_cancelled
from pipeline.resources import (
    external_end,
    external_state,
    in_flight,
    memfd,
    namespace_file,
    pty_sides,
    pty_state,
    signal_owner,
)
from pipeline.resources.held import Held
from pipeline.resources.kinds import FdView, FileKind
from pipeline.resources.memory.answering import Answered
from pipeline.resources.namespaces.members import NamespaceCapture
from pipeline.resources.outside import Outsiders
from pipeline.resources.registry import kind_of
from pipeline.resources.shielded import Shield
from pipeline.resources.taken import Takings
from pipeline.resources.unix_unread import Unread
from pipeline.stages.open_files import OpenFiles

#: kinds of open files that a tree is built with, before its processes have their descriptors
MADE_EARLY = frozenset(
    {pty_state.KIND_NAME, external_state.KIND_NAME, memfd.KIND.name, namespace_file.KIND.name}
)
#: the kind of all others in a draft
LATER = "later"


class Tree:
    """Who belongs to the tree: processes and tasks, and what their numbers mean.

    Args:
        pids: its processes, parents before children.
        outsiders: what was read of them before.
    """

    def __init__(self, pids: Sequence[HostPid], outsiders: Outsiders) -> None:
        self.pids = list(pids)
        self._outsiders = outsiders
        self._members: set[int] = set(pids)
        for pid in pids:
            with suppress(procfs.ProcessGone):
                self._members.update(procfs.tasks(pid))

    @cached_property
    def outsiders(self) -> Outsiders:
        """Who does not belong to it, as of now."""
        self._outsiders.look()
        return self._outsiders

    def member(self, pid: int) -> int:
        """The level-0 pid of a member; 0 for anybody outside the tree."""
        return pid if pid in self._members else 0

    def group(self, pgid: int) -> int:
        """A process group or session: its number if its leader is a member or nobody, 0 if led from outside."""
        if pgid in self._members:
            return pgid
        return 0 if os.path.exists(f"/proc/{pgid}") or not self._confined(pgid) else pgid

    def _confined(self, pgid: int) -> bool:
        """Whether a leaderless group or session has members in the tree only."""
        if pgid in (os.getpgrp(), os.getsid(0)):
            return False
        return self._members.issuperset(self.outsiders.in_group(pgid))


class Numbering:
    """Numbers of things, the same at every look at a tree."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, key: Hashable) -> int:
        """The number of whatever is known by `key`, from 1 on; a new one at the first time."""
        return self._numbers.setdefault(key, len(self._numbers) + 1)


@dataclass
class Looks:
    """What several looks at one tree have in common; a single one has it to itself.

    `spaces`, `files`: numbers of what has pages, and of mapped files. `live`: the memory of the tree is sent while
    the tree runs. `order`: the spaces of processes as they were planned at the first look; None before it. `answered`:
    by its userfaultfds, at the last look.
    """

    spaces: Numbering = field(default_factory=Numbering)
    files: Numbering = field(default_factory=Numbering)
    live: bool = False
    order: list[int] | None = None
    answered: list[Answered] = field(default_factory=list)

    @property
    def is_draft(self) -> bool:
        """Whether this look is for a draft only: what processes get in the end does not count yet."""
        return self.live and self.order is None


class Spaces:
    """Numbers for everything that has pages, and the local descriptors that file contents are read from."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self._held: dict[int, LocalFd] = {}

    def number(self, key: Hashable) -> int:
        """The space number of whatever is known by `key`."""
        return self._numbering.of(key)

    def hold(self, space: int, local: LocalFd) -> None:
        """Keep a duplicate of `local` to read the bytes of `space` from."""
        duplicate = LocalFd(fcntl.fcntl(local, fcntl.F_DUPFD_CLOEXEC, 0))
        LEDGER.take("content source", duplicate)
        self._held[space] = duplicate

    def source(self, space: int) -> LocalFd | None:
        """Where the bytes of a shared memory object or file content are read; None for address spaces."""
        return self._held.get(space)

    def close(self) -> None:
        """Give every duplicate back; idempotent."""
        while self._held:
            _, fd = self._held.popitem()
            os.close(fd)
            LEDGER.give_back("content source", fd)


class FileObserver:
    """The open files of a tree, and the `CaptureScope` of their kinds; a context manager.

    Args:
        tree: who belongs to it.
        spaces: numbers for contents.
        mount_namespace: the `Namespace` index of the mount namespace of a process.
        memory: registers the shared memory behind a descriptor and returns its space.
        namespaces: of the tree.
        policy, held, shield: see `CaptureScope`.
    """

    def __init__(
        self,
        tree: Tree,
        spaces: Spaces,
        mount_namespace: Callable[[HostPid], int],
        memory: Callable[[FdView], int],
        namespaces: NamespaceCapture,
        policy: DumpPolicy,
        held: Held,
        shield: Shield,
    ) -> None:
        self.policy = policy
        self.held = held
        self.shield = shield
        self._tree = tree
        self._spaces = spaces
        self._mount_namespace = mount_namespace
        self._memory = memory
        self._namespaces = namespaces
        self._open = OpenFiles()
        self._peers: dict[Any, Any] = {}
        self._terminals: dict[int, list[tuple[int, FdView]]] | None = None
        #: by our duplicate: what a file is does not change while it is looked at
        self._kinds: dict[LocalFd, FileKind[Any]] = {}
        self.unseen = self.still = False
        #: by our duplicate of a userfaultfd: what it answers for
        self.answered_by: dict[LocalFd, Answered] = {}
        self._content_of: dict[tuple[int, int], int] = {}
        #: files with a name whose content goes along
        self.takings = Takings(policy.with_files, self.path, self.content)
        self.contents: list[Content] = []
        #: those of them that namespaces hold
        self.of_namespaces: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the open files; idempotent."""
        self.shield.settle()
        self._open.close()

    # -- the whole ------------------------------------------------------------------

    def collect(
        self,
        pids: Sequence[HostPid],
        still: bool,
        status_of: Callable[[HostPid], procfs.Status] = procfs.status,
    ) -> None:
        """Look at every descriptor of these processes; where they stand `still`, at what is in flight, too.

        `status_of`: reads /proc/TID/status, or remembers it.
        """
        self.still = still
        self._open.collect(pids, still, status_of)
        self._terminals = None
        self.unseen = not still and any(in_flight.count(view) for view in self._open.views)

    def blockers(self) -> Iterator[Blocker]:
        """Everything that stops an open file of the tree from being carried."""
        yield from self._open.blockers
        yield from external_end.unknown_names(self)
        for _, view in self._open.files():
            with suppress(ProcessLookupError):
                yield from self._kind(view).check(view, self)
                yield from signal_owner.check(view, self._tree.member)

    def records(self, draft: bool = False) -> Iterator[tuple[OpenFile, Record | None]]:
        """Every open file and the record of its kind; `OpenFile.state` is filled in by the translation.

        Args:
            draft: only of those that processes or mappings are made with; of the others only that they are there.
        """
        self.shield.settle()  # what of them is borrowed from now on is not read by somebody else meanwhile
        for index, view in self._open.files():
            check_cancelled()
            kind = self._kind(view)
            if draft and kind.name not in MADE_EARLY:
                yield OpenFile(index=index, kind=LATER, flags=view.flags), None
                continue
            record = kind.capture(view, self)
            yield (
                OpenFile(
                    index=index,
                    kind=kind.name,
                    flags=view.flags,
                    position=max(view.position, 0),
                    owner=signal_owner.capture(view, self._tree.member),
                ),
                record,
            )

    def _kind(self, view: FdView) -> FileKind[Any]:
        kind = self._kinds.get(view.local)
        if kind is None:
            kind = external_end.KIND if external_end.claims(view, self) else kind_of(view)
            self._kinds[view.local] = kind
        return kind

    def entries(self, pid: HostPid) -> list[FdEntry]:
        """The descriptor table of a process."""
        return self._open.slots[pid]

    # -- CaptureScope ---------------------------------------------------------------

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        """See `CaptureScope.path`."""
        return PathRef(self._mount_namespace(pid), link)

    def user(self, uid: int) -> Id:
        """See `CaptureScope.user`; translated by the next stage."""
        return Id(0, uid)

    def group(self, gid: int) -> Id:
        """See `CaptureScope.group`; translated by the next stage."""
        return Id(0, gid)

    def member(self, pid: int) -> int:
        """See `CaptureScope.member`."""
        return self._tree.member(pid)

    def files(self) -> Sequence[tuple[int, FdView]]:
        """See `CaptureScope.files`."""
        return list(self._open.files())

    def terminals(self, number: int) -> Sequence[tuple[int, FdView]]:
        """See `CaptureScope.terminals`."""
        if self._terminals is None:
            self._terminals = pty_sides.by_number(self._open.files())
        return self._terminals.get(number, ())

    def file_at(self, pid: HostPid, fd: int) -> int | None:
        """See `CaptureScope.file_at`."""
        return self._open.file_at(pid, fd)

    def holders(self, index: int) -> Sequence[tuple[HostPid, int]]:
        """See `CaptureScope.holders`."""
        return self._open.holders(index)

    def lock_lines(self, pid: HostPid, fd: int) -> Sequence[str]:
        """See `CaptureScope.lock_lines`."""
        return self._open.lock_lines.get((pid, fd), ())

    def unread(self, view: FdView) -> Sequence[Unread] | None:
        """See `CaptureScope.unread`."""
        index = self._open.file_at(view.pid, view.fd)
        return None if index is None else self._open.unread.get(index)

    def content(self, local: LocalFd, size_bytes: int) -> int:
        """See `CaptureScope.content`."""
        found = os.fstat(local)
        key = (found.st_dev, found.st_ino)
        if key not in self._content_of:
            self._content_of[key] = self._carry(("file", *key), local, size_bytes)
        return self._content_of[key]

    def take_along(self, pid: HostPid, link: bytes, local: LocalFd) -> None:
        """See `CaptureScope.take_along`."""
        self.takings.take(pid, link, local)

    def bytes_of(self, local: LocalFd, size_bytes: int) -> int:
        """Carry bytes that a namespace holds, from a descriptor. Duplicates `local`."""
        space = self._carry(("namespace", len(self.of_namespaces)), local, size_bytes)
        self.of_namespaces.add(space)
        return space

    def _carry(self, key: Hashable, local: LocalFd, size_bytes: int) -> int:
        space = self._spaces.number(key)
        self._spaces.hold(space, local)
        self.contents.append(Content(space=space, size_bytes=size_bytes))
        return space

    def memory(self, view: FdView) -> int:
        """See `CaptureScope.memory`."""
        return self._memory(view)

    def namespace(self, view: FdView) -> tuple[str, int] | None:
        """See `CaptureScope.namespace`."""
        return self._namespaces.number_of(view.local, *view.seat)

    def queues_of(self, view: FdView) -> int | None:
        """See `CaptureScope.queues_of`."""
        return self._namespaces.queues_of(view)

    def is_external(self, namespace: int) -> bool:
        """See `CaptureScope.is_external`."""
        return self._namespaces.namespaces[namespace].external

    def network(self, local: LocalFd) -> int | None:
        """See `CaptureScope.network`."""
        return self._namespaces.network_of(local)

    def own_network(self) -> int | None:
        """See `CaptureScope.own_network`."""
        return self._namespaces.own_network()

    def in_network(self, netns: int, make: Callable[[], socket.socket]) -> socket.socket:
        """See `CaptureScope.in_network`."""
        return self._namespaces.in_network(netns, make)

    def look_in_network(self, netns: int, look: Callable[[], bytes]) -> bytes:
        """See `CaptureScope.look_in_network`."""
        return self._namespaces.look_in_network(netns, look)

    def answered(self, view: FdView) -> Answered:
        """See `CaptureScope.answered`."""
        return self.answered_by[view.local]

    def outsiders(self) -> Outsiders:
        """See `CaptureScope.outsiders`."""
        return self._tree.outsiders

    def peers(self) -> dict[Any, Any]:
        """See `CaptureScope.peers`."""
        return self._peers
