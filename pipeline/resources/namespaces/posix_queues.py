"""POSIX message queues of an ipc namespace: attributes, and messages in their order.

The kernel holds for each: name, owner and permissions, how many messages of which size it has room for, messages by
priority and age, and who is to be told (mq_notify(3)) when one arrives in the empty queue.

Nobody can look at a message without taking it. So a process of its own, which no signal reaches and which does not
end with the pipeline, takes all of them and puts them back in the same order, before it tells what they are: whatever
becomes of us, the queue is complete, but for the fraction of a millisecond in which that process has them. The tree
stands still meanwhile; its tasks that wait for a message have left the queue.

Not preserved: times. A program that polls a queue edge-triggered may be told once more.
Refused: a queue with somebody to be told: the value that comes with the signal cannot be read.

Sources: mq_overview(7), mq_notify(3); ipc/mqueue.c: mqueue_read_file, do_mq_timedsend, __do_notify.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import ImageError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.paths import closed_on_error

TELLS = "which tells a process of messages (mq_notify); what it tells with cannot be read"
TELLS_REMEDY = "let the process take that back (mq_notify with NULL)"
RLIMIT_MSGQUEUE = 12
#: struct mq_attr: flags, room for messages, bytes of each, messages that are there, four unused
_ATTRIBUTES = struct.Struct("<4q32x")
_STATUS = re.compile(rb"QSIZE:(\d+)\s+NOTIFY:(\d+)\s+SIGNO:(\d+)\s+NOTIFY_PID:(\d+)")

Name = Annotated[bytes, Meta(min_length=1, max_length=255)]
#: priority and text, in the order in which they are received
Message = tuple[U32, Annotated[bytes, Meta(max_length=1 << 24)]]
Messages = Annotated[list[Message], Meta(max_length=1 << 16)]


class Room(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How many messages a queue has room for, and how long each may be."""

    messages: Annotated[int, Meta(ge=1, le=1 << 16)]
    size_bytes: Annotated[int, Meta(ge=1, le=1 << 24)]


def check_name(name: bytes) -> None:
    """See that a name of an image can be one; raises ImageError."""
    if b"/" in name or b"\0" in name or name in (b"", b".", b".."):
        raise ImageError(f"{name!r} cannot be the name of a message queue")


# -- looking -------------------------------------------------------------------------------


def opened(name: bytes, flags: int) -> LocalFd:
    """The queue of a name in the ipc namespace that the caller is in; the caller owns it. Raises OSError."""
    return LocalFd(syscall(NR.mq_open, name + b"\0", flags | os.O_CLOEXEC, 0, None))


def room_of(queue: int) -> Room:
    """What a queue has room for."""
    return Room(*_attributes(queue)[1:3])


def told(queue: int) -> int:
    """The pid, here, of who is told when a message arrives; 0 for nobody, -1 for somebody.

    `queue` may be any descriptor of it.
    """
    fd = os.open(f"/proc/self/fd/{queue}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        match = _STATUS.match(os.pread(fd, 256, 0))
    finally:
        os.close(fd)
    if match is None:
        return -1
    _, how, number, pid = map(int, match.groups())
    return pid or -bool(how or number)


def _attributes(queue: int) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    syscall(NR.mq_getsetattr, queue, None, buffer)
    return _ATTRIBUTES.unpack(buffer.raw)


def messages_of(open_queues: Callable[[], Sequence[int]]) -> bytes:
    """The messages of queues, as msgpack of `list[Messages]`; for a visitor that is a process (`alone`).

    Args:
        open_queues: opens them for reading and writing, without waiting.

    Raises:
        OSError: EACCES; EINTR and the like are met again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with suppress(OSError):
        os.setsid()
    return msgspec.msgpack.encode([_peek(queue) for queue in open_queues()])


def _peek(queue: int) -> list[Message]:
    """Take all messages and put them back."""
    _, count, size, *_ = _attributes(queue)
    buffer, priority = ctypes.create_string_buffer(size), ctypes.create_string_buffer(4)
    taken: list[Message] = []
    try:
        while len(taken) <= count:
            length = syscall(NR.mq_timedreceive, queue, buffer, size, priority, None)
            taken.append((int.from_bytes(priority.raw, "little"), buffer.raw[:length]))
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
    finally:
        failed = [wrong for one in taken if (wrong := _sent(queue, one)) is not None]
    if failed:
        raise failed[0]
    return taken


def _sent(queue: int, message: Message) -> OSError | None:
    """Put a message back; what hinders one is no reason to drop those behind it."""
    try:
        _send(queue, message)
    except OSError as error:
        return error
    return None


def _send(queue: int, message: Message) -> None:
    priority, text = message
    syscall(NR.mq_timedsend, queue, text, len(text), priority, None)


# -- making --------------------------------------------------------------------------------------


def make(name: bytes, room: Room, messages: Sequence[Message], mode: int) -> LocalFd:
    """Make a queue in the ipc namespace that the caller is in, as who the caller is; the caller owns the descriptor.

    Raises:
        OSError: EEXIST; EMFILE: more bytes than RLIMIT_MSGQUEUE allows; EINVAL: more room than fs/mqueue allows.
    """
    _, hard = resource.getrlimit(RLIMIT_MSGQUEUE)
    resource.setrlimit(RLIMIT_MSGQUEUE, (hard, hard))
    attributes = _ATTRIBUTES.pack(0, room.messages, room.size_bytes, 0)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
    with closed_on_error(LocalFd(syscall(NR.mq_open, name + b"\0", flags, 0o600, attributes))) as queue:
        for message in messages:
            _send(queue, message)
        os.fchmod(queue, mode)
    return queue


def unlink(name: bytes) -> None:
    """Take a queue's name away; it lives on where it is open."""
    syscall(NR.mq_unlink, name + b"\0")


def each(place: str) -> Iterator[tuple[bytes, os.stat_result]]:
    """Names and attributes of the queues that a mount shows."""
    for name in os.listdir(os.fsencode(place)):
        with suppress(FileNotFoundError):
            yield name, os.stat(os.path.join(os.fsencode(place), name))
