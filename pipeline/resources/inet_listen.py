"""TCP sockets over IPv4 and IPv6 that are not connected: listening, bound, and fresh ones.

Kept: address, options (`pipeline.resources.socket_options`), backlog, owner. Refused: a
connection in any state, a client waiting in the accept queue, a pending error, the rest
of a connection that has ended. Handshakes half done (SYN queue) are not carried: the
client sends its SYN again and finds the new listener. TCP Fast Open keys are the host's.

Connections of the old listener that are in TIME_WAIT block the address as they would for
the program itself: unless it has set SO_REUSEADDR.

Source: tcp(7), listen(2); net/ipv4/tcp.c (tcp_get_info, tcp_poll).
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, OpenFile, Record
from pipeline.kernel.sockdiag import State
from pipeline.resources import inet_address, socket_options, sockets
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.sockets import SocketState
from pipeline.resources.steps import CompleteOnceCreated

_STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV",
)  # fmt: skip


class TcpState(Record, frozen=True, kw_only=True):
    """`local`: None if not bound. `backlog`: None if not listening."""

    socket: SocketState
    local: Address | None = None
    backlog: U32 | None = None


def _info(sock: socket.socket) -> tuple[int, int, int]:
    """State; for a listener also the clients waiting and the backlog (tcpi_unacked, tcpi_sacked)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    waiting, backlog = struct.unpack_from("<2I", info, 24)
    return info[0], waiting, backlog


class Tcp(CompleteOnceCreated):
    """See the module."""

    name = "tcp"
    record: type[TcpState] = TcpState
    carried: Sequence[str] = ("listening, bound and fresh TCP sockets with their options and backlog",)
    refused: Sequence[str] = ("TCP connections", "listeners with clients that wait to be accepted")
    shown_by: Sequence[str] = (
        "programs/sockets.py",
        "resources/test_inet_sockets.py",
    )

    def matches(self, view: FdView) -> bool:
        """A TCP socket of either family."""
        who = sockets.identity_of(view)
        return (
            who is not None
            and who.family in (socket.AF_INET, socket.AF_INET6)
            and (who.type, who.protocol) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
        )

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """No connection, nobody waiting, no error to be told."""
        with sockets.borrowed(view.local) as sock:
            yield from sockets.check(view, sock, scope)
            state, waiting, _ = _info(sock)
            if state == State.LISTEN:
                if waiting:
                    yield Blocker(
                        view.subject,
                        f"{waiting} connection(s) wait to be accepted",
                        "wait until they are accepted",
                        transient=True,
                    )
            elif state != State.CLOSE:
                yield Blocker(
                    view.subject,
                    f"TCP connection in flight ({_STATES[state]}, {_ends(sock)})",
                    "wait until it is over, or close it",
                    transient=True,
                )
            elif sockets.events(view.local, select.POLLIN | select.POLLRDHUP) & (
                select.POLLIN | select.POLLRDHUP | select.POLLERR
            ):
                yield Blocker(
                    view.subject,
                    "the TCP connection has ended, and its end was not read yet or the socket not closed",
                    "close it",
                    transient=True,
                )

    def capture(self, view: FdView, scope: CaptureScope) -> TcpState:
        """Options, address, backlog."""
        with sockets.borrowed(view.local) as sock:
            state, _, backlog = _info(sock)
            common = sockets.capture(view, sock, scope)
            address = inet_address.local(sock, common.family)
        return TcpState(
            socket=common,
            local=address if address.is_set else None,
            backlog=backlog if state == State.LISTEN else None,
        )

    def create(self, file: OpenFile, record: TcpState, scope: CreateScope) -> LocalFd:
        """A socket with its options, bound.

        Raises:
            RebuildError: an option or the address is not to be had here.
        """
        subject, common = f"open file {file.index} (tcp)", record.socket
        with sockets.make_socket(common, scope) as sock:
            sockets.give_owner(sock, common, scope, subject)
            socket_options.apply(sock, common.identity, common.options, subject)
            if record.local is not None:
                inet_address.bind(sock, common.family, record.local, subject)
            return sockets.take(sock)

    def connect(self, file: OpenFile, record: TcpState, scope: CreateScope) -> None:
        """Listen, if it did.

        Raises:
            RebuildError: the address is taken meanwhile, or this host does not allow that backlog.
        """
        if record.backlog is None:
            return
        subject = f"open file {file.index} (tcp, {record.local})"
        with sockets.borrowed(scope.file(file.index)) as sock:
            try:
                sock.listen(min(record.backlog, 0x7FFF_FFFF))
            except OSError as error:
                raise RebuildError(f"{subject}: cannot listen: {error.strerror}") from error
            if _info(sock)[2] != record.backlog:
                raise RebuildError(
                    f"{subject}: this host limits a backlog to {_info(sock)[2]}, it was {record.backlog} "
                    "(raise net.core.somaxconn)"
                )


def _ends(sock: socket.socket) -> str:
    family = sock.family
    return f"{inet_address.local(sock, family)} to {inet_address.remote(sock, family) or 'nobody'}"


KIND = Tcp()
