"""Open files: made in the restorer, joined, and handed to the puppets under their numbers.

See `pipeline.resources.kinds` for the three phases. A puppet has no descriptors but the
channel when its own arrive, so they land at 0, 1, 2, ... in the order they are sent;
sent in the order of their final numbers, each lands at or below its place, and moving
them from the highest down never meets another.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec

from pipeline.errors import PipelineError, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import FdEntry, FileOwner, Id, OpenFile, PathRef, Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, RESOLVE, openat2
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.remote.calls import Argument, Call
from pipeline.remote.puppet import Puppet
from pipeline.resources import external_state, removed, signal_owner, sockets
from pipeline.resources.kinds import Inject
from pipeline.resources.namespaces.clocks_here import ClocksHere
from pipeline.resources.registry import WATCHERS, kind_named
from pipeline.resources.socket_identity import Identity
from pipeline.stages.contents import Contents
from pipeline.stages.late import Late
from pipeline.userns.visit import Visitor, fetch

T = TypeVar("T")

#: status flags that fcntl(F_SETFL) can change (fcntl(2))
_SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
_O_PATH = os.O_PATH
_THREAD = CLONE.VM | CLONE.FS | CLONE.FILES | CLONE.SIGHAND | CLONE.THREAD | CLONE.SYSVSEM


class Descriptors:
    """The open files of an image, and the `CreateScope` of their kinds.

    Args:
        image: the records.
        puppets: all tasks that stand, by level-0 pid.
        contents: shared memory and file contents.
        root_of: gives an O_PATH descriptor of the root of a mount namespace; not owned here.
        namespace: opens a namespace of the image by kind and number.
        entered: numbers of the network and ipc namespaces that are not our own.
        user, group: translate an `Id` to what the restorer sees.
        made: what `once` shall find made already; not owned here.
        policy: see `CreateScope`.
        late: what is to be done when the tree runs.
        clocks: what the clocks of the source are here.
    """

    def __init__(
        self,
        image: Image,
        puppets: Mapping[int, Puppet],
        contents: Contents,
        root_of: Callable[[int], int],
        namespace: Callable[[str, int], LocalFd],
        entered: Collection[int],
        user: Callable[[Id], int],
        group: Callable[[Id], int],
        made: Mapping[tuple[Any, ...], Any],
        policy: RestorePolicy,
        late: Late,
        clocks: ClocksHere,
    ) -> None:
        self.policy = policy
        self._late = late
        self._clocks = clocks
        self._image = image
        self._puppets = puppets
        self._contents = contents
        self._root_of = root_of
        self.namespace = namespace
        self._entered = entered
        self.user = user
        self.group = group
        self._files: dict[int, LocalFd] = {}
        self._records: dict[int, Record] = {}
        self._owned: list[LocalFd] = []
        #: by the network that they are in
        self._visitors: dict[int, Visitor] = {}
        #: made, and not asked for yet: by network, and what they are
        self._sockets: dict[tuple[int, Identity], list[socket.socket]] = defaultdict(list)
        self._made_once: dict[tuple[Any, ...], Any] = dict(made)
        self._holders: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for process in image.processes.values():
            for entry in process.fds:
                self._holders[entry.file].append((process.pids[0], entry.fd))

    # -- the phases ---------------------------------------------------------------

    def create(self) -> Iterator[None]:
        """Phases 1 and 2, and what all kinds have in common: status flags. Yields between files."""
        for file in self._image.files.values():
            kind = kind_named(file.kind)
            try:
                record = msgspec.convert(file.state, kind.record)
            except msgspec.ValidationError as error:
                raise RebuildError(f"open file {file.index} ({file.kind}): {error}") from None
            self._records[file.index] = record
            yield
        for file in self._image.files.values():
            kind = kind_named(file.kind)
            fd = self._attempt(file, partial(kind.create, file, self._records[file.index], self))
            LEDGER.take("open file", fd)
            self._files[file.index] = fd
            yield
        for file in self._image.files.values():
            kind = kind_named(file.kind)
            self._attempt(file, partial(kind.connect, file, self._records[file.index], self))
            if not file.flags & _O_PATH:
                self._attempt(file, partial(self._set_flags, file))
            yield

    def _set_flags(self, file: OpenFile) -> None:
        fd = self._files[file.index]
        settable = external_state.settable(fd) if file.kind == external_state.KIND_NAME else _SETTABLE
        now = fcntl.fcntl(fd, fcntl.F_GETFL)
        wanted = now & ~settable | file.flags & settable
        if wanted != now:
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)

    def install(self) -> Iterator[None]:
        """Give every process its descriptors, under their numbers. Yields between processes."""
        for process in self._image.processes.values():
            if process.fds:
                self._install(self._puppets[process.pids[0]], process.fds)
                yield

    def _install(self, puppet: Puppet, entries: Sequence[FdEntry]) -> None:
        ordered = sorted(entries, key=lambda entry: entry.fd)
        landed = puppet.send_fds([self._files[entry.file] for entry in ordered])
        if landed != list(range(len(landed))):
            raise RebuildError(f"puppet {puppet.pid} has descriptors of its own: they landed at {landed}")
        moves: list[Call] = []
        for number, entry in reversed(list(zip(landed, ordered, strict=True))):
            if number != entry.fd:
                cloexec = os.O_CLOEXEC if entry.cloexec else 0
                moves.append(Call(NR.dup3, (number, entry.fd, cloexec), name=f"dup3 to {entry.fd}"))
                moves.append(Call(NR.close, (number,)))
            elif not entry.cloexec:
                moves.append(Call(NR.fcntl, (number, fcntl.F_SETFD, 0)))
        puppet.run_checked(moves)

    def finish(self) -> None:
        """Phase 3, and signal-driven I/O owners. Who watches files begins last, so that no work of ours is seen."""
        for file in sorted(self._image.files.values(), key=lambda file: file.kind in WATCHERS):
            kind = kind_named(file.kind)
            if file.owner is not None:
                owner = partial(
                    signal_owner.create, self._files[file.index], file.owner, self.host_pid, self.user
                )
                self._attempt(file, owner)
            self._attempt(file, partial(kind.finish, file, self._records[file.index], self))

    def _attempt(self, file: OpenFile, act: Callable[[], T]) -> T:
        try:
            return act()
        except PipelineError:
            raise
        except OSError as error:
            holders = ", ".join(f"pid {pid} fd {fd}" for pid, fd in self._holders[file.index][:3])
            raise RebuildError(f"{holders or 'open file'} ({file.kind}): {error}") from error

    def close(self) -> None:
        """Close everything made here, exactly once; idempotent."""
        while self._visitors:
            self._visitors.popitem()[1].close()
        while self._sockets:
            for sock in self._sockets.popitem()[1]:
                sock.close()
        while self._files:
            _, fd = self._files.popitem()
            os.close(fd)
            LEDGER.give_back("open file", fd)
        while self._owned:
            fd = self._owned.pop()
            os.close(fd)
            LEDGER.give_back("owned descriptor", fd)

    # -- CreateScope --------------------------------------------------------------

    def open(self, path: PathRef, flags: int, mode: int = 0) -> LocalFd:
        """See `CreateScope.open`."""
        create = os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY
        return openat2(
            self._root_of(path.mntns), path.path, flags, mode if flags & create else 0, RESOLVE.IN_ROOT
        )

    def directory(self, path: PathRef, was_removed: FileOwner | None) -> LocalFd:
        """A descriptor of a directory, of one that was removed where its owner is given; the caller owns it."""
        if was_removed is None:
            return self.open(path, os.O_PATH | os.O_DIRECTORY)
        return LocalFd(fcntl.fcntl(removed.shared(path, was_removed, self), fcntl.F_DUPFD_CLOEXEC, 0))

    def in_network(self, netns: int, make: Callable[[], T]) -> T:
        """See `CreateScope.in_network`: a visitor goes there; a socket stays where it was made."""
        if netns not in self._entered:
            return make()
        if netns not in self._visitors:
            fd = self.namespace("net", netns)
            try:
                self._visitors[netns] = Visitor([(fd, CLONE.NEWNET)])
            finally:
                os.close(fd)
        return self._visitors[netns].do(make)

    def new_socket(self, netns: int, who: Identity) -> socket.socket:
        """See `CreateScope.new_socket`. To get there takes longer than to make one: all that are like it are made."""
        made = self._sockets[netns, who]
        if not made:
            left = (record for index, record in self._records.items() if index not in self._files)
            count = sum(sockets.is_like(record, netns, who) for record in left)
            made += self.in_network(netns, partial(sockets.make_many, who, count))
        return made.pop()

    def in_ipc(self, ipc: int, make: Callable[[], int]) -> LocalFd:
        """See `CreateScope.in_ipc`: a visitor goes there."""
        if ipc not in self._entered:
            return LocalFd(make())
        fd = self.namespace("ipc", ipc)
        try:
            return fetch([(fd, CLONE.NEWIPC)], make)
        finally:
            os.close(fd)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """See `CreateScope.once`."""
        if key not in self._made_once:
            self._made_once[key] = make()
        result: T = self._made_once[key]
        return result

    def own(self, fd: LocalFd) -> LocalFd:
        """See `CreateScope.own`."""
        LEDGER.take("owned descriptor", fd)
        self._owned.append(fd)
        return fd

    def content(self, space: int) -> LocalFd:
        """See `CreateScope.content`."""
        return self._contents.fd(space)

    def file(self, index: int) -> LocalFd:
        """See `CreateScope.file`."""
        try:
            return self._files[index]
        except KeyError:
            raise RebuildError(f"open file {index} is not in the image") from None

    def holders(self, index: int) -> Sequence[tuple[int, int]]:
        """See `CreateScope.holders`."""
        return self._holders[index]

    def tree_clock_ns(self, index: int, clock: int) -> int | None:
        """See `CreateScope.tree_clock_ns`."""
        for pid, _ in self._holders[index]:
            if not self._image.namespaces[self._image.processes[pid].namespaces.time].external:
                return None
        return self._clocks.tree_ns(clock)

    def host_pid(self, pid: int) -> HostPid:
        """See `CreateScope.host_pid`."""
        try:
            return self._puppets[pid].tid
        except KeyError:
            raise RebuildError(f"pid {pid} is no process of the image") from None

    def inject(self, pid: int, number: int, *args: Argument) -> int:
        """See `CreateScope.inject`."""
        return self._puppets[pid].syscall(number, *args)

    def inject_all(self, pid: int, calls: Sequence[Call]) -> None:
        """See `CreateScope.inject_all`."""
        self._puppets[pid].run_checked(calls)

    def when_it_runs(self, local: LocalFd, act: Callable[[LocalFd], None], subject: str) -> None:
        """See `CreateScope.when_it_runs`."""
        self._late.add(local, act, subject)

    def in_thread(self, pid: int, act: Callable[[Inject], T]) -> T:
        """See `CreateScope.in_thread`."""
        thread = self._puppets[pid].clone_task(_THREAD)
        try:
            return act(thread.syscall)
        finally:
            thread.run_to_exit(NR.exit, 0)

    def send(self, pid: int, local: LocalFd, at: int | None = None, cloexec: bool = True) -> int:
        """See `CreateScope.send`."""
        puppet = self._puppets[pid]
        (number,) = puppet.send_fds([local])
        if at is not None and number != at:
            puppet.syscall(NR.dup3, number, at, os.O_CLOEXEC if cloexec else 0)
            with suppress(OSError):
                puppet.syscall(NR.close, number)
            return at
        if not cloexec:
            puppet.syscall(NR.fcntl, number, fcntl.F_SETFD, 0)
        return number
