"""What sock_diag(7) says about UDP sockets: which directions are shut down.

The kernel lists sockets that have a port. A netlink socket answers for the network namespace it was made in.

Source: sock_diag(7), include/uapi/linux/inet_diag.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from pipeline.kernel.rtnetlink import Netlink, attributes, socket_of

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_ALL_STATES = 0xFFFF_FFFF
#: struct inet_diag_req_v2: family, protocol, extensions, states, identity
_REQUEST = struct.Struct("<BBBxI48x")
#: struct inet_diag_msg, whose last word is the inode
_MESSAGE_BYTES = 72
_SHUTDOWN = 8


def shut_down(
    made: Callable[[Callable[[], socket.socket]], socket.socket], family: int, protocol: int
) -> dict[int, int]:
    """Inode of every socket with a port -> what is shut down: bit 0 receiving, bit 1 sending.

    Args:
        made: makes the netlink socket in the network namespace that is asked.
        family: AF_INET or AF_INET6.
        protocol: UDP or UDP-Lite.

    Raises:
        OSError: ENOENT: this kernel has no such tables.
    """
    found = {}
    with Netlink(made(lambda: socket_of(_NETLINK_SOCK_DIAG))) as link:
        for message in link.dump(_BY_FAMILY, _REQUEST.pack(family, protocol, 0, _ALL_STATES)):
            (inode,) = struct.unpack_from("<I", message, _MESSAGE_BYTES - 4)
            found[inode] = attributes(message[_MESSAGE_BYTES:]).get(_SHUTDOWN, b"\0")[0]
    return found
