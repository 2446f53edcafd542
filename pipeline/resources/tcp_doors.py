"""Closed doors: no new client comes to the listeners of a tree that still runs, so that it can accept those that wait.

On a busy server somebody waits at almost any moment, and only accept(2) shows what a client has sent. So before such
a tree is stopped once more, the first segment of every new client is dropped for a moment (who sent it sends it again),
until nobody waits. The tree runs then, and no descriptor of it is held. The rules are owned by a socket of ours, and
end with us.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

from pipeline.kernel import tcpdiag
from pipeline.kernel.nfnetlink import Listener
from pipeline.kernel.rtnetlink import Netlink, socket_of
from pipeline.kernel.tcpdiag import NETLINK_SOCK_DIAG
from pipeline.remote.tracer import check_cancelled
from pipeline.resources.kinds import CaptureScope
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.tcp_lock import Lock
from pipeline.resources.tcp_tree import WAITING, TcpTree, waits_at

#: how long a tree may take to accept those that wait already
_ACCEPTS_S, _PAUSE_S = 1.0, 0.002


class Doors:
    """The listeners of a tree, closed until `open`; where that is not permitted they stay open."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        #: by network, what is listened on
        self._watched: list[tuple[Netlink, list[Listener]]] = []

    def close(self, scope: CaptureScope) -> None:
        """Let nobody new in. `scope`: of a look at the tree, which stands still."""
        for netns, there in TcpTree.of(scope).lockable_listeners().items():
            with suppress(OSError):
                made = partial(scope.in_network, netns)
                lock = Lock(secrets.token_hex(8), made, (), there, netns == EXTERNAL_NETWORK)
                self._stack.callback(lock.close)
                diag = self._stack.enter_context(Netlink(made(partial(socket_of, NETLINK_SOCK_DIAG))))
                self._watched.append((diag, there))

    def wait(self) -> None:
        """Wait, a little, until nobody waits at them any more; the tree runs."""
        deadline = time.monotonic() + _ACCEPTS_S
        with suppress(OSError):  # this kernel does not tell
            while any(_somebody_waits(*one) for one in self._watched) and time.monotonic() < deadline:
                check_cancelled()
                time.sleep(_PAUSE_S)

    def open(self) -> None:
        """Let clients in again; idempotent."""
        self._watched.clear()
        self._stack.close()


def _somebody_waits(diag: Netlink, there: Sequence[Listener]) -> bool:
    return any(
        waits_at(entry, host, port) for entry in list(tcpdiag.dump(diag, WAITING)) for host, port in there
    )
