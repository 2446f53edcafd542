"""TCP sockets over IPv4 and IPv6: fresh, bound and listening ones, and connections in every state.

Kept: addresses, options (`pipeline.resources.socket_table`), owner, backlog; of a connection the sequence numbers,
windows, what was agreed upon (MSS, window scale, SACK, timestamps), what waits to be read, what was sent and not
acknowledged, what was not sent yet, and which directions are over. A connection that is just being made is begun anew.
Of clients that wait to be accepted those of the tree that have sent nothing yet; see `pipeline.resources.tcp_tree`,
also for what becomes of peers outside of the tree. TIME_WAIT belongs to nobody's descriptor, and is forgotten.

With `--tcp refuse` connections are waited for, a little, and then refused by name. With `--tcp close` they end at the
source as if their program had ended; where the tree is restored they are found reset: reading gives ECONNRESET once,
then the end; writing EPIPE.

Refused: clients from elsewhere that wait to be accepted (the kernel shows their bytes to accept(2) only), a pending
error (asking for it takes it away), urgent data that was not read, more than 24 MiB in one queue, bytes that were not
sent yet where both ends have said that they send no more (CLOSING), repair mode. Handshakes half done (SYN queue) are
not carried: the client sends its SYN again and finds the new listener. TCP Fast Open keys are the host's. A socket
whose connect(2) has failed comes back as one whose connection has ended.

Connections of the old listener that are in TIME_WAIT block the address as they would for the program itself: unless
it has set SO_REUSEADDR.

Sources: tcp(7), listen(2); net/ipv4/tcp.c (tcp_get_info, tcp_poll, do_tcp_setsockopt: TCP_REPAIR).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from pipeline.errors import Blocker, ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile
from pipeline.resources import inet_address, socket_options, sockets, tcp_read, tcp_rebuild
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.socket_options import Values
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.resources.tcp_ended import make_ended, make_reset
from pipeline.resources.tcp_lock import unlock
from pipeline.resources.tcp_seen import Seen, is_tcp
from pipeline.resources.tcp_state import CONNECTED, MAX_QUEUE_BYTES, Phase, State, TcpState, info_of
from pipeline.resources.tcp_tree import UNSENT_WHILE_CLOSING, TcpTree

#: how long a listener of the tree may take to answer a client of the tree
_ANSWER_MS = 2000
_OVER = select.POLLIN | select.POLLRDHUP
_REUSE = socket.SOL_SOCKET, socket.SO_REUSEADDR


class Tcp(CompleteOnceCreated):
    """See the module."""

    name = "tcp"
    record: type[TcpState] = TcpState
    carried: Sequence[str] = (
        "fresh, bound and listening sockets with options and backlog",
        "connections with both queues, sequence numbers, windows, what was agreed upon, half-closed states",
        "connections that are being made; of clients that wait to be accepted those of the tree",
        "peers outside are held off until the connection is there again",
    )
    refused: Sequence[str] = (
        "clients from outside that wait to be accepted",
        "pending errors, unread urgent data, bytes that were not sent in state CLOSING, repair mode",
        "connections in the network of the host for who has no CAP_NET_ADMIN there",
    )
    shown_by: Sequence[str] = (
        "programs/sockets.py",
        "programs/connections.py",
        "resources/test_tcp_connections.py",
        "resources/test_tcp_outside.py",
        "test_tcp_clients.py",
        "resources/test_inet_sockets.py",
    )

    def matches(self, view: FdView) -> bool:
        """A TCP socket of either family."""
        return is_tcp(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """What has no way back, in its state."""
        with view.as_socket() as sock:
            yield from sockets.check(view, sock, scope)
            tree = TcpTree.of(scope)
            one = tree.seen.get(view.local)
            if one is None:
                return
            state = one.info.state
            holds = state != State.CLOSE or one.netns != sockets.EXTERNAL_NETWORK
            if holds and scope.policy.tcp != "close" and not tree.is_listed:
                yield _unlisted(view)
            elif sock.getsockopt(socket.IPPROTO_TCP, tcp_read.REPAIR):
                yield _transient(
                    view, "it is in repair mode: somebody takes its connection elsewhere, or was killed at it"
                )
            elif state == State.LISTEN:
                yield from _check_listener(one, tree, scope)
            elif state == State.CLOSE:
                if sockets.events(view.local, 0) & select.POLLERR:
                    yield _transient(view, "an error of its TCP connection waits to be read")
                if tcp_read.queued(sock)[0] > MAX_QUEUE_BYTES:
                    yield _transient(
                        view, "its TCP connection has ended with too many bytes that were not read"
                    )
            elif scope.policy.tcp == "refuse":
                yield _transient(
                    view,
                    f"TCP connection ({_called(state)}, {_ends(sock)}), and --tcp refuse was given",
                    "close it, or give --tcp established or --tcp close",
                )
            elif scope.policy.tcp == "established":
                yield from _check_connection(one, sock, tree)

    def capture(self, view: FdView, scope: CaptureScope) -> TcpState:
        """Options, addresses, and what the state has.

        Raises:
            Refused: something has come in between.
        """
        tree = TcpTree.of(scope)
        connection = tree.connections().get(tree.seen[view.local].index)
        one = tree.seen[view.local]
        with view.as_socket() as sock:
            common = sockets.capture(view, sock, scope)
            local = inet_address.local(sock, common.family)
            peer = inet_address.remote(sock, common.family)
            phase = _phase(one, tree, scope)
            if phase == "connecting":
                peer = tree.peer_of_connecting(one)
            return TcpState(
                socket=common,
                phase=phase,
                local=local if local.is_set else None,
                peer=peer,
                backlog=one.info.backlog if phase == "listening" else None,
                clients=tree.clients_of(one) if phase == "listening" and scope.policy.tcp != "close" else [],
                connection=connection,
                unread=tcp_read.peek(view.local) if phase == "ended" else b"",
                lock=tree.locks.get(one.index, ""),
            )

    def create(self, file: OpenFile, record: TcpState, scope: CreateScope) -> LocalFd:
        """A socket with its options, bound; one that has or had a peer waits for the next phase.

        Raises:
            RebuildError: an option or the address is not to be had here.
        """
        subject, common = _subject(file, record), record.socket
        with scope.new_socket(common.netns, common.identity) as sock:
            sockets.give_owner(sock, common, scope, subject)
            if record.phase in ("idle", "listening"):
                socket_options.apply(sock, common.identity, common.options, subject)
                if record.local is not None:
                    inet_address.bind(sock, common.family, record.local, subject)
            elif record.phase in ("connecting", "waiting"):
                tcp_rebuild.apply_first(sock, common, subject)
                if record.local is not None:
                    tcp_rebuild.bind_forced(sock, record, subject)
                tcp_rebuild.apply_reuse(sock, record)
            elif record.phase == "connected":
                tcp_rebuild.begin(sock, subject)
            return sockets.take(sock)

    def connect(self, file: OpenFile, record: TcpState, scope: CreateScope) -> None:
        """Listen, and take the clients that waited; be connected.

        Raises:
            RebuildError: the address is taken meanwhile, or the kernel does not take a part of the state.
        """
        subject = _subject(file, record)
        made = partial(scope.in_network, record.socket.netns)
        with borrowed(scope.file(file.index), record.socket.identity) as sock:
            if record.phase == "listening":
                _listen(sock, record, subject)
                for client in record.clients:
                    try:
                        waits = scope.file(client.file)
                    except KeyError:
                        raise ImageError(f"{subject}: who waits for it is no file of the image") from None
                    _connect_waiting(waits, client.peer, sock, subject)
            elif record.phase == "connected":
                tcp_rebuild.establish(sock, record, subject, _fresh_options(sock, record, scope))
            elif record.phase == "ended":
                make_ended(sock, record, made, subject)
            elif record.phase == "closed":
                make_reset(sock, record, made, subject)

    def finish(self, file: OpenFile, record: TcpState, scope: CreateScope) -> None:
        """The ends of directions that are over come, now that both ends are there; all goes on when the tree does.

        Raises:
            RebuildError: the state cannot be reached.
        """
        local, subject = scope.file(file.index), _subject(file, record)
        on: Callable[[socket.socket], None] | None = None
        with borrowed(local, record.socket.identity) as sock:
            if record.phase == "waiting":
                tcp_rebuild.apply_rest(sock, record.socket, subject)
                tcp_rebuild.apply_late(sock, record)
            elif record.phase == "connecting":
                on = partial(_begin_anew, record=record)
            elif record.phase == "connected":
                made = partial(scope.in_network, record.socket.netns)
                tcp_rebuild.go_to_state(sock, record, made, subject)
                on = partial(tcp_rebuild.wake, record=record, fresh=_fresh_options(sock, record, scope))
        if on is not None:
            scope.when_it_runs(local, partial(_wake, record, scope, on), f"the connection {_ends_of(record)}")


def _check_listener(one: Seen, tree: TcpTree, scope: CaptureScope) -> Iterator[Blocker]:
    if scope.policy.tcp == "close":
        return
    waiting = tree.waiting.get(one.index)
    if waiting is None:
        return
    if waiting.reason:
        if scope.still:  # a tree that runs accepts them
            yield _transient(one.view, waiting.reason, "wait until they are accepted")
    elif scope.policy.tcp == "refuse" and waiting.clients:
        yield _transient(
            one.view,
            f"{len(waiting.clients)} connection(s) wait to be accepted, and --tcp refuse was given",
            "accept them, or give --tcp established or --tcp close",
        )


def _check_connection(one: Seen, sock: socket.socket, tree: TcpTree) -> Iterator[Blocker]:
    view, state = one.view, one.info.state
    if state not in CONNECTED and state != State.SYN_SENT:
        yield _transient(view, f"TCP connection in flight ({_called(state)})")
        return
    found = sockets.events(view.local, select.POLLPRI)
    if found & select.POLLPRI:
        yield _transient(view, "urgent data of its TCP connection was not read")
    if found & select.POLLERR:
        yield _transient(view, "an error or a message of the error queue waits to be read")
    received, outstanding = tcp_read.queued(sock)
    if max(received, outstanding) > MAX_QUEUE_BYTES:
        yield _transient(view, f"its TCP connection holds {max(received, outstanding)} bytes in one queue")
    if state == State.CLOSING and tcp_read.unsent(sock) > 1:
        yield _transient(view, UNSENT_WHILE_CLOSING)
    if not tcp_read.may_repair(sock):
        yield Blocker(
            view.subject,
            f"TCP connection ({_called(state)}, {_ends(sock)}): it takes CAP_NET_ADMIN in its network to look at it",
            "run as root, or give the tree a network of its own, or give --tcp close",
        )
    elif tree.is_outside(one) and (error := tree.lockable(one.netns)) is not None:
        yield Blocker(
            view.subject,
            f"TCP connection ({_ends(sock)}): its peer is outside of the tree, and cannot be held off while the tree "
            f"moves, because this kernel has no nftables to be used here ({error.strerror})",
            "load nf_tables, or give --tcp close",
        )


def _unlisted(view: FdView) -> Blocker:
    return Blocker(
        view.subject,
        "this kernel does not list TCP connections (CONFIG_INET_TCP_DIAG): who waits to be accepted, and what was "
        "closed and is still being sent, is not known",
        "load the module tcp_diag, or give --tcp close",
    )


def _transient(view: FdView, reason: str, remedy: str = "wait until it is over, or close it") -> Blocker:
    return Blocker(view.subject, reason, remedy, transient=True)


def _phase(one: Seen, tree: TcpTree, scope: CaptureScope) -> Phase:
    state = one.info.state
    if state == State.LISTEN:
        return "listening"
    if state == State.CLOSE:
        return "ended" if sockets.events(one.view.local, _OVER) & _OVER else "idle"
    if scope.policy.tcp == "close":
        return "closed"
    if state == State.SYN_SENT:
        return "connecting"
    return "waiting" if one.index in tree.waiting_clients else "connected"


def _listen(sock: socket.socket, record: TcpState, subject: str) -> None:
    """listen(2), although connections of the tree may be bound to the port by now."""
    assert record.backlog is not None
    reuse = sock.getsockopt(*_REUSE)
    try:
        sock.setsockopt(*_REUSE, 1)
        sock.listen(min(record.backlog, 0x7FFF_FFFF))
    except OSError as error:
        raise RebuildError(f"{subject}: cannot listen: {error.strerror}") from error
    finally:
        sock.setsockopt(*_REUSE, reuse)
    backlog = info_of(sock).backlog
    if backlog != record.backlog:
        raise RebuildError(
            f"{subject}: this host limits a backlog to {backlog}, it was {record.backlog} "
            "(raise net.core.somaxconn)"
        )


def _connect_waiting(client: LocalFd, peer: Address, listener: socket.socket, subject: str) -> None:
    with borrowed(client) as sock:
        waiting = info_of(listener).waiting
        try:
            with sockets.without_waiting(sock), suppress(BlockingIOError):
                sock.connect(inet_address.unpack(sock, sock.family, peer))
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            poll.poll(_ANSWER_MS)
        except OSError as error:
            raise RebuildError(f"{subject}: a client cannot wait for it again: {error.strerror}") from error
        if info_of(sock).state != State.ESTABLISHED or info_of(listener).waiting != waiting + 1:
            raise RebuildError(f"{subject}: a client cannot wait for it again: it does not answer")


def _fresh_options(sock: socket.socket, record: TcpState, scope: CreateScope) -> Values:
    """Those of a connection in its network to which nothing was done yet, as `sock` is when it is asked for first."""
    who = record.socket.identity
    key = ("options of a fresh connection", record.socket.netns, who)
    return scope.once(key, lambda: socket_options.capture(sock, who))


def _wake(record: TcpState, scope: CreateScope, on: Callable[[socket.socket], None], local: LocalFd) -> None:
    """The tree runs; see `CreateScope.when_it_runs`. `on`: lets the connection go on."""
    try:
        if record.lock and record.socket.netns == EXTERNAL_NETWORK:
            unlocking = partial(scope.in_network, EXTERNAL_NETWORK, partial(unlock, record.lock))
            scope.once(("tcp unlocked", record.lock), unlocking)
    finally:
        with borrowed(local, record.socket.identity) as sock:
            on(sock)


def _begin_anew(sock: socket.socket, record: TcpState) -> None:
    assert record.peer is not None
    with sockets.without_waiting(sock), suppress(BlockingIOError):
        sock.connect(inet_address.unpack(sock, record.socket.family, record.peer))
    tcp_rebuild.apply_rest(sock, record.socket, "its connection")
    tcp_rebuild.apply_late(sock, record)


def _called(state: int) -> str:
    return State(state).name


def _ends(sock: socket.socket) -> str:
    return (
        f"{inet_address.local(sock, sock.family)} to {inet_address.remote(sock, sock.family) or 'nobody yet'}"
    )


def _ends_of(record: TcpState) -> str:
    return f"{record.local} to {record.peer}" if record.peer is not None else str(record.local or "unbound")


def _subject(file: OpenFile, record: TcpState) -> str:
    return f"open file {file.index} (tcp, {_ends_of(record)})"


KIND = Tcp()
