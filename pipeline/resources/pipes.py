"""Anonymous pipes (pipe(2)) whose ends are all in the tree.

The kernel holds one inode with a buffer (`pipeline.resources.pipe_buffer`) and open
files that read, write, or both. Kept: which ends exist (a pipe whose writers are all
gone ends after its unread bytes, one without readers answers EPIPE), unread bytes,
packets, capacity, flags of each end, owner and mode of the inode (they count when
/dev/stdout is opened). The record of the end with the lowest index carries the buffer.

Refused: an end outside the tree, by name where it can be found, unless the person who dumps says that it is external
(`pipeline.resources.external_end`); locks; more than 16 MiB
unread; notification pipes. Not preserved: inode number. Source: pipe(7), fs/pipe.c, kernel/watch_queue.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Index, OpenFile, Record
from pipeline.resources import locks, pipe_buffer
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import O_LARGEFILE, describe, open_again
from pipeline.resources.pipe_buffer import Buffer
from pipeline.resources.steps import CompleteOnceCreated

_IOC_WATCH_QUEUE_SET_SIZE = 0x5760


class PipeState(Record, frozen=True, kw_only=True):
    """`pipe`: index of the open file that stands for the pipe; `buffer` only in that one's record."""

    pipe: Index
    uid: Id
    gid: Id
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    buffer: Buffer | None = None


class Pipe(CompleteOnceCreated):
    """See the module."""

    name = "pipe"
    record: type[PipeState] = PipeState
    carried: Sequence[str] = ("both ends, unread bytes, packet mode, capacity, closed ends, owner",)
    refused: Sequence[str] = (
        "a pipe with an end outside the tree, unless the dump is told so",
        "more than 16 MiB unread",
        "notification pipes",
    )
    shown_by: Sequence[str] = (
        "programs/pipes.py",
        "resources/test_pipes.py",
    )

    def matches(self, view: FdView) -> bool:
        """A FIFO inode without a path."""
        return (
            stat.S_ISFIFO(view.stat.st_mode)
            and view.link.startswith(b"pipe:[")
            and not view.flags & os.O_PATH
        )

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Every end must be in the tree."""
        if _notifies(view):
            why = "it is a notification pipe (O_NOTIFICATION_PIPE): the kernel itself writes into it"
            yield Blocker(view.subject, why, "close it")
            return
        yield from pipe_buffer.outside_ends(view, scope, one_sided=True)
        yield from pipe_buffer.check(view)
        yield from locks.check(view, scope, carried=False)

    def capture(self, view: FdView, scope: CaptureScope) -> PipeState:
        """Which pipe; for its first end also what is in it."""
        group = pipe_buffer.ends(view, scope)
        first = group[0][0]
        return PipeState(
            pipe=first,
            uid=scope.user(view.stat.st_uid),
            gid=scope.group(view.stat.st_gid),
            mode=stat.S_IMODE(view.stat.st_mode),
            buffer=pipe_buffer.capture(group) if scope.file_at(view.pid, view.fd) == first else None,
        )

    def create(self, file: OpenFile, record: PipeState, scope: CreateScope) -> LocalFd:
        """One end of the pipe, which is made with the first end that is asked for.

        Raises:
            RebuildError: the owner of the pipe cannot be set here.
        """
        try:
            pair = scope.once(("pipe", record.pipe), lambda: _make(record, scope))
            access = file.flags & os.O_ACCMODE
            if access == os.O_RDWR or file.flags & O_LARGEFILE:  # opened through /proc or /dev/stdout
                return open_again(pair[0], file.flags)
            return LocalFd(os.dup(pair[1] if access == os.O_WRONLY else pair[0]))
        except OSError as error:
            raise RebuildError(f"{describe(file)} cannot be made: {error.strerror}") from error

    def connect(self, file: OpenFile, record: PipeState, scope: CreateScope) -> None:
        """Capacity and unread bytes."""
        if record.buffer is not None:
            _, writer = scope.once(("pipe", record.pipe), lambda: _make(record, scope))
            pipe_buffer.refill(file, record.buffer, writer)


def _notifies(view: FdView) -> bool:
    """Whether keys and mounts tell of changes through the pipe. Asked for no messages, every pipe says no."""
    try:
        fcntl.ioctl(view.local, _IOC_WATCH_QUEUE_SET_SIZE, 0)
    except OSError as error:
        return error.errno not in (errno.ENOTTY, errno.ENODEV)
    return True


def _make(record: PipeState, scope: CreateScope) -> tuple[LocalFd, LocalFd]:
    """A new pipe; both descriptors belong to the scope."""
    reader, writer = (scope.own(LocalFd(fd)) for fd in os.pipe2(os.O_CLOEXEC))
    uid, gid = scope.user(record.uid), scope.group(record.gid)
    found = os.fstat(reader)
    if (found.st_uid, found.st_gid) != (uid, gid):
        os.fchown(reader, uid, gid)
    if stat.S_IMODE(found.st_mode) != record.mode:
        os.fchmod(reader, record.mode)
    return reader, writer


KIND = Pipe()
