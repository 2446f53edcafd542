"""Addresses of IPv4 and IPv6 sockets as an image holds them, and binding to them.

An interface index means nothing on another host: the scope of a link-local IPv6 address
is recorded as the interface's name, in the network of the socket.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Annotated, Any

from msgspec import Meta, Struct

from pipeline.errors import RebuildError
from pipeline.image.schema import U32
from pipeline.kernel import interfaces

Port = Annotated[int, Meta(ge=0, le=0xFFFF)]
_REASONS = {
    errno.EADDRINUSE: "the address is in use here",
    errno.EADDRNOTAVAIL: "no interface here has the address",
    errno.EACCES: "binding to this port is not allowed here",
    errno.ENETUNREACH: "there is no route to it here",
}


class Address(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`host` packed (4 or 16 bytes), `port`, for IPv6 also the flow label and the interface of its scope."""

    host: Annotated[bytes, Meta(min_length=4, max_length=16)]
    port: Port
    flow: U32 = 0
    interface: Annotated[str, Meta(max_length=15)] = ""

    @property
    def is_set(self) -> bool:
        """Whether it names anything: a socket that is not bound has neither host nor port."""
        return bool(self.port or any(self.host))

    def __str__(self) -> str:
        if len(self.host) == 4:
            return f"{socket.inet_ntop(socket.AF_INET, self.host)}:{self.port}"
        scope = f"%{self.interface}" if self.interface else ""
        return f"[{socket.inet_ntop(socket.AF_INET6, self.host)}{scope}]:{self.port}"


def pack(sock: socket.socket, family: int, name: Any) -> Address:
    """The record of what getsockname or getpeername returned."""
    host = socket.inet_pton(family, name[0].split("%")[0])
    if family == socket.AF_INET:
        return Address(host, name[1])
    return Address(host, name[1], name[2], os.fsdecode(interfaces.name_of(sock, name[3])) if name[3] else "")


def unpack(sock: socket.socket, family: int, address: Address) -> Any:
    """The tuple that bind and connect take in the network of `sock`.

    Raises:
        RebuildError: the interface of its scope does not exist there, or the record is malformed.
    """
    try:
        host = socket.inet_ntop(family, address.host)
        if family == socket.AF_INET:
            return host, address.port
        scope = interfaces.number_of(sock, os.fsencode(address.interface)) if address.interface else 0
    except (OSError, ValueError) as error:
        raise RebuildError(f"address {address.host.hex()}%{address.interface}: {error}") from error
    return host, address.port, address.flow & 0xFFFFF, scope


def local(sock: socket.socket, family: int) -> Address:
    """The address that `sock` is bound to."""
    return pack(sock, family, sock.getsockname())


def remote(sock: socket.socket, family: int) -> Address | None:
    """The address that `sock` is connected to; None if it is not."""
    try:
        return pack(sock, family, sock.getpeername())
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return None


def bind(sock: socket.socket, family: int, address: Address, subject: str) -> None:
    """bind(2).

    Raises:
        RebuildError: names the address and why not.
    """
    try:
        sock.bind(unpack(sock, family, address))
    except OSError as error:
        raise RebuildError(f"{subject}: cannot bind {address}: {_reason(error)}") from error


def connect(sock: socket.socket, family: int, address: Address, subject: str) -> None:
    """connect(2) of a datagram socket: only sets the peer.

    Raises:
        RebuildError: names the address and why not.
    """
    try:
        sock.connect(unpack(sock, family, address))
    except OSError as error:
        raise RebuildError(f"{subject}: cannot connect to {address}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, error.strerror or str(error))
