"""Open POSIX message queues (mq_open(3)), and files of a mounted mqueue file system.

A queue belongs to an ipc namespace. One with a name is made again with the namespace, messages and all
(`pipeline.resources.namespaces.posix_queues`), if that is the tree's; one of the surroundings is like a file of
theirs, and must be there. It is opened again by name: in the namespace for what mq_open(3) opened, through the mount
for what open(2) did. A queue whose name was removed lives as long as it is open: attributes and messages travel with
the open file.

Refused: a queue without a name that others have open, too; one that tells somebody of messages.
Not preserved: who made a queue without a name, and that O_LARGEFILE is not in its flags.
Sources: mq_overview(7); ipc/mqueue.c.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Index, OpenFile, PathRef, Record
from pipeline.kernel.statfs import Magic
from pipeline.resources import outside
from pipeline.resources.acting import acting_as
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.namespaces import posix_queues
from pipeline.resources.namespaces.posix_queues import Messages, Name, Room
from pipeline.resources.paths import DELETED, closed_on_error, describe, misnamed, open_again, reopen, seek
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.userns.visit import visit


class QueueOwner(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose it is, and permission bits."""

    uid: Id
    gid: Id
    mode: Annotated[int, Meta(ge=0, le=0o777)]


class MqueueState(Record, frozen=True, kw_only=True):
    """A queue of ipc namespace `ipc`. `path`: it was opened through a mount.

    `number` of the queue, `owner` and `messages` are there only for one without a name.
    """

    ipc: Index
    name: Name
    room: Room
    path: PathRef | None = None
    number: Index | None = None
    owner: QueueOwner | None = None
    messages: Messages = []


def _name(view: FdView) -> bytes:
    return os.path.basename(view.link.removesuffix(DELETED) if not view.stat.st_nlink else view.link)


def _through_mount(view: FdView) -> bool:
    return os.path.dirname(view.link) != b"/"


class Mqueue(CompleteOnceCreated):
    """See the module."""

    name = "mqueue"
    record: type[MqueueState] = MqueueState
    carried: Sequence[str] = (
        "POSIX message queues of the tree's and of the external ipc namespace, by name",
        "queues without a name, with their messages",
    )
    refused: Sequence[str] = (
        "a queue that tells somebody of messages (mq_notify)",
        "a queue that somebody outside has open, unless it is external itself",
    )
    shown_by: Sequence[str] = (
        "programs/queues.py",
        "resources/test_mqueue.py",
    )

    def matches(self, view: FdView) -> bool:
        """By filesystem."""
        if not stat.S_ISREG(view.stat.st_mode) or view.flags & os.O_PATH:
            return False
        return view.filesystem == Magic.MQUEUE

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its namespace must be known, its name lead to it, and nobody be told."""
        ipc = scope.queues_of(view)
        if ipc is None:
            yield Blocker(
                view.subject, "the message queue is of an ipc namespace that is not the tree's", "close it"
            )
            return
        try:
            told = posix_queues.told(view.local)
        except PermissionError:
            why = "whether the message queue tells a process of messages may not be read"
            yield Blocker(view.subject, why, "run as root, or permit reading it")
        else:
            if told and (scope.member(told) or not scope.is_external(ipc)):
                why = f"it is a message queue {posix_queues.TELLS}"
                yield Blocker(view.subject, why, posix_queues.TELLS_REMEDY)
        wrong = misnamed(view) if _through_mount(view) and view.stat.st_nlink else None
        if wrong:
            yield Blocker(
                view.subject, f"the message queue cannot be opened again by name: {wrong}", "close it"
            )
        if not view.stat.st_nlink or not scope.is_external(ipc):
            yield from outside.blockers(view, outside.same_link(view, scope), "the message queue is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> MqueueState:
        """Its name, or what it holds.

        Raises:
            TargetError: it changed since it was checked.
            OSError: EACCES: a queue without a name may not be read.
        """
        ipc = scope.queues_of(view)
        assert ipc is not None
        state = MqueueState(ipc=ipc, name=_name(view), room=posix_queues.room_of(view.local))
        if view.stat.st_nlink:
            path = scope.path(view.namer, view.link) if _through_mount(view) else None
            return msgspec.structs.replace(state, path=path)
        seen = scope.peers().setdefault("mqueue", {})
        key = (view.stat.st_dev, view.stat.st_ino)
        if key not in seen:
            owner = QueueOwner(
                scope.user(view.stat.st_uid), scope.group(view.stat.st_gid), view.stat.st_mode & 0o777
            )
            seen[key] = msgspec.structs.replace(
                state, number=len(seen), owner=owner, messages=_messages(view)
            )
        found: MqueueState = seen[key]
        return found

    def create(self, file: OpenFile, record: MqueueState, scope: CreateScope) -> LocalFd:
        """Open it.

        Raises:
            RebuildError: it is not there, or has another size.
        """
        posix_queues.check_name(record.name)
        try:
            if record.number is not None and record.owner is not None:
                owner = record.owner
                made = scope.once(("mqueue", record.number), lambda: _make(record, owner, scope))
                return open_again(made, file.flags)
            if record.path is not None:
                fd = reopen(file, record.path, file.flags, scope)
            else:
                flags = file.flags & os.O_ACCMODE | os.O_NONBLOCK
                fd = scope.in_ipc(record.ipc, lambda: posix_queues.opened(record.name, flags))
            with closed_on_error(fd):
                found = posix_queues.room_of(fd)
                if found != record.room:
                    raise RebuildError(
                        f"{describe(file)} /{os.fsdecode(record.name)} has room for {found.messages} messages of "
                        f"{found.size_bytes} bytes here, not {record.room.messages} of {record.room.size_bytes}"
                    )
                return fd
        except OSError as error:
            name = os.fsdecode(record.name)
            raise RebuildError(f"{describe(file)} /{name} cannot be opened: {error.strerror}") from error

    def connect(self, file: OpenFile, record: MqueueState, scope: CreateScope) -> None:
        """What was read of its state."""
        if file.position:
            seek(file, scope)


def _messages(view: FdView) -> list[posix_queues.Message]:
    """The messages of a queue that only its descriptors lead to."""

    def again() -> list[int]:
        return [os.open(f"/proc/self/fd/{view.local}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)]

    answer = visit([], lambda: posix_queues.messages_of(again), alone=True)
    (found,) = msgspec.msgpack.decode(answer, type=list[Messages])
    return found


def _make(record: MqueueState, owner: QueueOwner, scope: CreateScope) -> LocalFd:
    """Make a queue and take its name away, owned by the scope. Another one may have that name by now."""

    def make() -> int:
        for name in (record.name, b"%s~%d" % (record.name[:200], os.getpid())):
            with suppress(FileExistsError):
                fd = posix_queues.make(name, record.room, record.messages, owner.mode)
                with closed_on_error(fd):
                    posix_queues.unlink(name)
                return fd
        raise RebuildError(
            f"message queue {os.fsdecode(record.name)}, without a name, finds none to be made under"
        )

    uid, gid = scope.user(owner.uid), scope.group(owner.gid)
    return scope.own(scope.in_ipc(record.ipc, lambda: acting_as(make, euid=uid, egid=gid)))


KIND = Mqueue()
