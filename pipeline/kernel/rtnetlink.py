"""rtnetlink(7): asking for and making devices, addresses, routes, rules, neighbours of a network namespace.

A netlink socket speaks for the network namespace it was made in, wherever it is used, so it is made by a
visitor and used here. Messages are a header, a fixed part, and attributes (16-bit length, 16-bit type, value,
padded to 4 bytes); dumps are complete when they arrive, so nothing waits.

Sources: netlink(7), rtnetlink(7); include/uapi/linux/{netlink,rtnetlink,if_link}.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from types import TracebackType
from typing import Self

_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("<IHHII")
_RECEIVE_BYTES = 1 << 18
_NESTED_BITS = 0x8000 | 0x4000

CREATE, EXCLUSIVE, REPLACE, APPEND = 0x400, 0x200, 0x100, 0x800


class RTM(IntEnum):
    """Messages."""

    NEWLINK = 16
    DELLINK = 17
    GETLINK = 18
    SETLINK = 19
    NEWADDR = 20
    GETADDR = 22
    NEWROUTE = 24
    GETROUTE = 26
    NEWNEIGH = 28
    GETNEIGH = 30
    NEWRULE = 32
    GETRULE = 34
    GETQDISC = 38
    GETNSID = 90


class IFLA(IntEnum):
    """Attributes of a device."""

    ADDRESS = 1
    IFNAME = 3
    MTU = 4
    LINK = 5
    MASTER = 10
    TXQLEN = 13
    OPERSTATE = 16
    LINKINFO = 18
    IFALIAS = 20
    GROUP = 27
    NET_NS_FD = 28
    CARRIER = 33
    LINK_NETNSID = 37
    PROTO_DOWN = 39


class IFLA_INFO(IntEnum):  # noqa: N801 (as the kernel spells it)
    """Attributes of `IFLA.LINKINFO`."""

    KIND = 1
    DATA = 2
    SLAVE_KIND = 4
    SLAVE_DATA = 5


def socket_of(protocol: int = socket.NETLINK_ROUTE) -> socket.socket:
    """A netlink socket of the caller's network namespace."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)


class Netlink:
    """One netlink socket; a context manager that closes it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def dump(self, message: int, payload: bytes) -> Iterator[bytes]:
        """Everything of a sort: the payloads of all answers. OSError: what the kernel says."""
        self._send(message, payload, _DUMP)
        while True:
            for kind, content in self._receive():
                if kind == _DONE:
                    return
                yield content

    def ask(self, message: int, payload: bytes) -> bytes:
        """The one answer to a question. OSError: what the kernel says."""
        self._send(message, payload, 0)
        return next(content for _, content in self._receive())

    def do(self, message: int, payload: bytes, flags: int = 0) -> None:
        """Have something done. OSError: what the kernel says."""
        self._send(message, payload, _ACK | flags)
        for _ in self._receive():
            pass

    def _send(self, message: int, payload: bytes, flags: int) -> None:
        self._sequence += 1
        head = _HEADER.pack(_HEADER.size + len(payload), message, _REQUEST | flags, self._sequence, 0)
        self._socket.send(head + payload)

    def _receive(self) -> Iterator[tuple[int, bytes]]:
        data = self._socket.recv(_RECEIVE_BYTES)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            content = data[at + _HEADER.size : at + length]
            at += length + 3 & ~3
            if kind == _ERROR:
                (code,) = struct.unpack_from("<i", content)
                if code:
                    raise OSError(-code, os.strerror(-code))
                continue
            yield kind, content


def attributes(content: bytes) -> dict[int, bytes]:
    """Attributes by type; of those that repeat the last."""
    found = {}
    at = 0
    while at + 4 <= len(content):
        length, kind = struct.unpack_from("<HH", content, at)
        if length < 4:
            break
        found[kind & ~_NESTED_BITS] = content[at + 4 : at + length]
        at += length + 3 & ~3
    return found


def attribute(kind: int, value: bytes | int) -> bytes:
    """One attribute; numbers are 32 bits."""
    if isinstance(value, int):
        value = struct.pack("<I", value & 0xFFFF_FFFF)
    return struct.pack("<HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
