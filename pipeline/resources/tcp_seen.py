"""One TCP socket of a tree, as it was seen."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from pipeline.image.schema import Index
from pipeline.kernel.nfnetlink import Ends
from pipeline.resources import inet_address
from pipeline.resources.kinds import FdView
from pipeline.resources.tcp_state import End, Info, info_of, plain


def is_tcp(view: FdView) -> bool:
    """Whether `view` is a TCP socket of either family."""
    who = view.identity
    return (
        who is not None
        and who.family in (socket.AF_INET, socket.AF_INET6)
        and (who.type, who.protocol) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
    )


@dataclass(slots=True)
class Seen:
    """One TCP socket, as it was seen. `remote`: None unless the kernel names a peer."""

    index: Index
    view: FdView
    netns: Index
    info: Info
    local: End
    remote: End | None

    def ends(self, remote: End | None) -> Ends:
        """As a lock names them."""
        assert remote is not None
        return (*remote, *self.local)


def see(index: Index, view: FdView, netns: Index, sock: socket.socket) -> Seen:
    """Look at a socket; nothing is changed."""
    info = info_of(sock)
    local = inet_address.local(sock, sock.family)
    remote = inet_address.remote(sock, sock.family)
    return Seen(
        index,
        view,
        netns,
        info,
        plain(local.host, local.port),
        plain(remote.host, remote.port) if remote is not None else None,
    )
