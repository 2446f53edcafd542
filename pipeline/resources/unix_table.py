"""All unix sockets of a tree, and what sock_diag(7) says of each: so ends find each other.

Source: sock_diag(7), unix(7).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from functools import partial

from pipeline.errors import Blocker, Refused
from pipeline.image.schema import Index
from pipeline.kernel.sockdiag import State, UnixDiag, UnixSocket
from pipeline.resources import sockets
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.unix_state import raw_name


class Table:
    """All unix sockets of the tree, and what sock_diag says of each; kept in `CaptureScope.peers`."""

    def __init__(self, scope: CaptureScope) -> None:
        self.members: dict[int, tuple[Index, FdView]] = {}
        self._known: dict[int, UnixSocket | Refused | None] = {}
        self._scope = scope
        self._networks = {EXTERNAL_NETWORK}
        for index, view in scope.files():
            who = view.identity
            if who is not None and who.family == socket.AF_UNIX:
                self.members[view.stat.st_ino] = index, view
                with view.as_socket() as sock:
                    netns = sockets.network(sock, scope)
                if netns is not None:
                    self._networks.add(netns)

    def find(self, inode: int) -> UnixSocket | None:
        """sock_diag's answer, asked once.

        Raises:
            Refused: it is a listener at which too many wait.
        """
        if inode not in self._known:
            self._ask({inode, *self.members} - self._known.keys())
        found = self._known[inode]
        if isinstance(found, Refused):
            raise found
        return found

    def _ask(self, inodes: Collection[int]) -> None:
        """Of all at once, because it takes a while to get into a network."""
        self._known |= dict.fromkeys(inodes)
        for netns in self._networks:  # each knows its own only
            with UnixDiag(partial(self._scope.in_network, netns)) as diag:
                for inode in inodes:
                    self._known[inode] = self._known[inode] or self._answer(diag, inode)

    def _answer(self, diag: UnixDiag, inode: int) -> UnixSocket | Refused | None:
        try:
            return diag.find(inode)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            subject = self.members[inode][1].subject if inode in self.members else f"unix socket {inode}"
            why = "more clients wait to be accepted than the kernel lists"
            return Refused([Blocker(subject, why, "wait until some are accepted", transient=True)])

    def listener_of(self, inode: int) -> int | None:
        """Inode of the listener in the tree at which socket `inode` waits to be accepted."""
        for member in self.members:
            found = self.find(member)
            if found is not None and inode in found.waiting:
                return member
        return None

    def is_joined(self, inode: int) -> bool:
        """Whether another socket of the tree is the peer of socket `inode`, has it for one, or waits for the other."""
        own = self.find(inode)
        if own is not None and (own.peer in self.members or any(one in self.members for one in own.waiting)):
            return True
        if any(found is not None and found.peer == inode for found in map(self.find, self.members)):
            return True
        return self.listener_of(inode) is not None

    def listens_at(self, name: bytes) -> bool:
        """Whether a listener in the tree has this name."""
        for member, (_, view) in self.members.items():
            found = self.find(member)
            if found is not None and found.state == State.LISTEN and name_of(view) == name:
                return True
        return False


def table_of(scope: CaptureScope) -> Table:
    """The one of this capture."""
    table = scope.peers().get("unix sockets")
    if table is None:
        table = scope.peers()["unix sockets"] = Table(scope)
    return table


def name_of(view: FdView) -> bytes:
    """Its own name, see `unix_state`."""
    with view.as_socket() as sock:
        return raw_name(sock.getsockname())


def peer_name_of(view: FdView) -> bytes:
    """That of its peer; empty without one."""
    with view.as_socket() as sock:
        try:
            return raw_name(sock.getpeername())
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            return b""
