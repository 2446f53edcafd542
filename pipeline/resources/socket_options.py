"""The socket options of every family: declared once, read on a duplicate, set where they differ.

An option is read with getsockopt(2) on a duplicate of the target's socket, which changes
nothing there, and set on the new socket only if the new one has another value: defaults
that a host gives itself stay the host's business unless the program's value differs,
and no privilege is needed for what is equal anyway.

Kept as raw bytes of the size that the kernel fills; an option that a kernel or family
does not know (ENOPROTOOPT, EOPNOTSUPP) is not recorded. Refused by name: options whose
value is a number of this host (interface indexes), classic and extended packet filters,
and upper-layer protocols. Not visible to anybody, hence not preserved: programs of
SO_ATTACH_REUSEPORT_*, TCP_MD5SIG and TCP_AO keys.

Sources: socket(7), unix(7), ip(7), ipv6(7), tcp(7), udp(7), netlink(7); include/uapi.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall

SOL_NETLINK = 270
_SO_GET_FILTER = 26
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_TCP_ULP = 31
_ABSENT = frozenset({errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN, errno.ENODEV})

#: option name -> value as getsockopt filled it
Values = dict[Annotated[str, Meta(max_length=40)], Annotated[bytes, Meta(max_length=256)]]


@dataclass(frozen=True, slots=True)
class Identity:
    """What socket(2) was called with: `family` AF_*, `type` SOCK_* without flags, `protocol`."""

    family: int
    type: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
        name: as the kernel spells it; the key in an image.
        level: SOL_* or IPPROTO_*.
        number: for getsockopt.
        size_bytes: of the value.
        applies: to which sockets.
        carried: false where a value other than zero is refused, because it means something on one host only.
        text: the value is a name, cut at its first zero byte.
    """

    name: str
    level: int
    number: int
    size_bytes: int
    applies: Callable[[Identity], bool]
    carried: bool = True
    text: bool = False


def _any(_: Identity) -> bool:
    return True


def _unix(who: Identity) -> bool:
    return who.family == socket.AF_UNIX


def _inet(who: Identity) -> bool:
    return who.family in (socket.AF_INET, socket.AF_INET6)


def _inet6(who: Identity) -> bool:
    return who.family == socket.AF_INET6


def _tcp(who: Identity) -> bool:
    return _inet(who) and who.type == socket.SOCK_STREAM


def _udp(who: Identity) -> bool:
    return _inet(who) and who.type == socket.SOCK_DGRAM


def _unix_or_udp(who: Identity) -> bool:
    return _unix(who) or _udp(who)


def _netlink(who: Identity) -> bool:
    return who.family == socket.AF_NETLINK


def _ints(
    level: int, applies: Callable[[Identity], bool], prefix: str, carried: bool = True, **numbers: int
) -> list[Option]:
    return [Option(prefix + name, level, number, 4, applies, carried) for name, number in numbers.items()]


_SOL = socket.SOL_SOCKET
OPTIONS: tuple[Option, ...] = (
    *_ints(
        _SOL, _any, "SO_",
        DEBUG=1, REUSEADDR=2, DONTROUTE=5, BROADCAST=6, SNDBUF=7, RCVBUF=8, KEEPALIVE=9, OOBINLINE=10,
        PRIORITY=12, REUSEPORT=15, RCVLOWAT=18, TIMESTAMP=29, TIMESTAMPNS=35, MARK=36, TIMESTAMPING=37,
        RXQ_OVFL=40, WIFI_STATUS=41, NOFCS=43, LOCK_FILTER=44, SELECT_ERR_QUEUE=45, BUSY_POLL=46,
        ZEROCOPY=60, TIMESTAMP_NEW=63, TIMESTAMPNS_NEW=64, PREFER_BUSY_POLL=69, RESERVE_MEM=73,
        TXREHASH=74, RCVMARK=75, RCVPRIORITY=82,
    ),
    Option("SO_LINGER", _SOL, 13, 8, _any),
    Option("SO_RCVTIMEO", _SOL, 20, 16, _any),
    Option("SO_SNDTIMEO", _SOL, 21, 16, _any),
    Option("SO_MAX_PACING_RATE", _SOL, 47, 8, _any),
    Option("SO_TXTIME", _SOL, 61, 8, _inet),
    Option("SO_BINDTODEVICE", _SOL, 25, 16, _inet, text=True),
    *_ints(_SOL, _unix, "SO_", PASSPIDFD=76, PASSRIGHTS=83, PASSSEC=34),
    *_ints(_SOL, lambda who: _unix(who) or _netlink(who), "SO_", PASSCRED=16),
    *_ints(_SOL, _unix_or_udp, "SO_", PEEK_OFF=42),
    *_ints(
        socket.IPPROTO_IP, _inet, "IP_",
        TOS=1, TTL=2, RECVOPTS=6, RETOPTS=7, PKTINFO=8, MTU_DISCOVER=10, RECVERR=11, RECVTTL=12, RECVTOS=13,
        FREEBIND=15, PASSSEC=18, TRANSPARENT=19, RECVORIGDSTADDR=20, MINTTL=21, CHECKSUM=23,
        BIND_ADDRESS_NO_PORT=24, RECVFRAGSIZE=25, RECVERR_RFC4884=26, MULTICAST_TTL=33, MULTICAST_LOOP=34,
        MULTICAST_ALL=49, LOCAL_PORT_RANGE=51,
    ),
    *_ints(socket.IPPROTO_IP, _inet, "IP_", carried=False, MULTICAST_IF=32, UNICAST_IF=50),
    *_ints(
        socket.IPPROTO_IPV6, _inet6, "IPV6_",
        FLOWINFO=11, UNICAST_HOPS=16, MULTICAST_HOPS=18, MULTICAST_LOOP=19, MTU_DISCOVER=23, RECVERR=25,
        V6ONLY=26, MULTICAST_ALL=29, RECVERR_RFC4884=31, FLOWINFO_SEND=33, RECVPKTINFO=49, RECVHOPLIMIT=51,
        RECVHOPOPTS=53, RECVRTHDR=56, RECVDSTOPTS=58, RECVPATHMTU=60, DONTFRAG=62, RECVTCLASS=66, TCLASS=67,
        AUTOFLOWLABEL=70, ADDR_PREFERENCES=72, MINHOPCOUNT=73, RECVORIGDSTADDR=74, TRANSPARENT=75,
        RECVFRAGSIZE=77, FREEBIND=78,
    ),
    *_ints(socket.IPPROTO_IPV6, _inet6, "IPV6_", carried=False, MULTICAST_IF=17, UNICAST_IF=76),
    *_ints(
        socket.IPPROTO_TCP, _tcp, "TCP_",
        NODELAY=1, MAXSEG=2, CORK=3, KEEPIDLE=4, KEEPINTVL=5, KEEPCNT=6, SYNCNT=7, LINGER2=8, DEFER_ACCEPT=9,
        WINDOW_CLAMP=10, THIN_LINEAR_TIMEOUTS=16, THIN_DUPACK=17, USER_TIMEOUT=18, FASTOPEN=23,
        NOTSENT_LOWAT=25, SAVE_SYN=27, FASTOPEN_CONNECT=30, FASTOPEN_NO_COOKIE=34, INQ=36, TX_DELAY=37,
        RTO_MAX_MS=44, RTO_MIN_US=45, DELACK_MAX_US=46,
    ),
    Option("TCP_CONGESTION", socket.IPPROTO_TCP, 13, 16, _tcp, text=True),
    *_ints(
        socket.IPPROTO_UDP, _udp, "UDP_",
        CORK=1, ENCAP=100, NO_CHECK6_TX=101, NO_CHECK6_RX=102, SEGMENT=103, GRO=104,
    ),
    *_ints(
        SOL_NETLINK, _netlink, "NETLINK_",
        PKTINFO=3, BROADCAST_ERROR=4, NO_ENOBUFS=5, LISTEN_ALL_NSID=8, CAP_ACK=10, EXT_ACK=11,
        GET_STRICT_CHK=12,
    ),
    # Setting a buffer size locks it against tuning by the kernel; so this one is the last.
    *_ints(_SOL, _any, "SO_", BUF_LOCK=72),
)  # fmt: skip
_BY_NAME = {option.name: option for option in OPTIONS}


def _read(sock: socket.socket, option: Option) -> bytes | None:
    try:
        value = sock.getsockopt(option.level, option.number, option.size_bytes)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    # Some options of level IP answer with one byte where the value fits into it.
    return value.split(b"\0")[0] if option.text else value.ljust(option.size_bytes, b"\0")


def check(sock: socket.socket, who: Identity, subject: str) -> Iterator[Blocker]:
    """What stops the options of `sock` from being carried: see the module's text."""
    for option in OPTIONS:
        if not option.carried and option.applies(who):
            value = _read(sock, option)
            if value is not None and any(value):
                yield Blocker(
                    subject, f"{option.name} names an interface or address of this host", "clear the option"
                )
    try:
        if _filter_length(sock):
            yield Blocker(subject, "a packet filter (SO_ATTACH_FILTER) is attached", "detach it")
    except OSError as error:
        yield Blocker(
            subject, f"a packet filter is attached that cannot be read ({error.strerror})", "detach it"
        )
    if _tcp(who):
        try:
            layer = sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).split(b"\0")[0]
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        else:
            if layer:
                yield Blocker(subject, f"the upper-layer protocol {layer.decode()} is attached", "close it")


def _filter_length(sock: socket.socket) -> int:
    """Number of instructions of the attached classic filter; with length 0 the kernel only counts."""
    length = ctypes.create_string_buffer(struct.pack("<i", 0), 4)
    try:
        syscall(NR.getsockopt, sock.fileno(), _SOL, _SO_GET_FILTER, 0, length)
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise
    return int(struct.unpack("<i", length.raw)[0])


def capture(sock: socket.socket, who: Identity) -> Values:
    """Every option that `sock` has, whatever its value."""
    found: Values = {}
    for option in OPTIONS:
        if option.carried and option.applies(who):
            value = _read(sock, option)
            if value is not None:
                found[option.name] = value
    return found


def apply(sock: socket.socket, who: Identity, values: Mapping[str, bytes], subject: str) -> None:
    """Give `sock` the recorded values, in the order of the table.

    Raises:
        RebuildError: an option is unknown, or the kernel does not take the value.
    """
    for name in values:
        if name not in _BY_NAME or not _BY_NAME[name].applies(who):
            raise RebuildError(f"{subject}: socket option {name} does not exist for this socket")
    for option in OPTIONS:
        wanted = values.get(option.name)
        if wanted is None:
            continue
        if not option.text and len(wanted) != option.size_bytes:
            raise RebuildError(f"{subject}: {option.name} has {len(wanted)} bytes, not {option.size_bytes}")
        if _read(sock, option) == wanted:
            continue
        try:
            _set(sock, option, wanted)
        except OSError as error:
            shown = wanted.decode(errors="replace") if option.text else wanted.hex()
            raise RebuildError(
                f"{subject}: {option.name} cannot be set to {shown}: {error.strerror or error}"
            ) from error


def _set(sock: socket.socket, option: Option, wanted: bytes) -> None:
    if option.name not in ("SO_SNDBUF", "SO_RCVBUF"):
        sock.setsockopt(option.level, option.number, wanted)
        return
    # The kernel doubles what it is given; the forced variant knows no limit but needs CAP_NET_ADMIN.
    (doubled,) = struct.unpack("<i", wanted)
    forced = _SO_SNDBUFFORCE if option.name == "SO_SNDBUF" else _SO_RCVBUFFORCE
    try:
        sock.setsockopt(_SOL, forced, doubled // 2)
    except PermissionError:
        sock.setsockopt(_SOL, option.number, doubled // 2)
        if sock.getsockopt(_SOL, option.number) < doubled - 1:
            raise
