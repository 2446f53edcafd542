"""The peer of a datagram socket, one without a port, too.

getpeername(2) says of a socket that is connected to port 0 that it is not connected. That is how raw and ping
sockets are connected. The tables of the network show whom they are connected to.

Source: net/ipv4/af_inet.c (inet_getname), net/ipv4/raw.c (raw_sock_seq_show); proc_pid_net(5).
"""

from __future__ import annotations

import socket
import struct

from pipeline.image.schema import Index
from pipeline.resources import inet_address
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.socket_identity import Identity
from pipeline.userns.visit import read_file

_TABLES = {
    socket.IPPROTO_UDP: "udp", 136: "udplite", socket.IPPROTO_ICMP: "icmp", socket.IPPROTO_ICMPV6: "icmp",
}  # fmt: skip
_REMOTE, _INODE = 2, 9


def remote(
    view: FdView, sock: socket.socket, who: Identity, netns: Index, scope: CaptureScope
) -> Address | None:
    """Whom `sock` is connected to; None if it is not."""
    found = inet_address.remote(sock, who.family)
    if found is not None:
        return found
    table = "raw" if who.type == socket.SOCK_RAW else _TABLES[who.protocol]
    table += "" if who.family == socket.AF_INET else "6"
    key = ("peers without port", netns, table)
    known: dict[int, bytes] | None = scope.peers().get(key)
    if known is None:
        known = scope.peers()[key] = _peers(scope.look_in_network(netns, lambda: _read(table)))
    host = known.get(view.stat.st_ino, b"")
    return Address(host, 0) if any(host) else None


def _read(table: str) -> bytes:
    try:
        return read_file(f"/proc/thread-self/net/{table}")
    except FileNotFoundError:
        return b""


def _peers(text: bytes) -> dict[int, bytes]:
    """Inode -> packed address of the peer; each 32 bits of it stand there as one number of this processor."""
    found = {}
    for words in map(bytes.split, text.splitlines()[1:]):
        host = bytes.fromhex(words[_REMOTE].split(b":")[0].decode())
        found[int(words[_INODE])] = struct.pack(
            f"<{len(host) // 4}I", *struct.unpack(f">{len(host) // 4}I", host)
        )
    return found
