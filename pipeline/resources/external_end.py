"""Open files with an end outside of the tree, which the destination gives: pipes, FIFOs, terminals, sockets.

What the kernel holds behind them belongs to the other side: a dump records their name only (``pipe:[123]``,
``fifo:/path``, ``tty:/dev/pts/3``, ``socket:[123]``), and a restore puts what is given under that name in their
place (`pipeline.resources.given_ends`). They are refused unless the person who dumps has said so: by name, by
``any``, or for the terminal of a shell's job.

A socket is never meant by ``any``: it is named. One that is joined to another socket of the tree (its peer, a client
that waits, a datagram socket connected to it) is refused, because only one of the two would be carried.

Bytes that are unread in a pipe or FIFO belong to whoever reads them. The tree reads: they go along, and come before
what is given (`pipeline.resources.pump`). Somebody outside reads: they stay. Input
and output of a terminal stay with it, and so do its settings, but for a job (`pipeline.resources.shell_job`).

Not preserved: capacity and owner of the pipe, and whatever state the socket has. A descriptor of /dev/tty
means the terminal that controls the session.

Source: pipe(7), fifo(7), pts(4), tty(4), proc_pid_fd(5).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import fifo, locks, outside, pipe_buffer, pty_sides, terminal
from pipeline.resources.external_state import KIND_NAME, ExternalState, given_key
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import closed_on_error, describe, misnamed, open_again, reopen
from pipeline.resources.pipe_buffer import Buffer
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.resources.tcp_seen import is_tcp
from pipeline.resources.tcp_tree import TcpTree
from pipeline.resources.unix_table import table_of

_SPLICE_F_NONBLOCK = 2


def name_of(view: FdView) -> bytes | None:
    """By which an end outside is known; None for what cannot have one."""
    mode = view.stat.st_mode
    if view.flags & os.O_PATH:
        return None
    if stat.S_ISFIFO(mode):
        return os.fsencode(pipe_buffer.name_of(view))
    if stat.S_ISSOCK(mode):
        return view.link
    if pty_sides.is_terminal(view) and pty_sides.role(view) not in ("master", "hung-up"):
        if pty_sides.role(view) == "tty":
            return b"tty:/dev/pts/%d" % pty_sides.number(view)
        return b"tty:" + view.link
    return None


def claims(view: FdView, scope: CaptureScope) -> bool:
    """Whether `view` is carried as an end outside, as the person who captures has decided."""
    policy = scope.policy
    if not policy.external_fds and not policy.shell_job:
        return False
    name = name_of(view)
    if name is None:
        return False
    if os.fsdecode(name) in policy.external_fds:
        return True
    if view.is_socket:
        return False
    wanted = "any" in policy.external_fds
    if stat.S_ISCHR(view.stat.st_mode):
        wanted |= policy.shell_job and is_job_terminal(view, scope)
    return wanted and any(True for _ in _outside(view, scope))


def is_job_terminal(view: FdView, scope: CaptureScope) -> bool:
    """Whether `view` is the terminal of a session that a process outside leads and processes of the tree are in."""
    device = terminal.device(view.local)
    for pid in {pid for _, other in scope.files() for pid in [other.pid]}:
        found = procfs.stat(pid)
        if found.tty_nr and not scope.member(found.session) and terminal.decode(found.tty_nr) == device:
            return True
    return False


def unknown_names(scope: CaptureScope) -> Iterator[Blocker]:
    """Names that a person said and no open file of the tree has."""
    named = scope.policy.external_fds - {"any"}
    if named:
        found = {os.fsdecode(name) for _, view in scope.files() if (name := name_of(view)) is not None}
        for missing in sorted(named - found):
            yield Blocker(
                f"--external-fd {missing}", "no open file of the tree has this name", "leave it out"
            )


def _outside(view: FdView, scope: CaptureScope) -> Iterator[str]:
    """What says that `view`, no socket, has an end outside."""
    if stat.S_ISCHR(view.stat.st_mode):
        if pty_sides.role(view) is None or pty_sides.master_of(view, scope) is None:
            yield "its master is not in the tree"
    elif view.link.startswith(b"/"):
        yield from (blocker.reason for blocker in fifo.outside_ends(view, scope))
    else:
        yield from (blocker.reason for blocker in pipe_buffer.outside_ends(view, scope, one_sided=True))


def _is_joined(view: FdView, scope: CaptureScope) -> bool:
    """Whether another socket of the tree is joined to socket `view`, so that it would lose it."""
    if is_tcp(view):
        return TcpTree.of(scope).is_joined(view)
    who = view.identity
    return who is not None and who.family == socket.AF_UNIX and table_of(scope).is_joined(view.stat.st_ino)


class ExternalEnd(CompleteOnceCreated):
    """See the module."""

    name = KIND_NAME
    record: type[ExternalState] = ExternalState
    carried: Sequence[str] = (
        "pipes, FIFOs, terminals and sockets with an end outside the tree, if the dump is told so (--external-fd)",
        "bytes that the tree has not read yet",
        "the terminal of a shell's job (--shell-job)",
    )
    refused: Sequence[str] = (
        "an end outside that the destination is not given (--inherit-fd)",
        "one that is said to be outside and is joined to the tree only, or to another socket of it",
    )
    shown_by: Sequence[str] = (
        "test_external_ends.py",
        "test_shell_job.py",
    )

    def matches(self, view: FdView) -> bool:
        """Never by itself: `claims` asks what the person has decided, too."""
        return False

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """It must have an end outside, and unread bytes must fit into an image."""
        if view.is_socket:
            if _is_joined(view, scope):
                why = "is joined to another socket of the tree, and is said to be external"
                yield Blocker(view.subject, why, "leave that out")
            return
        if not any(True for _ in _outside(view, scope)):
            yield Blocker(
                view.subject, "has no end outside of the tree, and is said to be external", "leave that out"
            )
        if stat.S_ISFIFO(view.stat.st_mode):
            if pipe_buffer.reads(view):
                yield from pipe_buffer.check(view)
            yield from locks.check(view, scope, carried=False)

    def capture(self, view: FdView, scope: CaptureScope) -> ExternalState:
        """Its name; what waits in a pipe for the tree goes with the first end that reads."""
        name = name_of(view)
        assert name is not None, "claims says what has a name"
        path = buffer = None
        if stat.S_ISFIFO(view.stat.st_mode):
            if view.link.startswith(b"/") and misnamed(view) is None:
                path = scope.path(view.namer, view.link)
            group = pipe_buffer.ends(view, scope)
            first = next((index for index, end in group if pipe_buffer.reads(end)), None)
            if scope.file_at(view.pid, view.fd) == first and not _read_outside(view, scope):
                taken = pipe_buffer.capture(group)
                buffer = taken if taken.unread else None
        is_terminal = stat.S_ISCHR(view.stat.st_mode)
        return ExternalState(
            name=name,
            path=path,
            controlling=is_terminal and pty_sides.role(view) == "tty",
            job=is_terminal and scope.policy.shell_job and is_job_terminal(view, scope),
            buffer=buffer,
        )

    def create(self, file: OpenFile, record: ExternalState, scope: CreateScope) -> LocalFd:
        """What was given; a FIFO for which nothing was given is opened by its name.

        Raises:
            RebuildError: nothing is there.
        """
        given: LocalFd | None = scope.once(given_key(file.index), lambda: None)
        if given is not None:
            return LocalFd(os.dup(given))
        if record.path is None:
            raise RebuildError(f"{describe(file)}: nothing was given for {os.fsdecode(record.name)}")
        with closed_on_error(reopen(file, record.path, os.O_RDWR, scope)) as both:
            if not stat.S_ISFIFO(os.fstat(both).st_mode):
                raise RebuildError(f"{describe(file, record.path)} is not a FIFO here")
            fd = open_again(both, file.flags)
        # this end counts as a reader and a writer until the tree has its own
        scope.own(both)
        return fd

    def connect(self, file: OpenFile, record: ExternalState, scope: CreateScope) -> None:
        """Unread bytes first.

        Raises:
            RebuildError: something else waits in a FIFO that is here.
        """
        if record.buffer is not None:
            _deliver(os.fsdecode(record.name), file, record.buffer, scope.file(file.index))


def _read_outside(view: FdView, scope: CaptureScope) -> bool:
    """Whether somebody outside has the pipe open for reading, and so may take what waits in it."""
    for pid, fd in outside.same_link(view, scope):
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended, or closed it
            flags = int(procfs.fdinfo(pid, fd)["flags"][0], 8)
            if flags & os.O_ACCMODE != os.O_WRONLY:
                return True
    return False


def _deliver(name: str, file: OpenFile, buffer: Buffer, reader: LocalFd) -> None:
    wanted = b"".join(buffer.unread)
    what = f"{len(wanted)} bytes that the tree had not read yet come before everything else in {name}"
    if not stat.S_ISFIFO(os.fstat(reader).st_mode):
        raise RebuildError(f"{what}, which is no pipe or FIFO")
    waiting = _peek(reader)
    if waiting == wanted:
        return  # a FIFO that somebody has held open meanwhile has kept them
    if waiting:
        raise RebuildError(f"{what}, but {len(waiting)} other bytes wait there")
    writer = open_again(reader, os.O_WRONLY)
    try:
        if fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) >= buffer.capacity_bytes:
            buffer = Buffer(
                capacity_bytes=fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ),
                packets=buffer.packets,
                unread=buffer.unread,
            )
        pipe_buffer.refill(file, buffer, writer)
    finally:
        os.close(writer)
    if not _peek(reader).startswith(wanted):
        raise RebuildError(f"{what}, but somebody wrote into it meanwhile")


def _peek(reader: LocalFd) -> bytes:
    """What waits in a pipe; nothing is consumed."""
    size = pipe_buffer.unread_bytes(reader)
    if not size:
        return b""
    copy = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        capacity = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        fcntl.fcntl(copy[1], fcntl.F_SETPIPE_SZ, capacity)
        left = syscall(NR.tee, reader, copy[1], pipe_buffer.MAX_UNREAD_BYTES, _SPLICE_F_NONBLOCK)
        found = bytearray()
        while len(found) < left:
            found += os.read(copy[0], left)
        return bytes(found)
    finally:
        for fd in copy:
            os.close(fd)


KIND = ExternalEnd()
