"""What every kind of open file must be able to do, and the scopes it does it in.

A kind is one file in this package with both halves side by side: the record,
`check` (refuse early, with a reason), `capture`, then three phases of rebuilding:

1. `create`: make the open file in the restorer, needing nothing but the record
   (and objects that several files share, through `CreateScope.once`).
2. `connect`: every file of the tree exists as a local descriptor now; join them
   (queue bytes, listen, set sizes). Still in the restorer.
3. `finish`: every descriptor has its number in the puppets; do what must be done
   from inside (epoll registrations, controlling terminal, arming timers).

All methods are synchronous and run in the tracer's thread; none may block. Local
descriptors returned by `create` belong to the caller, who closes each exactly once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from stat import S_ISSOCK
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id, Index, OpenFile, PathRef, Pid, Record
from pipeline.kernel.statfs import filesystem
from pipeline.policy import DumpPolicy, RestorePolicy
from pipeline.remote.calls import Argument, Call
from pipeline.resources.held import Held
from pipeline.resources.shielded import Shield
from pipeline.resources.socket_identity import ANY, Identity, borrowed, identify

if TYPE_CHECKING:
    from pipeline.resources.memory.answering import Answered
    from pipeline.resources.outside import Outsiders
    from pipeline.resources.unix_unread import Unread

T = TypeVar("T")


class Inject(Protocol):
    """Runs one system call somewhere else; raises OSError with its errno."""

    def __call__(self, number: int, /, *args: Argument) -> int:
        """Number and arguments as `pipeline.remote.calls` says."""


class FdView(msgspec.Struct, frozen=True, dict=True):
    """One descriptor of the target, looked at from outside; nothing in the target is changed.

    Args:
        pid: the process, in the pipeline's pid namespace.
        fd: its number there. Below zero, and different for each, where no process has it: then it is in flight in
            the queue of a unix socket of `pid`.
        local: a duplicate of the same open file description in the pipeline's own
            table (pidfd_getfd), valid during the call only. Reading or seeking it
            would move the target's position: use pread, tee, MSG_PEEK.
        link: what /proc/PID/fd/N points to, as bytes.
        stat: fstat of it.
        info: the lines of /proc/PID/fdinfo/N: first word without colon -> rest;
            a key that repeats (``tfd``, ``inotify``, ``lock``) holds all its lines.
        flags: F_GETFL.
        position: file offset.
        opened_here: in the mount namespace of the pipeline, which is not that of `pid`: handed in from outside.
    """

    pid: HostPid
    fd: int
    local: LocalFd
    link: bytes
    stat: os.stat_result
    info: dict[str, list[str]]
    flags: int
    position: int
    opened_here: bool = False

    @property
    def is_socket(self) -> bool:
        """Whether it is a socket, and not an O_PATH descriptor of a socket file."""
        return S_ISSOCK(self.stat.st_mode) and self.link.startswith(b"socket:[")

    @cached_property
    def identity(self) -> Identity | None:
        """What it is, where it `is_socket`; the kernel is asked once."""
        if not self.is_socket:
            return None
        with borrowed(self.local, ANY) as sock:
            return identify(sock)

    def as_socket(self) -> AbstractContextManager[socket.socket]:
        """An object for what `is_socket`, within a block."""
        assert self.identity is not None
        return borrowed(self.local, self.identity)

    @cached_property
    def filesystem(self) -> int:
        """The `f_type` of the file system that it is on, see `Magic`; the kernel is asked once."""
        return filesystem(self.local)

    @property
    def seat(self) -> tuple[HostPid, int]:
        """(process, descriptor) by which the kernel can be asked about it."""
        return (self.pid, self.fd) if self.fd >= 0 else (HostPid(os.getpid()), self.local)

    @property
    def namer(self) -> HostPid:
        """In whose mount namespace `link` is a name."""
        return HostPid(os.getpid()) if self.opened_here else self.pid

    @property
    def subject(self) -> str:
        """How a message names it."""
        if self.fd < 0:
            return f"pid {self.pid}: a file in flight in a unix socket ({os.fsdecode(self.link)})"
        return f"pid {self.pid} fd {self.fd} ({os.fsdecode(self.link)})"


class CaptureScope(Protocol):
    """What a kind may ask about the rest of the tree while it is captured.

    Attributes:
        policy: what the person who captures has decided.
        unseen: files of the tree are in flight, and were not looked at because it runs: what seems to be
            missing may be among them.
        still: the tree stands still; else what is of a moment is no reason to refuse it.
        held: takes what is held until the tree runs on or has ended.
        shield: borrows state of open files.
    """

    policy: DumpPolicy
    unseen: bool
    still: bool
    held: Held
    shield: Shield

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        """The path `link` (as readlink of a /proc/PID magic link says it) in the mount namespace of `pid`."""

    def user(self, uid: int) -> Id:
        """Translate a uid as the pipeline sees it into the image's forest (namespace 0 if only mapped outside)."""

    def group(self, gid: int) -> Id:
        """Translate a gid likewise."""

    def member(self, pid: int) -> Pid:
        """Level-0 pid of a process, thread or process group of the tree given its pid here; 0 if outside."""

    def files(self) -> Sequence[tuple[Index, FdView]]:
        """Every open file of the tree with one view of it (valid while capturing)."""

    def terminals(self, number: int) -> Sequence[tuple[Index, FdView]]:
        """Those of the open files that are a side of a pseudo-terminal of this number: see `pty_sides.by_number`."""

    def file_at(self, pid: HostPid, fd: int) -> Index | None:
        """Index of the open file behind descriptor `fd` of `pid`; None if that slot is empty."""

    def holders(self, index: Index) -> Sequence[tuple[HostPid, int]]:
        """Every (process, descriptor number) that refers to open file `index`; nobody if it is only in flight."""

    def lock_lines(self, pid: HostPid, fd: int) -> Sequence[str]:
        """What fdinfo says of locks for a descriptor of the tree, a line each."""

    def unread(self, view: FdView) -> Sequence[Unread] | None:
        """What waits in the queue of a unix socket with descriptors in flight in it; None for other queues."""

    def content(self, local: LocalFd, size_bytes: int) -> Index:
        """Carry the bytes of a file: they are streamed as pages later (holes stay holes). Duplicates `local`."""

    def take_along(self, pid: HostPid, link: bytes, local: LocalFd) -> None:
        """Let the content of a file with a name go along, if whoever captures asked for that."""

    def memory(self, view: FdView) -> Index:
        """The `SharedMemory` space of a memfd or shared mapping behind `view`, registered on first use."""

    def namespace(self, view: FdView) -> tuple[str, Index] | None:
        """Kind and number of the namespace behind a namespace file; None for one that is not the tree's to make."""

    def queues_of(self, view: FdView) -> Index | None:
        """The ipc namespace of an open POSIX message queue: the tree's, or the external one; None for another."""

    def is_external(self, namespace: Index) -> bool:
        """Whether a namespace (of a kind other than user) is the destination's to supply."""

    def network(self, local: LocalFd) -> Index | None:
        """The network namespace of an open socket; None for one that is not the tree's."""

    def own_network(self) -> Index | None:
        """That of the pipeline itself; None where the tree's external one is another."""

    def in_network(self, netns: Index, make: Callable[[], socket.socket]) -> socket.socket:
        """Make a socket in a network namespace of the tree, or the external one."""

    def look_in_network(self, netns: Index, look: Callable[[], bytes]) -> bytes:
        """What `look` returns in a network namespace of the tree, or the external one; it makes system calls only."""

    def answered(self, view: FdView) -> Answered:
        """What a userfaultfd answers for."""

    def outsiders(self) -> Outsiders:
        """Who else has descriptors on this host, as it is at this capture."""

    def peers(self) -> dict[Any, Any]:
        """A scratch dictionary shared by all kinds during one capture (socket tables, inode groups)."""


class CreateScope(Protocol):
    """What a kind may use while the tree is rebuilt.

    `policy`: what the person who rebuilds has decided.
    """

    policy: RestorePolicy

    def open(self, path: PathRef, flags: int, mode: int = 0) -> LocalFd:
        """Open `path` inside its mount namespace's root (openat2, RESOLVE_IN_ROOT); caller owns the result."""

    def user(self, uid: Id) -> int:
        """Translate to a uid as the restorer sees it; RebuildError if it has none here."""

    def group(self, gid: Id) -> int:
        """Translate a gid likewise."""

    def in_network(self, netns: Index, make: Callable[[], T]) -> T:
        """Make sockets in a network namespace of the image."""

    def new_socket(self, netns: Index, who: Identity) -> socket.socket:
        """A socket in a network namespace of the image, made by ourselves; the caller owns it.

        For kinds whose records have a `SocketState` as their `socket`, and that make one for each.
        """

    def in_ipc(self, ipc: Index, make: Callable[[], int]) -> LocalFd:
        """Open something in an ipc namespace of the image; the caller owns it. Raises OSError as `make` does."""

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Make something that several files share exactly once.

        Descriptors in it are owned by the scope when `make` passed them to `own`.
        """

    def own(self, fd: LocalFd) -> LocalFd:
        """Let the scope close this local descriptor when the rebuild ends, whichever way it ends."""

    def content(self, space: Index) -> LocalFd:
        """The local descriptor (memfd or unnamed file) that holds the bytes of `space`; owned by the scope."""

    def namespace(self, kind: str, index: Index) -> LocalFd:
        """Open a namespace: a `UserNamespace` of kind `user`, else a `Namespace`; the caller owns the result."""

    def file(self, index: Index) -> LocalFd:
        """Local descriptor of an open file that `create` made (phases 2 and 3); owned by the scope."""

    def holders(self, index: Index) -> Sequence[tuple[Pid, int]]:
        """Every (level-0 pid, descriptor number) that refers to open file `index`."""

    def tree_clock_ns(self, index: Index, clock: int) -> int | None:
        """What a clock says now to the holders of an open file, that said what the dumping pipeline read of it.

        None where they have another one, in a time namespace of their own, or where it does not go on here.
        """

    def host_pid(self, pid: Pid) -> HostPid:
        """The pid here of the process or thread whose level-0 pid is `pid` (all phases: they stand before files)."""

    def inject(self, pid: Pid, number: int, *args: Argument) -> int:
        """Run one system call inside puppet `pid`, which before phase 3 has to be left as it was.

        Arguments are what `pipeline.remote.calls` says.

        Raises OSError with the call's errno.
        """

    def inject_all(self, pid: Pid, calls: Sequence[Call]) -> None:
        """Run system calls inside puppet `pid`, as `inject`, many at a time; OSError names the first that fails."""

    def when_it_runs(self, local: LocalFd, act: Callable[[LocalFd], None], subject: str) -> None:
        """Do something when the tree is let run, behind the decision, with a duplicate of `local`.

        An OSError or RebuildError of it is told as a note about `subject`. Without that moment `act` is never called.
        """

    def in_thread(self, pid: Pid, act: Callable[[Inject], T]) -> T:
        """Run `act` with the system calls of a thread of puppet `pid` that is there only meanwhile.

        It may take on other ids: those of the process stay as they are.
        """

    def send(self, pid: Pid, local: LocalFd, at: int | None = None, cloexec: bool = True) -> int:
        """Give a duplicate of `local` to puppet `pid`, at number `at` or any free one; returns the number."""


R = TypeVar("R", bound=Record)


class FileKind(Protocol[R]):
    """One kind of open file; instances are stateless singletons listed in `pipeline.resources.registry`."""

    #: `OpenFile.kind` and the name in the support matrix.
    name: str
    #: the type of `OpenFile.state`
    record: type[R]
    #: states carried and states refused, for the support matrix: (what, how)
    carried: Sequence[str]
    refused: Sequence[str]
    #: the tests that show it, for the support matrix: paths below tests/
    shown_by: Sequence[str]

    def matches(self, view: FdView) -> bool:
        """Whether this kind is the one to carry `view`; the first kind of the registry that says so does."""

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Everything that stops `view` from being carried. Also runs on a tree that is *not* frozen."""

    def capture(self, view: FdView, scope: CaptureScope) -> R:
        """Everything needed to make it again. The tree is frozen; `check` found nothing."""

    def create(self, file: OpenFile, record: R, scope: CreateScope) -> LocalFd:
        """Phase 1. The engine applies `OpenFile.flags` (F_SETFL) and position afterwards where they apply."""

    def connect(self, file: OpenFile, record: R, scope: CreateScope) -> None:
        """Phase 2."""

    def finish(self, file: OpenFile, record: R, scope: CreateScope) -> None:
        """Phase 3."""
