"""What sockets of all families have in common: who they are, where they are made, whom they belong to.

Every socket of a rebuild is made by `make_socket` or `make_pair`, in the network namespace it
belongs to: a socket stays in the one it was made in, wherever its holders go. One of a network
namespace that no process of the tree is in is refused.

The owner of a socket's inode is kept: fchown(2) sets `sk_uid`, by which the kernel groups
SO_REUSEPORT sockets and matches firewall rules.

Source: socket(7); net/socket.c (sockfs_setattr).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Index, Record
from pipeline.resources import socket_options
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.options_ahead import OptionsAhead
from pipeline.resources.socket_identity import Identity
from pipeline.resources.socket_options import Values

_SO_NETNS_COOKIE = 71
#: the first `Namespace` indexes of an image are those of the external ones
EXTERNAL_NETWORK = 4


class SocketState(Record, frozen=True, kw_only=True):
    """What every socket has. `type` without flags; `uid`, `gid` own its inode; `netns`: a `Namespace` index."""

    family: int
    type: int
    protocol: int
    uid: Id
    gid: Id
    options: Values
    netns: Index = EXTERNAL_NETWORK

    @property
    def identity(self) -> Identity:
        """Family, type and protocol."""
        return Identity(self.family, self.type, self.protocol)


def is_given(view: FdView, scope: CaptureScope) -> bool:
    """Whether the person who captures has named this socket as one that the destination gives."""
    given = scope.policy.external_fds
    return bool(given) and os.fsdecode(view.link) in given


def identity_of(view: FdView) -> Identity:
    """What a view is that is known to be a socket."""
    assert view.identity is not None, f"{view.subject} is no socket"
    return view.identity


def events(fd: LocalFd, wanted: int) -> int:
    """poll(2) of one descriptor without waiting; POLLERR and POLLHUP are always reported."""
    poll = select.poll()
    poll.register(fd, wanted)
    return sum(found for _, found in poll.poll(0))


def check_error(view: FdView) -> Iterator[Blocker]:
    """Refuse an error that waits to be read: to read it is to take it away from the program."""
    if events(view.local, 0) & select.POLLERR:
        yield Blocker(view.subject, "an error waits to be read", "wait until it is read", transient=True)


@contextmanager
def without_waiting(sock: socket.socket) -> Iterator[None]:
    """O_NONBLOCK for a moment; it belongs to the open file, and so to the program."""
    before = fcntl.fcntl(sock, fcntl.F_GETFL)
    fcntl.fcntl(sock, fcntl.F_SETFL, before | os.O_NONBLOCK)
    try:
        yield
    finally:
        fcntl.fcntl(sock, fcntl.F_SETFL, before)


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


def network(sock: socket.socket, scope: CaptureScope) -> Index | None:
    """The network namespace of `sock`, by its cookie; None where it is not one of the tree's."""
    known: dict[bytes, Index | None] | None = scope.peers().get("networks")
    if known is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            known = scope.peers()["networks"] = {_cookie(probe): scope.own_network()}
    cookie = _cookie(sock)
    if cookie not in known:
        known[cookie] = scope.network(LocalFd(sock.fileno()))
    return known[cookie]


def check(view: FdView, sock: socket.socket, scope: CaptureScope) -> Iterator[Blocker]:
    """What stops any socket: its network namespace and options that mean something here only."""
    OptionsAhead.of(scope)  # is at work from here on
    if network(sock, scope) is None:
        yield Blocker(
            view.subject,
            "the socket belongs to a network namespace that no process of the tree is in",
            "close it, or run the pipeline in that network namespace (nsenter -t PID -n)",
        )
    yield from socket_options.check(sock, identity_of(view), view.subject)


def capture(view: FdView, sock: socket.socket, scope: CaptureScope) -> SocketState:
    """The state that every socket has."""
    who = identity_of(view)
    return SocketState(
        family=who.family,
        type=who.type,
        protocol=who.protocol,
        uid=scope.user(view.stat.st_uid),
        gid=scope.group(view.stat.st_gid),
        options=OptionsAhead.of(scope).capture(view, sock),
        netns=_required(network(sock, scope)),
    )


def _required(netns: Index | None) -> Index:
    assert netns is not None, "`check` refuses sockets of other network namespaces"
    return netns


def make_socket(state: SocketState, scope: CreateScope) -> socket.socket:
    """socket(2) in its network namespace; the caller owns the result (close-on-exec)."""
    return scope.in_network(state.netns, lambda: socket.socket(state.family, state.type, state.protocol))


def is_like(record: Record, netns: Index, who: Identity) -> bool:
    """Whether a record is of a socket that `CreateScope.new_socket` makes for these."""
    state = getattr(record, "socket", None)
    return isinstance(state, SocketState) and (state.netns, state.identity) == (netns, who)


def make_many(who: Identity, count: int) -> list[socket.socket]:
    """So many times socket(2), here; the caller owns them all. OSError: there is none."""
    with ExitStack() as made:
        found = [made.enter_context(socket.socket(who.family, who.type, who.protocol)) for _ in range(count)]
        made.pop_all()
    return found


Pair = tuple[socket.socket, socket.socket]


def make_pair(state: SocketState, scope: CreateScope, acting: Callable[[Callable[[], Pair]], Pair]) -> Pair:
    """socketpair(2) in its network namespace; the caller owns both.

    Args:
        state: of either end.
        scope: of the rebuild.
        acting: calls what it is given, there, as somebody: whoever goes there has to be ourselves still.
    """
    return scope.in_network(
        state.netns, lambda: acting(lambda: socket.socketpair(state.family, state.type, state.protocol))
    )


def give_owner(sock: socket.socket, state: SocketState, scope: CreateScope, subject: str) -> None:
    """Let the inode of `sock` belong to the recorded user and group.

    Raises:
        RebuildError: they have no id here, or may not be given.
    """
    uid, gid = scope.user(state.uid), scope.group(state.gid)
    now = os.fstat(sock.fileno())
    if (now.st_uid, now.st_gid) == (uid, gid):
        return
    try:
        os.fchown(sock.fileno(), uid, gid)
    except OSError as error:
        raise RebuildError(f"{subject}: cannot belong to {uid}:{gid} here: {error.strerror}") from error


def take(sock: socket.socket) -> LocalFd:
    """The descriptor of a Python socket; from now on the caller's."""
    return LocalFd(sock.detach())
