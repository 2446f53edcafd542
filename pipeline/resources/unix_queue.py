"""Unread messages of unix sockets as records, and sent again.

Senders' credentials are kept with every message that has them: where one end asked for them when it was sent, or
the sender told them. The name of a
sender is that of the sending *socket* when the message is read, so a message is sent
again from that socket, or from one that has its name.

Open files in flight (SCM_RIGHTS) are open files of the image like any other; when queues are filled all of them
exist, so a socket that is in flight in its own queue is nothing special.

Source: unix(7), socket(7); net/unix/af_unix.c, net/core/scm.c.
"""

from __future__ import annotations

import array
import errno
import select
import socket
import struct
from collections.abc import Callable, Sequence

from pipeline.errors import Blocker, RebuildError, Refused
from pipeline.ids import LocalFd
from pipeline.image.schema import Index
from pipeline.kernel.sockdiag import State
from pipeline.resources import external_end, sockets, unix_inside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.unix_look import look_at_all
from pipeline.resources.unix_state import Message, Peer
from pipeline.resources.unix_table import table_of
from pipeline.resources.unix_unread import Unread

_SO_SNDBUFFORCE = 32
_SCM_RIGHTS = 1
_SCM_CREDENTIALS = 2
_UCRED = struct.Struct("<iII")


def capture(index: Index, view: FdView, scope: CaptureScope) -> list[Message]:
    """Every unread message of a socket.

    Raises:
        Refused: a message is too long, or carries credentials of a process outside the tree.
    """
    if not _is_filled(view, scope):
        return []
    known = scope.unread(view)
    if known is None:
        known = _all_without_files(scope)[index]()
    return [
        Message(
            data=unread.data,
            sender=unread.sender,
            credentials=_credentials(unread, view.subject, scope),
            files=list(unread.files),
            mark=unread.mark,
        )
        for unread in known
    ]


def _is_filled(view: FdView, scope: CaptureScope) -> bool:
    """Whether a socket has messages, and not only an error, the end of a connection, or clients that wait."""
    diag = table_of(scope).find(view.stat.st_ino)
    if diag is None or diag.state == State.LISTEN:
        return False
    found = sockets.events(view.local, select.POLLIN)
    return bool(found & select.POLLIN) and not (found & select.POLLERR and not diag.queued)


def _all_without_files(scope: CaptureScope) -> dict[Index, Callable[[], list[Unread]]]:
    """What waits in all queues of the tree in which nothing is in flight; they are looked at with the first of them."""
    known: dict[Index, Callable[[], list[Unread]]] | None = scope.peers().get("unix queues")
    if known is None:
        views = [
            (index, view)
            for index, view in table_of(scope).members.values()
            if scope.unread(view) is None and not external_end.claims(view, scope) and _is_filled(view, scope)
        ]
        looks = look_at_all([(view.local, view.subject) for _, view in views], scope.shield)
        known = scope.peers()["unix queues"] = dict(zip((index for index, _ in views), looks, strict=True))
    return known


def _credentials(unread: Unread, subject: str, scope: CaptureScope) -> Peer | None:
    """The sender as far as the message tells."""
    if unread.who is None:
        return None
    pid, uid, gid = unread.who
    if member := scope.member(pid) if pid else 0:
        return Peer(member, scope.user(uid), scope.group(gid))
    if scope.policy.unix_outside == "close":
        return None
    who = f"pid {pid} outside the tree" if pid else "a process that has ended or is not seen here"
    raise Refused(
        [
            Blocker(
                subject,
                f"an unread message carries the credentials of {who}",
                "wait until it is read, or let nobody have sent it: --unix-outside close",
                transient=True,
            )
        ]
    )


def send(
    sender: socket.socket,
    message: Message,
    subject: str,
    scope: CreateScope,
    to: bytes | str = b"",
    receiver: LocalFd | None = None,
) -> None:
    """Send a recorded message again, whole; gives the sender a larger buffer if it needs one.

    Args:
        sender: connected, or `to` says where.
        message: what to send.
        subject: how a message names it.
        scope: of the rebuild.
        to: where to, if it is not connected.
        receiver: takes the byte of a mark that was passed already.

    Raises:
        RebuildError: the queue does not take it.
    """
    who = message.credentials
    control: list[tuple[int, int, bytes]] = []
    if who is not None:
        ucred = _UCRED.pack(scope.host_pid(who.pid), scope.user(who.uid), scope.group(who.gid))
        control.append((socket.SOL_SOCKET, _SCM_CREDENTIALS, ucred))
    files = [scope.file(index) for index in message.files]
    how = socket.MSG_OOB if message.mark else 0
    view = memoryview(b"\0" if message.mark == "passed" else message.data)
    try:
        while True:
            rights = [(socket.SOL_SOCKET, _SCM_RIGHTS, array.array("i", files).tobytes())] if files else []
            try:
                sent = _send_some(sender, view, control + rights, to, how)
            except PermissionError:
                if who is None or how:
                    raise
                sent = unix_inside.send(sender, view, who, files, scope, to)
            view, files = view[sent:], []
            if not view:
                break
        if message.mark == "passed" and receiver is not None:
            with borrowed(receiver) as sock:
                sock.recv(1, socket.MSG_OOB | socket.MSG_DONTWAIT)
    except OSError as error:
        raise RebuildError(
            f"{subject}: an unread message of {len(message.data)} bytes cannot be sent again: {error.strerror}"
            + _remedy(error, message, to)
        ) from error


def _remedy(error: OSError, message: Message, to: bytes | str) -> str:
    if error.errno == errno.EAGAIN and to:
        return " (raise net.unix.max_dgram_qlen)"
    if error.errno == errno.ETOOMANYREFS and message.files:
        return " (more descriptors are in flight than a plain user may have: raise RLIMIT_NOFILE, or restore as root)"
    if error.errno == errno.EPERM and message.credentials is not None:
        return " (it carries credentials that its sender does not have any more, which only root can send)"
    return ""


def _send_some(
    sender: socket.socket,
    view: memoryview,
    control: Sequence[tuple[int, int, bytes]],
    to: bytes | str,
    how: int,
) -> int:
    arguments = ([view], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | how)
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
