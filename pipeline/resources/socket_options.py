"""The socket options of every family: read on a duplicate, set where they differ.

An option is read with getsockopt(2) on a duplicate of the target's socket, which changes
nothing there, and set on the new socket only if the new one has another value: defaults
that a host gives itself stay the host's business unless the program's value differs,
and no privilege is needed for what is equal anyway.

Kept as raw bytes of the size that the kernel fills; an option that a kernel or family
does not know (ENOPROTOOPT, EOPNOTSUPP) is not recorded. Interfaces are kept by name: their
numbers are a host's, or a network's, own. Refused: extended packet filters, classic ones of
unix sockets, and upper-layer protocols. Not visible to anybody, hence not preserved: what
`EXCLUDED` of the table says of, and the interface that IP_MULTICAST_IF names by number alone.

Which options there are: `pipeline.resources.socket_table`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel import interfaces
from pipeline.resources import socket_filter
from pipeline.resources.socket_identity import Identity, borrowed
from pipeline.resources.socket_table import (
    LONGEST_HEADERS_BYTES,
    SOL_NETLINK,
    Option,
    is_tcp,
    options_of,
)

__all__ = ["LATE", "SOL_NETLINK", "Packed", "Values", "apply", "capture", "capture_all", "check", "unpacked"]

_SOL = socket.SOL_SOCKET
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
#: SOCK_SNDBUF_LOCK, SOCK_RCVBUF_LOCK of SO_BUF_LOCK
_BUFFERS = {"SO_SNDBUF": 1, "SO_RCVBUF": 2}
_TCP_ULP = 31
_ABSENT = frozenset({errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN, errno.ENODEV})
_FILTER = "SO_ATTACH_FILTER"
#: what would be in the way of messages that are queued again
LATE = frozenset({_FILTER, "SO_LOCK_FILTER", "SO_PEEK_OFF"})

#: option name -> value as getsockopt filled it, interfaces as names
Values = dict[
    Annotated[str, Meta(max_length=40)], Annotated[bytes, Meta(max_length=socket_filter.LONGEST_BYTES)]
]
#: for each socket: like which of them it is, itself if like none before; what is other than there; what it has not
Packed = Sequence[tuple[int, Values, Sequence[str]]]
#: of what a connection is often given: to set one changes no other
_ALONE = frozenset(
    {
        "SO_KEEPALIVE",
        "SO_LINGER",
        "SO_OOBINLINE",
        "SO_RCVTIMEO",
        "SO_REUSEPORT",
        "SO_SNDTIMEO",
        "TCP_KEEPCNT",
        "TCP_KEEPIDLE",
        "TCP_KEEPINTVL",
        "TCP_NODELAY",
        "TCP_USER_TIMEOUT",
    }
)


@cache
def _carried(who: Identity) -> tuple[Option, ...]:
    return tuple(option for option in options_of(who) if not option.refused)


@cache
def _positions(who: Identity) -> dict[str, int]:
    """Where each of `_carried` stands, by its name."""
    return {option.name: at for at, option in enumerate(_carried(who))}


def _read(sock: socket.socket, option: Option) -> bytes | None:
    if option.name == _FILTER:
        return socket_filter.read(sock)
    try:
        value = sock.getsockopt(option.level, option.number, option.size_bytes)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    if option.text:
        return value.split(b"\0")[0]
    if option.varies:
        return value
    # Some options of level IP answer with one byte where the value fits into it.
    value = value.ljust(option.size_bytes, b"\0")
    if option.device:
        index = int.from_bytes(value, "little" if option.device == "host order" else "big")
        return interfaces.name_of(sock, index) if index else b""
    return value


def check(sock: socket.socket, who: Identity, subject: str) -> Iterator[Blocker]:
    """What stops the options of `sock` from being carried: see the module's text."""
    for option in options_of(who):
        if option.refused or option.device or option.varies:
            if option.name == _FILTER:
                continue
            try:
                value = _read(sock, option)
            except OSError as error:
                yield Blocker(
                    subject, f"{option.name} names an interface that is gone ({error.strerror})", "clear it"
                )
                continue
            if option.refused and value is not None and any(value):
                yield Blocker(subject, f"{option.name} is set: {option.refused}", "clear the option")
            if option.size_bytes == LONGEST_HEADERS_BYTES == len(value or b""):
                yield Blocker(subject, f"{option.name} is too long to be read", "clear the option")
    yield from socket_filter.check(sock, who, subject)
    if is_tcp(who):
        try:
            layer = sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).split(b"\0")[0]
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        else:
            if layer:
                yield Blocker(subject, f"the upper-layer protocol {layer.decode()} is attached", "close it")


def capture(sock: socket.socket, who: Identity) -> Values:
    """Every option that `sock` has, whatever its value."""
    found: Values = {}
    for option in _carried(who):
        value = _read(sock, option)
        if value is not None:
            found[option.name] = value
    return found


def capture_all(sockets: Sequence[tuple[LocalFd, Identity]]) -> Packed:
    """`capture` of many, small: they are much alike. `unpacked` makes them what they are."""
    found = []
    firsts: dict[Identity, tuple[int, Values]] = {}
    for at, (local, who) in enumerate(sockets):
        with borrowed(local, who) as sock:
            values = capture(sock, who)
        like, first = firsts.setdefault(who, (at, {}))
        other = {name: value for name, value in values.items() if first.get(name) != value}
        found.append((like, other, [name for name in first if name not in values]))
        if like == at:
            first.update(values)
    return found


def unpacked(packed: Packed) -> list[Values]:
    """What `capture_all` was asked for, in its order."""
    found: list[Values] = []
    for at, (like, other, missing) in enumerate(packed):
        values = {} if like == at else found[like].copy()
        values.update(other)
        for name in missing:
            del values[name]
        found.append(values)
    return found


def apply(
    sock: socket.socket,
    who: Identity,
    values: Mapping[str, bytes],
    subject: str,
    without: Collection[str] = (),
    fresh: Values | None = None,
) -> None:
    """Give `sock` the recorded values, in the order of the table.

    Args:
        sock: the new socket.
        who: what it is.
        values: by name.
        subject: how a message names it.
        without: names of those that are for later, such as `LATE`.
        fresh: what it has, where that is known: what `capture` says of another one that was made in the same way. Its
            own are only read once something is set that may change another option.

    Raises:
        RebuildError: an option is unknown, or the kernel does not take the value.
    """
    carried, positions = _carried(who), _positions(who)
    if unknown := values.keys() - positions.keys():
        raise RebuildError(f"{subject}: socket option {min(unknown)} does not exist for this socket")
    differing = [name for name, value in values.items() if fresh is None or fresh.get(name) != value]
    for at in sorted(positions[name] for name in differing):
        option = carried[at]
        if option.name in without:
            continue
        wanted = values[option.name]
        _check_size(option, wanted, subject)
        there = _read(sock, option) if fresh is None else fresh.get(option.name)
        if there == wanted or (there is None and not any(wanted)):
            continue
        try:
            _set(sock, option, wanted, _is_tuned(option, values))
        except OSError as error:
            named = option.text or option.device
            shown = wanted.decode(errors="replace") if named else wanted[:64].hex()
            raise RebuildError(
                f"{subject}: {option.name} cannot be set to {shown}: {error.strerror or error}"
            ) from error
        if fresh is not None and option.name not in _ALONE:
            behind = {one.name: values[one.name] for one in carried[at + 1 :] if one.name in values}
            apply(sock, who, behind, subject, without)
            return


def _check_size(option: Option, value: bytes, subject: str) -> None:
    if option.text or option.device:
        fits = len(value) <= 16
    elif option.varies:
        fits = len(value) <= option.size_bytes
    else:
        fits = len(value) == option.size_bytes
    if not fits:
        raise RebuildError(f"{subject}: {option.name} has {len(value)} bytes, not {option.size_bytes}")


def _is_tuned(option: Option, values: Mapping[str, bytes]) -> bool:
    """Whether a buffer has the size that the kernel has given it, and not one that the program asked for."""
    bit = _BUFFERS.get(option.name)
    locks = values.get("SO_BUF_LOCK")
    return bit is not None and locks is not None and not int.from_bytes(locks, "little") & bit


def _set(sock: socket.socket, option: Option, wanted: bytes, is_tuned: bool) -> None:
    if option.name == _FILTER:
        socket_filter.attach(sock, wanted)
        return
    if option.device:
        index = interfaces.number_of(sock, wanted) if wanted else 0
        wanted = index.to_bytes(4, "little" if option.device == "host order" else "big")
    if option.name not in _BUFFERS:
        sock.setsockopt(option.level, option.number, wanted)
        return
    # The kernel doubles what it is given; the forced variant knows no limit but needs CAP_NET_ADMIN.
    (doubled,) = struct.unpack("<i", wanted)
    forced = _SO_SNDBUFFORCE if option.name == "SO_SNDBUF" else _SO_RCVBUFFORCE
    try:
        sock.setsockopt(_SOL, forced, doubled // 2)
    except PermissionError:
        sock.setsockopt(_SOL, option.number, doubled // 2)
        # one that the kernel has tuned may be larger than anybody may ask for; it grows again
        if not is_tuned and sock.getsockopt(_SOL, option.number) < doubled - 1:
            raise
