"""Looking at the queue of a unix socket of a live target: what is borrowed for it is given back.

A walk (`pipeline.resources.unix_unread`) borrows SO_PEEK_OFF and SO_PASSCRED: a child takes them and gives them
back, whatever happens to the pipeline; what is in flight comes from the child as it came to it, by SCM_RIGHTS.

Source: socket(7), unix(7).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from itertools import islice

from msgspec import Struct, msgpack
from msgspec.structs import replace

from pipeline.errors import Blocker, Refused, raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.resources.shielded import Shield, shielded
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.unix_state import MAX_FILES, MAX_MESSAGE_BYTES
from pipeline.resources.unix_unread import (
    TooSmall,
    Unread,
    Walk,
    bytes_to_read,
    give_back,
    too_many,
)

_FIRST_BUFFER_BYTES = 1 << 18


class _Told(Struct):
    """What the child answers of one socket; descriptors come by a socket, in the same order."""

    found: list[Unread] = []
    refused: Blocker | None = None

    def unread(self) -> list[Unread]:
        """What was found.

        Raises:
            Refused: see `look`.
        """
        if self.refused is not None:
            raise Refused([self.refused])
        return self.found


_DECODER = msgpack.Decoder(list[_Told])


def look(sock: socket.socket, subject: str) -> list[Unread]:
    """Every unread message of a socket with descriptors in flight in its queue.

    Args:
        sock: a duplicate of the target's socket, which is frozen. It must have no error pending, or be a
            stream: looking would take the error away from the target.
        subject: how a message names it.

    Ownership: the descriptors in `Unread.files` are the caller's.

    Raises:
        Refused: a message is too long, or more descriptors are in flight than can be held here.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            answer = shielded(lambda: _walked(sock, subject, theirs))
        except OSError as error:
            raise_if_exhausted(error)
            raise Refused([_failed(subject, error)]) from error
        (told,) = _DECODER.decode(answer)
        return _received(told.unread(), ours, subject)


def look_at_all(socks: Sequence[tuple[LocalFd, str]], shield: Shield) -> list[Callable[[], list[Unread]]]:
    """The same of several sockets that have no descriptors in flight, by one child: returns what `look` would, each."""
    answer = shield.run(_walk_all, [fd for fd, _ in socks], [subject for _, subject in socks])
    return [told.unread for told in _DECODER.decode(answer)]


def _walk_all(fds: Sequence[LocalFd], subjects: Sequence[str]) -> bytes:
    return msgpack.encode([_walk(fd, subject) for fd, subject in zip(fds, subjects, strict=True)])


def _walk(fd: LocalFd, subject: str) -> _Told:
    with borrowed(fd) as sock:
        return _from_start_to_end(sock, subject, with_files=False)


def _walked(sock: socket.socket, subject: str, to: socket.socket) -> bytes:
    told = _from_start_to_end(sock, subject, with_files=True)
    fds = [fd for unread in told.found for fd in unread.files]
    to.setblocking(False)  # nobody receives before this child has ended
    for start in range(0, len(fds), MAX_FILES):
        socket.send_fds(to, [b"f"], fds[start : start + MAX_FILES])
    return msgpack.encode([told])


def _from_start_to_end(sock: socket.socket, subject: str, with_files: bool) -> _Told:
    """Walk; runs in a child."""
    size = _FIRST_BUFFER_BYTES
    if sock.type == socket.SOCK_STREAM:
        size = max(bytes_to_read(sock), 1)  # a message that is cut would show its descriptors twice
    while size <= MAX_MESSAGE_BYTES:
        walk = Walk(sock, size, subject, with_files)
        try:
            with walk.from_the_start():
                walk.run()
            return _Told(walk.found)
        except TooSmall:
            walk.close()
            size *= 4
        except Refused as refused:
            return _Told(refused=refused.blockers[0])
        except OSError as error:
            return _Told(refused=_failed(subject, error))
    return _Told(refused=Blocker(subject, "a message of more than 64 MiB waits to be read"))


def _failed(subject: str, error: OSError) -> Blocker:
    why = f"its queue cannot be looked at: {error.strerror}"
    return Blocker(subject, why, transient=error.errno == errno.ETOOMANYREFS)


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
