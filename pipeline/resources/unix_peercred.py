"""Who sockets remember as their peer: pid, uid, gid and groups (SO_PEERCRED, SO_PEERPIDFD, SO_PEERGROUPS).

The kernel remembers who called socketpair, listen or connect, so the rebuilt process calls them: it is
lent the socket, and a thread of it takes the effective ids and groups on for the call. Where it cannot (it ended
before the dump, has no /proc to reach a path name by, may not take the ids on), the pipeline acts with these ids,
and the pid is its own.

Not preserved: groups that have no id here or where the process is, and any that may not be set (setgroups is denied).

Source: unix(7); net/unix/af_unix.c (init_peercred, copy_peercred).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import PRCTL, pidfd_getfd, pidfd_open, syscall
from pipeline.remote.calls import Out
from pipeline.resources import sockets
from pipeline.resources.acting import UNCHANGED
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView, Inject
from pipeline.resources.sockets import Pair, SocketState
from pipeline.resources.unix_inside import id_inside, id_map
from pipeline.resources.unix_names import as_peer, groups_here
from pipeline.resources.unix_state import NGROUPS_MAX, Peer

T = TypeVar("T")
_SO_NETNS_COOKIE, _SO_PEERGROUPS = 71, 59
_UCRED = struct.Struct("<iII")
_NO_ID = 0xFFFF_FFFF
_BY_DESCRIPTOR = "/proc/self/fd/"


def seen(sock: socket.socket, scope: CaptureScope) -> Peer | None:
    """Whom a socket remembers; None where nobody is."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if _NO_ID in (uid, gid):
        return None
    groups = [scope.group(number) for number in _groups_of_peer(sock)]
    return Peer(scope.member(pid) if pid else 0, scope.user(uid), scope.group(gid), groups)


def _groups_of_peer(sock: socket.socket) -> tuple[int, ...]:
    room = 4 * NGROUPS_MAX
    buffer, length = (
        ctypes.create_string_buffer(room),
        ctypes.create_string_buffer(struct.pack("<i", room), 4),
    )
    syscall(NR.getsockopt, sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, length)
    (size,) = struct.unpack("<i", length)
    return struct.unpack_from(f"<{size // 4}I", buffer)


def of_holder(view: FdView, scope: CaptureScope) -> Peer:
    """The ids of a holder: what a client that waits will be to the server, as far as can be told."""
    status = procfs.status(view.pid)
    groups = [scope.group(number) for number in status.groups]
    return Peer(scope.member(view.pid), scope.user(status.uids[1]), scope.group(status.gids[1]), groups)


def make_pair(state: SocketState, who: Peer | None, scope: CreateScope) -> Pair:
    """socketpair(2) by `who`; the caller owns both."""

    def inside(peer: Peer, call: Inject) -> Pair:
        there = scope.once(("network of unix pairs", state.netns), lambda: _network(state, scope))
        numbers = Out(8)
        call(NR.socketpair, state.family, state.type | socket.SOCK_CLOEXEC, state.protocol, numbers)
        pair = _taken(peer, struct.unpack("<2i", numbers.data), scope)
        if _cookie(pair[0]) == there:
            return pair
        for sock in pair:
            sock.close()
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    pair = _try(inside, who, scope)
    return pair or sockets.make_pair(state, scope, lambda act: as_peer(who, scope, act))


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


def _network(state: SocketState, scope: CreateScope) -> bytes:
    with sockets.make_socket(state, scope) as probe:
        return _cookie(probe)


def _taken(who: Peer, numbers: tuple[int, int], scope: CreateScope) -> Pair:
    """Sockets that a process has made; it has them no more."""
    fds: list[LocalFd] = []
    holder = pidfd_open(scope.host_pid(who.pid))
    try:
        fds.extend(pidfd_getfd(holder, number) for number in numbers)
        return socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    finally:
        os.close(holder)
        if numbers[1] == numbers[0] + 1:
            scope.inject(who.pid, NR.close_range, *numbers, 0)
        else:
            for number in numbers:
                scope.inject(who.pid, NR.close, number)


def listen(sock: socket.socket, backlog: int, who: Peer | None, scope: CreateScope) -> None:
    """listen(2) by `who`."""

    def inside(peer: Peer, call: Inject) -> bool:
        with _lent(sock.fileno(), peer, scope) as number:
            call(NR.listen, number, backlog)
        return True

    if not _try(inside, who, scope):
        as_peer(who, scope, lambda: sock.listen(backlog))


def connect(sock: socket.socket, address: bytes | str, who: Peer | None, scope: CreateScope) -> None:
    """connect(2) by `who`.

    Args:
        sock: what is connected.
        address: an abstract name, or ``/proc/self/fd/N`` of this process.
        who: see the module.
        scope: of the rebuild.

    Raises:
        OSError: nobody listens there.
    """

    def inside(peer: Peer, call: Inject) -> bool:
        with _lent(sock.fileno(), peer, scope) as number:
            if isinstance(address, bytes):
                _connect_by(call, number, address)
            else:
                with _lent(int(address.removeprefix(_BY_DESCRIPTOR)), peer, scope) as file:
                    _connect_by(call, number, f"{_BY_DESCRIPTOR}{file}\0".encode())
        return True

    if not _try(inside, who, scope):
        as_peer(who, scope, lambda: sock.connect(address))


def _connect_by(call: Inject, number: int, name: bytes) -> None:
    address = struct.pack("<H", socket.AF_UNIX) + name
    call(NR.connect, number, address, len(address))


@contextmanager
def _lent(fd: int, who: Peer, scope: CreateScope) -> Iterator[int]:
    number = scope.send(who.pid, LocalFd(fd))
    try:
        yield number
    finally:
        scope.inject(who.pid, NR.close, number)


def _try(act: Callable[[Peer, Inject], T], who: Peer | None, scope: CreateScope) -> T | None:
    """What `act` returns, by calls of the process of `who` with its ids; None where that is not possible."""
    if who is None or not who.pid:
        return None
    try:
        host = scope.host_pid(who.pid)
        status = procfs.status(host)
        uid, gid, groups = scope.user(who.uid), scope.group(who.gid), groups_here(who, scope)
        if (status.uids[1], status.gids[1], sorted(status.groups)) == (uid, gid, groups):
            return act(who, lambda number, *args: scope.inject(who.pid, number, *args))
        gids = id_map(host, "gid")
        uid, gid = id_inside(id_map(host, "uid"), uid), id_inside(gids, gid)
        groups = [group for group in map(gids.down, groups) if group is not None]
        return scope.in_thread(
            who.pid, lambda call: _with_ids(uid, gid, groups, call, lambda: act(who, call))
        )
    except (OSError, RebuildError):
        return None


def _with_ids(uid: int, gid: int, groups: Sequence[int], call: Inject, act: Callable[[], T]) -> T:
    """`act`, while the thread that `call` runs in has other effective ids; that makes a process undumpable."""
    try:
        with suppress(PermissionError):  # denied in its user namespace
            call(NR.setgroups, len(groups), struct.pack(f"<{len(groups)}I", *groups))
        call(NR.setresgid, UNCHANGED, gid, UNCHANGED)
        call(NR.setresuid, UNCHANGED, uid, UNCHANGED)
        return act()
    finally:
        call(NR.prctl, PRCTL.SET_DUMPABLE, 1, 0, 0, 0)
