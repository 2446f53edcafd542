"""FIFOs: pipes with a name, whose open ends are all in the tree.

The kernel holds a directory entry and, while anybody has it open, a buffer as of a
pipe (`pipeline.resources.pipe_buffer`). Kept: which ends are open with which flags,
unread bytes, packets, capacity; also whether a reader that found no writer yet still
waits for the first one (poll then says nothing) or saw the last one go (poll says hang-up).
The FIFO itself must be at the destination, empty and unused. One whose name was removed is made anew in its
directory (or where the restorer has room), opened, and removed again, with the owner and mode that it had.

Nothing here waits for an other end: while ends are opened, the scope holds one that
reads and writes. Refused: an end outside the tree, a name that leads elsewhere, one that was removed where there
are others, locks.
Source: fifo(7), fs/pipe.c `fifo_open`.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Index, OpenFile, PathRef, Record
from pipeline.resources import locks, pipe_buffer
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import (
    DELETED,
    NAME_REMOVED,
    closed_on_error,
    describe,
    misnamed,
    open_again,
    reopen,
)
from pipeline.resources.pipe_buffer import Buffer
from pipeline.resources.steps import CompleteOnceCreated

#: names that are tried for a moment, where that of a removed FIFO is taken
_MOST_NAMES = 100


class RemovedFifo(Record, frozen=True, kw_only=True):
    """What is left of a FIFO without a name."""

    uid: Id
    gid: Id
    mode: Annotated[int, Meta(ge=0, le=0o7777)]


class FifoState(Record, frozen=True, kw_only=True):
    """`fifo`: index of the open file that stands for it; `buffer` only in that one's record.

    `waiting`: its readers never saw a writer, there is none, and nothing is unread. `removed`: it has no name any more.
    """

    path: PathRef
    fifo: Index
    waiting: bool = False
    buffer: Buffer | None = None
    removed: RemovedFifo | None = None


class Fifo(CompleteOnceCreated):
    """See the module."""

    name = "fifo"
    record: type[FifoState] = FifoState
    carried: Sequence[str] = (
        "open ends, unread bytes, packet mode, capacity",
        "FIFOs whose name was removed",
    )
    refused: Sequence[str] = (
        "a FIFO with an end outside the tree, unless the dump is told so",
        "one whose name was removed, if it has others",
    )
    shown_by: Sequence[str] = (
        "programs/pipes.py",
        "resources/test_pipes.py",
    )

    def matches(self, view: FdView) -> bool:
        """A FIFO inode with a path."""
        return stat.S_ISFIFO(view.stat.st_mode) and view.link.startswith(b"/") and not view.flags & os.O_PATH

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it, and every end must be in the tree."""
        wrong = misnamed(view)
        if wrong and wrong != NAME_REMOVED:
            yield Blocker(view.subject, f"the FIFO cannot be opened again by name: {wrong}", "close it")
        elif wrong and view.stat.st_nlink:
            why = "the name it was opened by was removed, and others that it has (hard links) are not known"
            yield Blocker(view.subject, why, "open the FIFO by another name")
        yield from outside_ends(view, scope)
        yield from pipe_buffer.check(view)
        yield from locks.check(view, scope, carried=False)

    def capture(self, view: FdView, scope: CaptureScope) -> FifoState:
        """Name and state; for its first end also what is in it."""
        group = pipe_buffer.ends(view, scope)
        first = group[0][0]
        alone = not any(pipe_buffer.writes(end) for _, end in group)
        removed = None
        if misnamed(view) == NAME_REMOVED:
            removed = RemovedFifo(
                uid=scope.user(view.stat.st_uid),
                gid=scope.group(view.stat.st_gid),
                mode=stat.S_IMODE(view.stat.st_mode),
            )
        return FifoState(
            path=scope.path(view.namer, view.link.removesuffix(DELETED) if removed else view.link),
            removed=removed,
            fifo=first,
            waiting=alone and pipe_buffer.has_writers(view) and not pipe_buffer.unread_bytes(view.local),
            buffer=pipe_buffer.capture(group) if scope.file_at(view.pid, view.fd) == first else None,
        )

    def create(self, file: OpenFile, record: FifoState, scope: CreateScope) -> LocalFd:
        """Open one end.

        Raises:
            RebuildError: the FIFO is missing, in use, or something else.
        """
        if record.removed is not None:
            removed = record.removed
            end = scope.once(_key(record), lambda: _make_removed(file, record, removed, scope))
            return open_again(end, file.flags)
        if not record.waiting:
            scope.once(_key(record), lambda: _keep_open(file, record, scope))
        with closed_on_error(reopen(file, record.path, file.flags, scope)) as fd:
            if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                raise RebuildError(f"{describe(file, record.path)} is not a FIFO here")
            if record.waiting and pipe_buffer.unread_bytes(fd):
                raise RebuildError(f"{describe(file, record.path)} is in use: there are unread bytes in it")
        return fd

    def connect(self, file: OpenFile, record: FifoState, scope: CreateScope) -> None:
        """Capacity and unread bytes."""
        if record.buffer is None:
            return
        if record.waiting:  # nothing is unread: any end will do to set the capacity
            end = scope.file(file.index)
        else:
            end = scope.once(_key(record), lambda: _keep_open(file, record, scope))
        pipe_buffer.refill(file, record.buffer, end)


def _key(record: FifoState) -> tuple[str, int]:
    return "fifo", record.fifo


def _make_removed(file: OpenFile, record: FifoState, wanted: RemovedFifo, scope: CreateScope) -> LocalFd:
    """An end of a FIFO without a name, held by the scope.

    Raises:
        RebuildError: it cannot be made.
    """
    directory, name = os.path.split(record.path.path)

    def make(place: LocalFd) -> LocalFd:
        try:
            return _make_and_remove(place, name, record.waiting, wanted, scope)
        finally:
            os.close(place)

    how = os.O_PATH | os.O_DIRECTORY
    try:
        try:
            return make(scope.open(PathRef(record.path.mntns, directory or b"/"), how))
        except OSError:  # it is not there, or nothing can be made in it
            return make(LocalFd(os.open(tempfile.gettempdir(), how | os.O_CLOEXEC)))
    except OSError as error:
        raise RebuildError(
            f"{describe(file, record.path)}, which has no name, cannot be made: {error.strerror}"
        ) from error


def _make_and_remove(
    place: LocalFd, name: bytes, waiting: bool, wanted: RemovedFifo, scope: CreateScope
) -> LocalFd:
    used = name
    for number in range(_MOST_NAMES):
        try:
            os.mkfifo(used, 0o600, dir_fd=place)
            break
        except FileExistsError:
            used = b".pipeline-%d-%d" % (os.getpid(), number)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    try:
        access = os.O_RDONLY if waiting else os.O_RDWR
        how = access | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = scope.own(LocalFd(os.open(used, how, dir_fd=place)))
    finally:
        os.unlink(used, dir_fd=place)
    found = os.fstat(fd)
    if not stat.S_ISFIFO(found.st_mode) or found.st_nlink:
        # somebody who may write there has put it in its place
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.fchown(fd, scope.user(wanted.uid), scope.group(wanted.gid))
    os.fchmod(fd, wanted.mode)
    return fd


def outside_ends(view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
    """What says that the FIFO has an end outside the tree."""
    group = pipe_buffer.ends(view, scope)
    # a reader that never saw a writer looks to poll like one whose writer is elsewhere
    one_sided = any(pipe_buffer.writes(end) for _, end in group)
    yield from pipe_buffer.outside_ends(view, scope, one_sided)


def _keep_open(file: OpenFile, record: FifoState, scope: CreateScope) -> LocalFd:
    """An end that reads and writes, held by the scope until all ends have their places."""
    with closed_on_error(reopen(file, record.path, os.O_RDWR, scope)) as keeper:
        if not stat.S_ISFIFO(os.fstat(keeper).st_mode):
            raise RebuildError(f"{describe(file, record.path)} is not a FIFO here")
        if pipe_buffer.unread_bytes(keeper):
            raise RebuildError(f"{describe(file, record.path)} is in use: there are unread bytes in it")
    return scope.own(keeper)


KIND = Fifo()
