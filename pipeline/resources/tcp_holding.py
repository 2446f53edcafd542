"""What is held of a tree's connections while it stands still; see `pipeline.resources.held` and `tcp_tree`.

When the tree has ended, our duplicates are the last that hold its connections: they are closed in repair mode, which
says nothing to the peer.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from pipeline.errors import Blocker, Refused
from pipeline.ids import LocalFd
from pipeline.image.schema import Index
from pipeline.kernel.nfnetlink import Ends, Listener
from pipeline.ledger import LEDGER
from pipeline.resources import tcp_read
from pipeline.resources.held import Held
from pipeline.resources.kinds import CaptureScope
from pipeline.resources.socket_identity import ANY, borrowed
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.tcp_lock import Lock
from pipeline.resources.tcp_seen import Seen


class TcpHolding:
    """The locks, and duplicates of the connections.

    Args:
        scope: of the capture.
        outside: by network, connections with a peer outside, and their ends.
        listeners: by network, of those networks in which they may be locked.

    Raises:
        Refused: the kernel does not lock a connection.
    """

    def __init__(
        self,
        scope: CaptureScope,
        outside: Mapping[Index, Sequence[tuple[Seen, Ends]]],
        listeners: Mapping[Index, Sequence[Listener]],
    ) -> None:
        self._held: Held = scope.held
        self._locks: list[Lock] = []
        self._duplicates: list[LocalFd] = []
        #: lock of each connection that is locked
        self.names: dict[Index, str] = {}
        self._held.add(self)
        for netns in {*outside, *listeners}:
            there = outside.get(netns, ())
            try:
                self._lock(scope, netns, there, listeners.get(netns, ()))
            except OSError as error:
                if not there:
                    continue  # clients that come now are told that nobody is there any more
                raise Refused(
                    [
                        Blocker(one.view.subject, f"its peer cannot be held off: {error.strerror}")
                        for one, _ in there
                    ]
                ) from error

    def _lock(
        self,
        scope: CaptureScope,
        netns: Index,
        there: Sequence[tuple[Seen, Ends]],
        listeners: Sequence[Listener],
    ) -> None:
        name = secrets.token_hex(8)
        made = partial(scope.in_network, netns)
        ends = [one for _, one in there]
        self._locks.append(Lock(name, made, ends, listeners, netns == EXTERNAL_NETWORK))
        self.names |= {one.index: name for one, _ in there}

    def hold(self, seen: Iterable[Seen]) -> None:
        """Keep a duplicate of each."""
        for one in seen:
            duplicate = LocalFd(os.dup(one.view.local))
            LEDGER.take("connection", duplicate)
            self._duplicates.append(duplicate)

    def let_go(self) -> None:
        """The connections go on."""
        self._close_duplicates()
        self._close_locks()

    def ended(self) -> list[str]:
        """Our duplicates are the last: nobody is told, and the locks stay."""
        said = []
        for lock in self._locks:
            try:
                lock.keep(self._held.image)
            except OSError as error:
                said.append(f"peers may be told that their connections have ended: {error.strerror}")
        for duplicate in self._duplicates:
            with borrowed(duplicate, ANY) as sock:
                try:
                    sock.setsockopt(socket.IPPROTO_TCP, tcp_read.REPAIR, tcp_read.ON)
                except OSError as error:
                    said.append(f"a peer is told that its connection has ended: {error.strerror}")
        self._close_duplicates()
        return said

    def settled(self) -> list[str]:
        """The connections are elsewhere: what would be dropped here comes there."""
        said = []
        for lock in self._locks:
            try:
                lock.forget()
            except OSError as error:
                said.append(f"run `python -m pipeline clean`: connections stay locked: {error.strerror}")
        return said

    def close(self) -> None:
        """What is left of the locks ends; see `Lock`."""
        self._close_locks()

    def _close_duplicates(self) -> None:
        while self._duplicates:
            duplicate = self._duplicates.pop()
            os.close(duplicate)
            LEDGER.give_back("connection", duplicate)

    def _close_locks(self) -> None:
        while self._locks:
            self._locks.pop().close()
