"""Looking at the queue of a unix socket of a live target: what is borrowed for it is given back.

Most streams show all that is in them to one look, for which nothing is borrowed. For a walk
(`pipeline.resources.unix_unread`) SO_PEEK_OFF is: a child takes it and gives it back, whatever happens to the
pipeline; what is in flight comes from the child as it came to it, by SCM_RIGHTS.

Source: socket(7), unix(7).
"""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from itertools import islice

from msgspec import Struct, msgpack

from pipeline.errors import Blocker, Refused
from pipeline.resources.shielded import shielded
from pipeline.resources.unix_state import MAX_FILES, MAX_MESSAGE_BYTES
from pipeline.resources.unix_unread import (
    SO_PEEK_OFF,
    TooSmall,
    Unread,
    Walk,
    at_mark,
    bytes_to_read,
    give_back,
    too_many,
)

_FIRST_BUFFER_BYTES = 1 << 18


def look(sock: socket.socket, subject: str, with_files: bool) -> list[Unread]:
    """Every unread message of a socket that has some.

    Args:
        sock: a duplicate of the target's socket, which is frozen. It must have no error pending, or be a
            stream: looking would take the error away from the target.
        subject: how a message names it.
        with_files: descriptors are in flight in its queue.

    Ownership: the descriptors in `Unread.files` are the caller's.

    Raises:
        Refused: a message is too long, or more descriptors are in flight than can be held here.
    """
    if sock.type == socket.SOCK_STREAM and not with_files:
        found = _at_once(sock)
        if found is not None:
            return [found]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            answer = shielded(lambda: _walked(sock, subject, with_files, theirs))
        except OSError as error:
            why = f"its queue cannot be looked at: {error.strerror}"
            raise Refused([Blocker(subject, why, transient=error.errno == errno.ETOOMANYREFS)]) from error
        told = _DECODER.decode(answer)
        if told.refused is not None:
            raise Refused([told.refused])
        return _received(told.found, ours, subject)


def _at_once(sock: socket.socket) -> Unread | None:
    """Everything in a stream if one look shows it, for which nothing has to be borrowed."""
    left = bytes_to_read(sock)
    if sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) >= 0 or not left or at_mark(sock):
        return None
    walk = Walk(sock, left, "", with_files=False)
    found = walk.next(left)
    return found if found is not None and len(found.data) == left and not walk.urgent else None


class _Told(Struct):
    """What the child answers; descriptors come by a socket, in the same order."""

    found: list[Unread] = []
    refused: Blocker | None = None


_DECODER = msgpack.Decoder(_Told)


def _walked(sock: socket.socket, subject: str, with_files: bool, to: socket.socket) -> bytes:
    """Walk; runs in a child."""
    size = _FIRST_BUFFER_BYTES
    if sock.type == socket.SOCK_STREAM:
        size = max(bytes_to_read(sock), 1)  # a message that is cut would show its descriptors twice
    while True:
        walk = Walk(sock, size, subject, with_files)
        try:
            with walk.from_the_start():
                walk.run()
            break
        except TooSmall:
            walk.close()
            size *= 4
            if size > MAX_MESSAGE_BYTES:
                return msgpack.encode(
                    _Told(refused=Blocker(subject, "a message of more than 64 MiB waits to be read"))
                )
        except Refused as refused:
            return msgpack.encode(_Told(refused=refused.blockers[0]))
    fds = [fd for unread in walk.found for fd in unread.files]
    to.setblocking(False)  # nobody receives before this child has ended
    for start in range(0, len(fds), MAX_FILES):
        socket.send_fds(to, [b"f"], fds[start : start + MAX_FILES])
    return msgpack.encode(_Told(found=walk.found))


def _received(found: list[Unread], ours: socket.socket, subject: str) -> list[Unread]:
    """The same messages with descriptors of this process."""
    count = sum(len(unread.files) for unread in found)
    fds: list[int] = []
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    try:
        while len(fds) < count:
            _, some, told, _ = socket.recv_fds(ours, 1, MAX_FILES, flags)
            fds += some
            if told & socket.MSG_CTRUNC or not some:
                raise too_many(subject)
    except BaseException:
        give_back(fds)
        raise
    left = iter(fds)
    return [replace(unread, files=tuple(islice(left, len(unread.files)))) for unread in found]
