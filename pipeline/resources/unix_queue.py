"""Unread messages of unix sockets: looked at without taking them, and sent again.

SO_PEEK_OFF makes MSG_PEEK walk through the queue; it is set for the walk and put back.
An empty queue is not walked. A message of length zero is found by the first walk only,
and not at all behind a shutdown for reading (there recvmsg answers 0 for ever): the
kernel offers nothing better.

Senders' credentials are seen (and kept) where the receiver has SO_PASSCRED. The name of a
sender is that of the sending *socket* when the message is read, so a message is sent
again from that socket, or from one that has its name.

Source: unix(7), socket(7); net/unix/af_unix.c (unix_stream_read_generic).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import Blocker, RebuildError, Refused
from pipeline.resources.kinds import CaptureScope, CreateScope
from pipeline.resources.unix_state import MAX_MESSAGE_BYTES, Message, Peer, raw_name

_SO_PEEK_OFF = 42
_SO_SNDBUFFORCE = 32
_SCM_RIGHTS = 1
_SCM_CREDENTIALS = 2
_SCM_PIDFD = 4
_FIRST_BUFFER_BYTES = 1 << 18
_CONTROL_BYTES = 4096
_UCRED = struct.Struct("<iII")


class _TooSmall(Exception):
    """A message did not fit into the buffer."""


@contextmanager
def _from_the_start(sock: socket.socket) -> Iterator[None]:
    before = sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, before)


def peek(sock: socket.socket, queued: int, closed: bool, subject: str, scope: CaptureScope) -> list[Message]:
    """Every unread message of a socket that has some.

    Args:
        sock: a duplicate of the target's socket, which is frozen. It must have no error pending, or be a
            stream: looking would take the error away from the target.
        queued: unread bytes of a stream, behind which nobody may look (an error may be pending there).
        closed: the socket is shut down for reading: an empty answer is the end.

    Raises:
        Refused: a message holds descriptors, is too long, or was sent by a process outside the tree
            whose credentials it carries.
    """
    size = _FIRST_BUFFER_BYTES
    while True:
        try:
            with _from_the_start(sock):
                return list(_walk(sock, queued, closed, size, subject, scope))
        except _TooSmall:
            size *= 4
            if size > MAX_MESSAGE_BYTES:
                raise Refused([Blocker(subject, "a message of more than 64 MiB waits to be read")]) from None


def _walk(
    sock: socket.socket, queued: int, closed: bool, size: int, subject: str, scope: CaptureScope
) -> Iterator[Message]:
    stream = sock.type == socket.SOCK_STREAM
    buffer = bytearray(size)
    seen = 0
    while not stream or seen < queued:
        try:
            length, control, flags, sender = sock.recvmsg_into(
                [buffer],
                _CONTROL_BYTES,
                socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return
        credentials = _credentials(control, subject, scope)
        if not length and (stream or closed):
            return
        if flags & socket.MSG_TRUNC:
            raise _TooSmall
        seen += length
        yield Message(bytes(buffer[:length]), b"" if stream else raw_name(sender), credentials)


def _credentials(control: list[tuple[int, int, bytes]], subject: str, scope: CaptureScope) -> Peer | None:
    """The sender as far as the message tells; descriptors that came with it are closed."""
    found = None
    for level, kind, data in control:
        if level != socket.SOL_SOCKET:
            continue
        if kind in (_SCM_RIGHTS, _SCM_PIDFD):
            received = struct.unpack(f"<{len(data) // 4}i", data[: len(data) & ~3])
            for fd in received:
                os.close(fd)
            raise Refused([Blocker(subject, f"{len(received)} descriptor(s) are in flight in its queue")])
        if kind == _SCM_CREDENTIALS:
            pid, uid, gid = _UCRED.unpack(data[: _UCRED.size])
            if pid:
                found = Peer(scope.member(pid), scope.user(uid), scope.group(gid))
                if not found.pid:
                    raise Refused(
                        [
                            Blocker(
                                subject,
                                f"an unread message carries the credentials of pid {pid} outside the tree",
                                "wait until it is read",
                                transient=True,
                            )
                        ]
                    )
    return found


def send(
    sender: socket.socket, message: Message, subject: str, scope: CreateScope, to: bytes | str = b""
) -> None:
    """Send a recorded message again, whole; gives the sender a larger buffer if it needs one.

    Args:
        sender: connected, or `to` says where.

    Raises:
        RebuildError: the queue does not take it.
    """
    control = []
    if message.credentials is not None:
        who = message.credentials
        ucred = _UCRED.pack(scope.host_pid(who.pid), scope.user(who.uid), scope.group(who.gid))
        control.append((socket.SOL_SOCKET, _SCM_CREDENTIALS, ucred))
    view = memoryview(message.data)
    try:
        while True:
            sent = _send_some(sender, view, control, to)
            view = view[sent:]
            if not view:
                return
    except OSError as error:
        raise RebuildError(
            f"{subject}: an unread message of {len(message.data)} bytes cannot be sent again: {error.strerror}"
            + (" (raise net.unix.max_dgram_qlen)" if error.errno == errno.EAGAIN and to else "")
        ) from error


def _send_some(
    sender: socket.socket, view: memoryview, control: list[tuple[int, int, bytes]], to: bytes | str
) -> int:
    arguments = ([view], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    try:
        return sender.sendmsg(*arguments, *([to] if to else []))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EMSGSIZE, errno.ENOBUFS):
            raise
    room = sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) + 4 * len(view) + (1 << 20)
    room = min(room, 0x3FFF_FFFF)
    try:
        sender.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, room)
    except PermissionError:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    return sender.sendmsg(*arguments, *([to] if to else []))
