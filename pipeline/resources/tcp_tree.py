"""All TCP sockets of a tree at once: who is connected with whom, who waits to be accepted, and what they hold.

A connection whose other end is in the tree, in the same network, stands still with it: both ends are read, and what is
on its way between them is what one has sent and the other has not received. All others are locked before they are
read (`pipeline.resources.tcp_lock`), and listeners with them: a client that came while the tree stands still would
be told that it is connected, by somebody who is about to end.

A client that waits to be accepted has no descriptor at the listener's side. Where it is in the tree and has sent
nothing that was received, its connection is made anew, in the order in which the clients were last heard. Any other
is waited for.
"""

from __future__ import annotations

import errno
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, partial

from pipeline.errors import Blocker, Refused, raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.image.schema import Index
from pipeline.kernel import tcpdiag
from pipeline.kernel.nfnetlink import Ends, Listener, open_socket, tables
from pipeline.kernel.rtnetlink import Netlink, socket_of
from pipeline.kernel.tcpdiag import NETLINK_SOCK_DIAG, TcpEntry
from pipeline.resources import inet_address, sockets, tcp_read
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.tcp_holding import TcpHolding
from pipeline.resources.tcp_pairs import agree
from pipeline.resources.tcp_seen import Seen, is_tcp, see
from pipeline.resources.tcp_state import (
    CONNECTED,
    FIN_UNACKNOWLEDGED,
    Client,
    Connection,
    State,
    info_of,
    plain,
)

#: why such a connection cannot be made again, with what waits to be sent
UNSENT_WHILE_CLOSING = "both ends of its TCP connection send no more, and not all was sent yet (CLOSING)"
#: in which a socket without a descriptor waits to be accepted, or soon will
WAITING = frozenset({State.ESTABLISHED, State.CLOSE_WAIT, State.SYN_RECV, State.NEW_SYN_RECV})
#: of whom it counts what the kernel lists of them
_LISTED = WAITING | FIN_UNACKNOWLEDGED | {State.SYN_SENT}
_CHANGED = "its TCP state has just changed"
_TIMES = 20
#: how long what was written to closed connections may take to be sent while the tree stands still
_DRAIN_S, _DRAIN_PAUSE_S = 0.3, 0.005


def waits_at(entry: TcpEntry, host: bytes, port: int) -> bool:
    """Whether a socket that the kernel lists waits to be accepted, or soon will, at a listener; `host`: zeros: any."""
    own_host, own_port = plain(*entry.local)
    return (
        entry.inode == 0
        and entry.state in WAITING
        and own_port == port
        and (own_host == host or not any(host))
    )


@dataclass(slots=True)
class Waiting:
    """Who waits at a listener: sockets of the tree, in order; `reason`: why that is not all that can be carried."""

    clients: list[Index] = field(default_factory=list)
    reason: str = ""


class TcpTree:
    """See the module; one for each capture, by `of`.

    Args:
        scope: of the capture.
    """

    def __init__(self, scope: CaptureScope) -> None:
        self._scope = scope
        self.seen: dict[LocalFd, Seen] = {}
        #: those that the destination gives: not to be locked or read
        self.given: dict[LocalFd, Seen] = {}
        for index, view in scope.files():
            if is_tcp(view):
                with view.as_socket() as sock:
                    netns = sockets.network(sock, scope)
                    if netns is not None:
                        which = self.given if sockets.is_given(view, scope) else self.seen
                        which[view.local] = see(index, view, netns, sock)
        self._by_ends = {
            (one.netns, one.local, one.remote): one for one in self.seen.values() if one.remote is not None
        }
        self._connections: dict[Index, Connection] | None = None
        #: nobody can come to a listener, or be told anything by a connection, where that is permitted
        self._is_locked = False
        #: names of the locks of those that are locked
        self.locks: dict[Index, str] = {}

    @classmethod
    def of(cls, scope: CaptureScope) -> TcpTree:
        """That of a capture."""
        known: TcpTree | None = scope.peers().get("tcp")
        if known is None:
            known = scope.peers()["tcp"] = cls(scope)
        return known

    def partner(self, one: Seen) -> Seen | None:
        """The other end, if the tree has it in the same network."""
        return self._by_ends.get((one.netns, one.remote, one.local)) if one.remote is not None else None

    def is_joined(self, view: FdView) -> bool:
        """Whether a socket that is given is connected to one of the tree, or one of the two waits at the other."""
        one = self.given.get(view.local)
        others = [*self.seen.values(), *self.given.values()]
        return one is not None and any(
            _are_joined(one, other) or _waits_at(one, other) or _waits_at(other, one) for other in others
        )

    # -- who waits --------------------------------------------------------------------------

    @cached_property
    def _listed(self) -> dict[Index, list[TcpEntry]]:
        """By network; empty where this kernel does not tell."""
        return self._list(_LISTED) or {}

    def _list(self, states: Collection[State]) -> dict[Index, list[TcpEntry]] | None:
        """Those in these states, by network; None: this kernel does not tell."""
        found = {}
        for netns in {one.netns for one in self.seen.values()}:
            made = self._scope.in_network(netns, partial(socket_of, NETLINK_SOCK_DIAG))
            with Netlink(made) as diag:
                try:
                    found[netns] = list(tcpdiag.dump(diag, states))
                except FileNotFoundError:
                    return None
        return found

    @cached_property
    def is_listed(self) -> bool:
        """Whether this kernel says who waits, where a connection goes that is being made, and what still is sent."""
        return self._list({State.LISTEN}) is not None

    def _entries(self, netns: Index) -> list[TcpEntry]:
        return self._listed.get(netns, [])

    def peer_of_connecting(self, one: Seen) -> Address | None:
        """Where a socket in SYN_SENT wants to go; None if it has come there meanwhile, or was refused."""
        for entry in self._entries(one.netns):
            if entry.inode == one.view.stat.st_ino and entry.state == State.SYN_SENT:
                return Address(*entry.remote)
        return None

    @cached_property
    def waiting(self) -> dict[Index, Waiting]:
        """By listener, of those at which anybody waits or is about to.

        Who is about to is looked at once only of a tree that stands still: when all is locked.
        """
        found: dict[Index, Waiting] = {}
        listeners = [one for one in self.seen.values() if one.info.state == State.LISTEN]
        if self._scope.still and not self._is_locked and not any(one.info.waiting for one in listeners):
            return found
        for one in listeners:
            there = [entry for entry in self._entries(one.netns) if waits_at(entry, *one.local)]
            begun = [entry for entry in there if entry.state in (State.SYN_RECV, State.NEW_SYN_RECV)]
            if one.info.waiting or begun:
                found[one.index] = self._look(one, there, len(begun))
        return found

    def _look(self, listener: Seen, there: list[TcpEntry], begun: int) -> Waiting:
        if begun:
            return Waiting(reason=f"{begun} connection(s) are just being made")
        count = listener.info.waiting
        clients = [self._client(listener, entry) for entry in there]
        inside = sorted((one for one in clients if one is not None), key=lambda one: -one.info.last_heard_ms)
        alike = [
            one
            for one in self.seen.values()
            if one.info.state == State.LISTEN and (one.netns, one.local) == (listener.netns, listener.local)
        ]
        if len(inside) != count or len(there) != count:
            return Waiting(reason=f"{count} connection(s) wait to be accepted")
        if len(alike) > 1:
            return Waiting(reason=f"{count} connection(s) wait to be accepted, by one of several listeners")
        return Waiting([one.index for one in inside])

    def _client(self, listener: Seen, entry: TcpEntry) -> Seen | None:
        """The other end of a connection that waits, if the tree has it and nothing was received yet."""
        one = self._by_ends.get((listener.netns, plain(*entry.remote), plain(*entry.local)))
        if one is None or {entry.state, one.info.state} != {State.ESTABLISHED} or entry.received:
            return None
        with one.view.as_socket() as sock:
            queued = tcp_read.queued(sock)
        # its SYN counts as one
        return one if not any(queued) and one.info.acknowledged_bytes <= 1 else None

    def clients_of(self, listener: Seen) -> list[Client]:
        """Who waits at a listener, for the image."""
        found = []
        by_index = {one.index: one for one in self.seen.values()}
        for index in self.waiting[listener.index].clients if listener.index in self.waiting else []:
            with by_index[index].view.as_socket() as sock:
                peer = inet_address.remote(sock, sock.family)
            if peer is not None:
                found.append(Client(index, peer))
        return found

    @cached_property
    def waiting_clients(self) -> set[Index]:
        """Sockets that wait to be accepted and are carried."""
        return {index for waiting in self.waiting.values() for index in waiting.clients}

    # -- connections ------------------------------------------------------------------------

    def is_outside(self, one: Seen) -> bool:
        """Whether a connection has its peer outside of the tree, or of its network."""
        return (
            one.info.state in CONNECTED
            and self.partner(one) is None
            and one.index not in self.waiting_clients
        )

    def lockable(self, netns: Index) -> OSError | None:
        """Why connections of a network cannot be locked; None if they can."""
        known: dict[Index, OSError | None] = self._scope.peers().setdefault("tcp lockable", {})
        if netns not in known:
            try:
                with self._scope.in_network(netns, open_socket) as sock:
                    tables(sock)
                known[netns] = None
            except OSError as error:
                known[netns] = error
        return known[netns]

    def connections(self) -> dict[Index, Connection]:
        """Lock and read every connection of the tree, which stands still; done once.

        Raises:
            Refused: something has changed since it was checked, or the kernel does not let us.
        """
        if self._connections is None:
            found: dict[Index, Connection] = {}
            if self._scope.policy.tcp != "close":
                found = self._read(self._hold())
            self._connections = found
        return self._connections

    def _let_drain(self) -> None:
        """Wait for what was closed and is still being sent: in a network that ends with the tree it would be lost.

        Raises:
            Refused: it is not taken by its peer.
        """
        deadline = time.monotonic() + _DRAIN_S
        while True:
            closed = [
                (netns, entry)
                for netns, entries in self._listed.items()
                for entry in entries
                if netns != EXTERNAL_NETWORK and _is_closed_and_sends(entry)
            ]
            if not closed:
                return
            if time.monotonic() > deadline:
                subject = next(one.view.subject for one in self.seen.values() if one.netns == closed[0][0])
                reason = (
                    f"in its network {len(closed)} connection(s) that were closed still send what was written"
                )
                raise Refused([Blocker(subject, reason, "wait until it is sent", transient=True)])
            time.sleep(_DRAIN_PAUSE_S)
            self.__dict__.pop("_listed", None)

    def _hold(self) -> TcpHolding:
        """Lock what has its other end outside, and the listeners as far as that is permitted."""
        outside: dict[Index, list[tuple[Seen, Ends]]] = defaultdict(list)
        for one in self.seen.values():
            wanted = self.peer_of_connecting(one) if one.info.state == State.SYN_SENT else None
            if wanted is not None:
                outside[one.netns].append((one, one.ends(plain(wanted.host, wanted.port))))
            elif self.is_outside(one):
                outside[one.netns].append((one, one.ends(one.remote)))
        # where it is not permitted, clients that come now are told that nobody is there any more
        return TcpHolding(self._scope, outside, self.lockable_listeners(set(outside)))

    def lockable_listeners(self, also: Collection[Index] = ()) -> dict[Index, list[Listener]]:
        """What is listened on, by network: of those that can be locked, and of `also`."""
        found: dict[Index, list[Listener]] = defaultdict(list)
        for one in self.seen.values():
            if one.info.state == State.LISTEN and (one.netns in also or self.lockable(one.netns) is None):
                host, port = one.local
                found[one.netns].append((host if any(host) else b"", port))
        return found

    def _read(self, holding: TcpHolding) -> dict[Index, Connection]:
        before = self.waiting_clients
        self._is_locked = True
        self._forget()
        self._let_drain()
        self._look_again(before)
        wanted = [
            one
            for one in self.seen.values()
            if one.info.state in CONNECTED and one.index not in self.waiting_clients
        ]
        holding.hold(one for one in self.seen.values() if one.info.state in (*CONNECTED, State.SYN_SENT))
        try:
            read = self._read_pairs(wanted)
        except OSError as error:
            raise_if_exhausted(error)
            raise Refused(
                [
                    Blocker(
                        wanted[0].view.subject,
                        f"its connection cannot be read: {error.strerror}",
                        transient=True,
                    )
                ]
            ) from error
        stuck = [
            Blocker(one.view.subject, UNSENT_WHILE_CLOSING, transient=True)
            for one in wanted
            if read[one.index].state == State.CLOSING and read[one.index].unsent
        ]
        if stuck:
            raise Refused(stuck)
        self.locks = holding.names
        return read

    def _read_pairs(self, wanted: list[Seen]) -> dict[Index, Connection]:
        """Until both ends of each pair fit together: between two looks something may arrive."""
        by_index = {one.index: one for one in wanted}
        pending = list(wanted)
        read: dict[Index, Connection] = {}
        for _ in range(_TIMES):
            if not pending:
                return read
            read |= dict(
                zip(
                    [one.index for one in pending],
                    tcp_read.read([one.view.local for one in pending], self._scope.shield),
                    strict=True,
                )
            )
            pending = [one for one in wanted if read[one.index].state not in CONNECTED]
            for one in wanted:
                other = self.partner(one)
                if other is None or other.index not in by_index or one.index > other.index or pending:
                    continue
                fitting = agree(read[one.index], read[other.index])
                if fitting is None:
                    pending += [one, other]
                else:
                    read[one.index], read[other.index] = fitting
        raise OSError(errno.ENODATA, "what is on its way does not arrive")

    def _forget(self) -> None:
        for name in ("_listed", "waiting", "waiting_clients"):
            self.__dict__.pop(name, None)

    def _look_again(self, before: Collection[Index]) -> None:
        """Everybody is locked now: what came in between? `before`: the clients that waited.

        Raises:
            Refused: something.
        """
        by_index = {one.index: one for one in self.seen.values()}
        changed: dict[Index, str] = {}
        for one in self.seen.values():
            with one.view.as_socket() as sock:
                now = info_of(sock)
            if now.state != one.info.state and not (now.state in CONNECTED and one.info.state in CONNECTED):
                changed[one.index] = _CHANGED
            one.info = now
        changed |= {index: waiting.reason for index, waiting in self.waiting.items() if waiting.reason}
        changed |= dict.fromkeys(self.waiting_clients ^ set(before), _CHANGED)
        if changed:
            raise Refused(
                [Blocker(by_index[index].view.subject, why, transient=True) for index, why in changed.items()]
            )


def _are_joined(one: Seen, other: Seen) -> bool:
    return one.netns == other.netns and (one.local, one.remote) == (other.remote, other.local)


def _waits_at(one: Seen, listener: Seen) -> bool:
    """Whether a connection may be one that waits at a listener."""
    if not listener.info.waiting or listener.info.state != State.LISTEN or one.remote is None:
        return False
    (host, port), (listens_host, listens_port) = one.remote, listener.local
    return (
        one.netns == listener.netns
        and port == listens_port
        and (host == listens_host or not any(listens_host))
    )


def _is_closed_and_sends(entry: TcpEntry) -> bool:
    """A FIN alone, which counts as one, may be lost."""
    return entry.inode == 0 and entry.state in FIN_UNACKNOWLEDGED and entry.queued > 1
