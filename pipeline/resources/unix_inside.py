"""Sending a message from inside the process that it is from.

The kernel lets root say who a message is from, anybody else only itself. So where the pipeline may not, the
rebuilt process does: it is lent the socket, and what is in flight with the message, and sends with ids of its own.

Source: unix(7); net/core/scm.c (scm_check_creds).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.remote.calls import In
from pipeline.resources.kinds import CreateScope
from pipeline.resources.unix_state import Peer
from pipeline.userns.idmap import IdMap, parse

_SCM_RIGHTS = 1
_SCM_CREDENTIALS = 2
_UCRED = struct.Struct("<iII")
#: what a process of the tree is given at once of the bytes of a stream
_PIECE_BYTES = 1 << 17
_DISCONNECT = struct.pack("<H", socket.AF_UNSPEC)


def send(
    sender: socket.socket,
    data: memoryview,
    who: Peer,
    files: Sequence[int],
    scope: CreateScope,
    to: bytes | str,
) -> int:
    """sendmsg(2) by `who`; the number of bytes that were sent.

    Args:
        sender: connected, or a datagram socket that is connected to `to` meanwhile.
        data: what to send; of a stream perhaps only the beginning is.
        who: a process of the tree, and ids that its user namespace maps.
        files: local descriptors to send along.
        scope: of the rebuild, in its last phase.
        to: where to, if it is not connected.

    Raises:
        OSError: EPERM: its user namespace does not map those ids; or what the kernel answered.
    """
    pid = scope.host_pid(who.pid)
    uid = id_inside(id_map(pid, "uid"), scope.user(who.uid))
    gid = id_inside(id_map(pid, "gid"), scope.group(who.gid))
    ucred = _UCRED.pack(procfs.status(pid).ns_tgid[-1], uid, gid)
    stream = sender.type == socket.SOCK_STREAM
    piece = bytes(data[:_PIECE_BYTES] if stream else data)
    if to:
        sender.connect(to)
    try:
        with _lent([sender.fileno(), *files], who, scope) as (number, *rights):
            control = _control(_SCM_CREDENTIALS, ucred)
            if rights:
                control += _control(_SCM_RIGHTS, struct.pack(f"<{len(rights)}i", *rights))
            vector = In([In([piece]), len(piece)])
            message = In([0, 0, vector, 1, In([control]), len(control), 0])
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            return scope.inject(who.pid, NR.sendmsg, number, message, flags)
    finally:
        if to:
            syscall(NR.connect, sender.fileno(), _DISCONNECT, len(_DISCONNECT))


def id_map(pid: HostPid, kind: Literal["uid", "gid"]) -> IdMap:
    """What a process calls the ids of here: a puppet has all capabilities there, so it may name any."""
    return IdMap(parse(procfs.read_file(pid, f"{kind}_map")))


def id_inside(known: IdMap, number: int) -> int:
    """The number inside of an id that is `number` here.

    Raises:
        OSError: EPERM: the map has none.
    """
    inside = known.down(number)
    if inside is None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return inside


@contextmanager
def _lent(fds: Sequence[int], who: Peer, scope: CreateScope) -> Iterator[list[int]]:
    numbers: list[int] = []
    try:
        numbers.extend(scope.send(who.pid, LocalFd(fd)) for fd in fds)
        yield numbers
    finally:
        for number in numbers:
            scope.inject(who.pid, NR.close, number)


def _control(kind: int, value: bytes) -> bytes:
    head = struct.pack("<Qii", 16 + len(value), socket.SOL_SOCKET, kind)
    return (head + value).ljust(16 + (len(value) + 7 & ~7), b"\0")
