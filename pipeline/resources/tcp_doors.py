"""Closed doors: no new client comes to the listeners of a tree that still runs, so that it can accept those that wait.

On a busy server somebody waits at almost any moment, and only accept(2) shows what a client has sent. So before such
a tree is stopped once more, the first segment of every new client is dropped for a moment (who sent it sends it again),
until nobody waits. The rules are owned by a socket of ours, and end with us.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from functools import partial

from pipeline.resources.kinds import CaptureScope
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.tcp_lock import Lock
from pipeline.resources.tcp_tree import TcpTree

#: how long a tree may take to accept those that wait already
_ACCEPTS_S, _PAUSE_S = 1.0, 0.002


class Doors:
    """The listeners of a tree, closed until `open`; where that is not permitted they stay open."""

    def __init__(self) -> None:
        self._locks: list[Lock] = []

    def close(self, scope: CaptureScope) -> None:
        """Let nobody new in, and wait, a little, until nobody waits any more.

        Args:
            scope: of a look at the tree, which runs.
        """
        tree = TcpTree.of(scope)
        for netns, there in tree.lockable_listeners().items():
            with suppress(OSError):
                made = partial(scope.in_network, netns)
                self._locks.append(Lock(secrets.token_hex(8), made, (), there, netns == EXTERNAL_NETWORK))
        deadline = time.monotonic() + _ACCEPTS_S
        while self._locks and tree.anybody_waits() and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)

    def open(self) -> None:
        """Let clients in again; idempotent."""
        while self._locks:
            self._locks.pop().close()
