"""Looking at the POSIX message queues of an ipc namespace, for visitors that are in it.

What they are, and how messages are seen: `pipeline.resources.namespaces.posix_queues`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.image.schema import Id
from pipeline.kernel.syscalls import CLONE, mount, unshare
from pipeline.resources.kinds import FdView
from pipeline.resources.namespaces import posix_queues
from pipeline.resources.namespaces.ipc import Permissions, PosixQueue
from pipeline.resources.paths import same_inode
from pipeline.userns.visit import Way, visit

_PRIVATE_RECURSIVE = 0x40000 | 0x4000


def look(userns: int) -> Iterator[tuple[PosixQueue, int]]:
    """The queues of an ipc namespace without their messages, and whom each tells; for a visitor that is there.

    Args:
        userns: the index of the visitor's user namespace, which ids get.
    """
    for name, found in posix_queues.each(mount_mqueue()):
        uid, gid = Id(userns, found.st_uid), Id(userns, found.st_gid)
        try:
            fd = posix_queues.opened(name, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            permissions = Permissions(0, found.st_mode & 0o777, uid, gid, uid, gid)
            yield PosixQueue(name, permissions, posix_queues.room_of(fd)), posix_queues.told(fd)
        finally:
            os.close(fd)


def blockers(subject: str, telling: Sequence[bytes], unmapped: Sequence[bytes]) -> Iterator[Blocker]:
    """Refuse queues by name that tell somebody of messages, or that are of somebody without a number."""
    holds = "its ipc namespace holds POSIX message queue"
    for name in telling:
        why = f"{holds} /{os.fsdecode(name)}, {posix_queues.TELLS}"
        yield Blocker(subject, why, posix_queues.TELLS_REMEDY)
    for name in unmapped:
        why = f"{holds} /{os.fsdecode(name)} of an id that its user namespace does not map"
        yield Blocker(subject, why, "remove it")


def is_here(view: FdView) -> bool:
    """Whether an open queue is of the ipc namespace of the pipeline, and that of the process too.

    Who may not mount its queues (a plain user) knows only those that have a name.
    """
    if not os.path.samefile(f"/proc/{view.pid}/ns/ipc", "/proc/self/ns/ipc"):
        return False
    try:
        return mqueue_device([]) == view.stat.st_dev
    except PermissionError:
        pass
    try:
        fd = posix_queues.opened(os.path.basename(view.link), view.flags & os.O_ACCMODE)
    except OSError as error:
        raise_if_exhausted(error)
        return False
    try:
        return same_inode(os.fstat(fd), view.stat)
    finally:
        os.close(fd)


def mount_mqueue() -> str:
    """Mount the message queues of the ipc namespace that the caller is in, where only the caller sees them."""
    unshare(CLONE.NEWNS)
    mount(None, b"/", None, _PRIVATE_RECURSIVE)
    mount(b"mqueue", b"/proc/fs", b"mqueue", 0)
    return "/proc/fs"


def mqueue_device(way: Way) -> int:
    """st_dev of the mqueue file system of an ipc namespace; there is one for each."""
    return int(visit(way, lambda: b"%d" % os.stat(mount_mqueue()).st_dev))


def with_messages(queues: list[PosixQueue], way: Way) -> list[PosixQueue]:
    """The queues of a frozen tree's namespace with their messages. Raises OSError: the namespace cannot be joined."""
    if not queues:
        return []

    def open_all() -> list[int]:
        return [posix_queues.opened(queue.name, os.O_RDWR | os.O_NONBLOCK) for queue in queues]

    answer = visit(way, lambda: posix_queues.messages_of(open_all), alone=True)
    found = msgspec.msgpack.decode(answer, type=list[posix_queues.Messages])
    return [replace(queue, messages=messages) for queue, messages in zip(queues, found, strict=True)]
