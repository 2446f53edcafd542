"""Names and numbers of the interfaces of a network, asked of any socket of that network.

A socket answers for the network namespace it was made in, wherever it is used.

Source: netdevice(7).
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct

_SIOCGIFNAME = 0x8910
_SIOCGIFFLAGS = 0x8913
_SIOCGIFINDEX = 0x8933
_IFF_UP = 1
#: struct ifreq: a name, and a union of 24 bytes
_REQUEST_BYTES = 40
_NAME_BYTES = 16


def name_of(sock: socket.socket, index: int) -> bytes:
    """The name of interface `index`. OSError: ENODEV."""
    request = struct.pack("<16si", b"", index).ljust(_REQUEST_BYTES, b"\0")
    return fcntl.ioctl(sock, _SIOCGIFNAME, request)[:_NAME_BYTES].split(b"\0")[0]


def number_of(sock: socket.socket, name: bytes) -> int:
    """The number of the interface called `name`. OSError: ENODEV."""
    answer = fcntl.ioctl(sock, _SIOCGIFINDEX, _question(name))
    return int(struct.unpack_from("<i", answer, _NAME_BYTES)[0])


def is_up(sock: socket.socket, name: bytes) -> bool:
    """Whether the interface called `name` is up. OSError: ENODEV."""
    answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _question(name))
    return bool(struct.unpack_from("<H", answer, _NAME_BYTES)[0] & _IFF_UP)


def _question(name: bytes) -> bytes:
    if len(name) >= _NAME_BYTES:
        raise OSError(errno.ENODEV, "no interface has so long a name")
    return name.ljust(_REQUEST_BYTES, b"\0")
