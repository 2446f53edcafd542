"""The socket options of all families: what each is called, who has it, and how its value travels.

`OPTIONS` is read and set from the top to the bottom by `pipeline.resources.socket_options`. `EXCLUDED` names
every other option of the kernel's headers with the reason why it is not there: a test compares both with them.

Sources: socket(7), unix(7), ip(7), ipv6(7), tcp(7), udp(7), raw(7), packet(7), netlink(7); include/uapi.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import cache
from typing import Literal

import msgspec

from pipeline.resources.socket_identity import Identity

SOL_NETLINK = 270
SOL_PACKET = 263
_SOL_RAW = 255
_SOL_UDPLITE = 136
#: what Python reads at once; headers may be twice as long
LONGEST_HEADERS_BYTES = 1024

#: how the kernel holds the number of an interface, which travels as its name
Device = Literal["", "host order", "network order"]


class Option(msgspec.Struct, frozen=True):
    """One option.

    Args:
        name: as the kernel spells it; the key in an image.
        level: SOL_* or IPPROTO_*.
        number: for getsockopt.
        size_bytes: of the value; of the longest one where `varies`.
        applies: to which sockets.
        refused: why a value other than zero is not carried.
        text: the value is a name, cut at its first zero byte.
        varies: the value is as long as it is.
        device: the value is the number of an interface.
    """

    name: str
    level: int
    number: int
    size_bytes: int
    applies: Callable[[Identity], bool]
    refused: str = ""
    text: bool = False
    varies: bool = False
    device: Device = ""


def _any(_: Identity) -> bool:
    return True


def _unix(who: Identity) -> bool:
    return who.family == socket.AF_UNIX


def _inet(who: Identity) -> bool:
    return who.family in (socket.AF_INET, socket.AF_INET6)


def _inet6(who: Identity) -> bool:
    return who.family == socket.AF_INET6


def is_tcp(who: Identity) -> bool:
    """Whether it is a TCP socket."""
    return _inet(who) and who.type == socket.SOCK_STREAM


def _udp(who: Identity) -> bool:
    return _inet(who) and who.type == socket.SOCK_DGRAM


def _raw(who: Identity) -> bool:
    return _inet(who) and who.type == socket.SOCK_RAW


def _unix_or_udp(who: Identity) -> bool:
    return _unix(who) or _udp(who)


def _netlink(who: Identity) -> bool:
    return who.family == socket.AF_NETLINK


def _packet(who: Identity) -> bool:
    return who.family == socket.AF_PACKET


def _ints(
    level: int, applies: Callable[[Identity], bool], prefix: str, refused: str = "", **numbers: int
) -> list[Option]:
    return [Option(prefix + name, level, number, 4, applies, refused) for name, number in numbers.items()]


def _headers(level: int, applies: Callable[[Identity], bool], prefix: str, **numbers: int) -> list[Option]:
    return [
        Option(prefix + name, level, number, LONGEST_HEADERS_BYTES, applies, varies=True)
        for name, number in numbers.items()
    ]


_SOL = socket.SOL_SOCKET
_IP = socket.IPPROTO_IP
_IPV6 = socket.IPPROTO_IPV6
OPTIONS: tuple[Option, ...] = (
    *_ints(
        _SOL, _any, "SO_",
        DEBUG=1, REUSEADDR=2, DONTROUTE=5, BROADCAST=6, SNDBUF=7, RCVBUF=8, KEEPALIVE=9, OOBINLINE=10,
        NO_CHECK=11, PRIORITY=12, REUSEPORT=15, RCVLOWAT=18, TIMESTAMP=29, TIMESTAMPNS=35, MARK=36,
    ),
    Option("SO_TIMESTAMPING", _SOL, 37, 8, _any),
    *_ints(
        _SOL, _any, "SO_",
        RXQ_OVFL=40, WIFI_STATUS=41, NOFCS=43, SELECT_ERR_QUEUE=45, BUSY_POLL=46,
        ZEROCOPY=60, TIMESTAMP_NEW=63, TIMESTAMPNS_NEW=64, PREFER_BUSY_POLL=69, RESERVE_MEM=73,
        TXREHASH=74, RCVMARK=75, RCVPRIORITY=82,
    ),
    Option("SO_TIMESTAMPING_NEW", _SOL, 65, 8, _any),
    Option("SO_LINGER", _SOL, 13, 8, _any),
    Option("SO_RCVTIMEO", _SOL, 20, 16, _any),
    Option("SO_SNDTIMEO", _SOL, 21, 16, _any),
    Option("SO_MAX_PACING_RATE", _SOL, 47, 8, _any),
    Option("SO_TXTIME", _SOL, 61, 8, lambda who: _inet(who) or _packet(who)),
    Option("SO_BINDTODEVICE", _SOL, 25, 16, _inet, text=True),
    *_ints(_SOL, _unix, "SO_", PASSPIDFD=76, PASSRIGHTS=83, PASSSEC=34),
    *_ints(_SOL, lambda who: _unix(who) or _netlink(who), "SO_", PASSCRED=16),
    *_ints(_SOL, lambda who: _unix_or_udp(who) or is_tcp(who), "SO_", PEEK_OFF=42),
    *_ints(
        _IP, _inet, "IP_",
        TOS=1, TTL=2, RECVOPTS=6, RETOPTS=7, PKTINFO=8, MTU_DISCOVER=10, RECVERR=11, RECVTTL=12, RECVTOS=13,
        FREEBIND=15, PASSSEC=18, TRANSPARENT=19, RECVORIGDSTADDR=20, MINTTL=21, CHECKSUM=23,
        BIND_ADDRESS_NO_PORT=24, RECVFRAGSIZE=25, RECVERR_RFC4884=26, MULTICAST_IF=32, MULTICAST_TTL=33,
        MULTICAST_LOOP=34, MULTICAST_ALL=49, LOCAL_PORT_RANGE=51,
    ),
    *_headers(_IP, _inet, "IP_", OPTIONS=4),
    Option("IP_UNICAST_IF", _IP, 50, 4, _inet, device="network order"),
    *_ints(_IP, _raw, "IP_", HDRINCL=3, ROUTER_ALERT=5, NODEFRAG=22),
    Option("ICMP_FILTER", _SOL_RAW, 1, 4, lambda who: _raw(who) and who.protocol == socket.IPPROTO_ICMP),
    *_ints(
        _IPV6, _inet6, "IPV6_",
        FLOWINFO=11, UNICAST_HOPS=16, MULTICAST_HOPS=18, MULTICAST_LOOP=19, MTU_DISCOVER=23, RECVERR=25,
        V6ONLY=26, MULTICAST_ALL=29, RECVERR_RFC4884=31, FLOWINFO_SEND=33, RECVPKTINFO=49, RECVHOPLIMIT=51,
        RECVHOPOPTS=53, RECVRTHDR=56, RECVDSTOPTS=58, RECVPATHMTU=60, DONTFRAG=62, RECVTCLASS=66, TCLASS=67,
        AUTOFLOWLABEL=70, ADDR_PREFERENCES=72, MINHOPCOUNT=73, RECVORIGDSTADDR=74, TRANSPARENT=75,
        RECVFRAGSIZE=77, FREEBIND=78,
    ),
    *_ints(_IPV6, _inet6, "IPV6_2292", PKTINFO=2, HOPOPTS=3, DSTOPTS=4, RTHDR=5, HOPLIMIT=8),
    *_headers(_IPV6, _inet6, "IPV6_", HOPOPTS=54, RTHDRDSTOPTS=55, RTHDR=57, DSTOPTS=59),
    Option("IPV6_MULTICAST_IF", _IPV6, 17, 4, _inet6, device="host order"),
    Option("IPV6_UNICAST_IF", _IPV6, 76, 4, _inet6, device="network order"),
    *_ints(_IPV6, lambda who: _inet6(who) and _raw(who), "IPV6_", CHECKSUM=7, HDRINCL=36),
    *_ints(
        _IPV6, lambda who: _inet6(who) and _raw(who), "IPV6_",
        refused="the kernel does not tell which router alerts it wants", ROUTER_ALERT=22, ROUTER_ALERT_ISOLATE=30,
    ),
    Option(
        "ICMPV6_FILTER", socket.IPPROTO_ICMPV6, 1, 32,
        lambda who: _inet6(who) and _raw(who) and who.protocol == socket.IPPROTO_ICMPV6,
    ),
    *_ints(
        socket.IPPROTO_TCP, is_tcp, "TCP_",
        NODELAY=1, MAXSEG=2, CORK=3, KEEPIDLE=4, KEEPINTVL=5, KEEPCNT=6, SYNCNT=7, LINGER2=8, DEFER_ACCEPT=9,
        WINDOW_CLAMP=10, THIN_LINEAR_TIMEOUTS=16, THIN_DUPACK=17, USER_TIMEOUT=18, FASTOPEN=23,
        NOTSENT_LOWAT=25, SAVE_SYN=27, FASTOPEN_CONNECT=30, FASTOPEN_NO_COOKIE=34, INQ=36, TX_DELAY=37,
        RTO_MAX_MS=44, RTO_MIN_US=45, DELACK_MAX_US=46,
    ),
    Option("TCP_CONGESTION", socket.IPPROTO_TCP, 13, 16, is_tcp, text=True),
    *_ints(
        socket.IPPROTO_UDP, _udp, "UDP_",
        CORK=1, ENCAP=100, NO_CHECK6_TX=101, NO_CHECK6_RX=102, SEGMENT=103, GRO=104,
    ),
    *_ints(
        _SOL_UDPLITE, lambda who: _udp(who) and who.protocol == _SOL_UDPLITE, "UDPLITE_",
        SEND_CSCOV=10, RECV_CSCOV=11,
    ),
    *_ints(
        SOL_PACKET, _packet, "PACKET_",
        VERSION=10, RESERVE=12, COPY_THRESH=7, AUXDATA=8, ORIGDEV=9, LOSS=14, VNET_HDR=15, VNET_HDR_SZ=24, TIMESTAMP=17,
        TX_HAS_OFF=19, QDISC_BYPASS=20, IGNORE_OUTGOING=23,
    ),
    *_ints(
        SOL_NETLINK, _netlink, "NETLINK_",
        PKTINFO=3, BROADCAST_ERROR=4, NO_ENOBUFS=5, LISTEN_ALL_NSID=8, CAP_ACK=10, EXT_ACK=11,
        GET_STRICT_CHK=12,
    ),
    # The filter has a way of its own (`socket_filter`). It is locked, and so are buffer sizes, when they are set.
    Option("SO_ATTACH_FILTER", _SOL, 26, 8 * 4096, _any, varies=True),
    *_ints(_SOL, _any, "SO_", LOCK_FILTER=44, BUF_LOCK=72),
)  # fmt: skip


@cache
def options_of(who: Identity) -> tuple[Option, ...]:
    """Those that a socket has."""
    return tuple(option for option in OPTIONS if option.applies(who))


_FIXED = "is fixed when the socket is made"
_SAYS = "only tells something"
_ACT = "is an act, not a state"
_OTHER_NAME = "is another name of an option that is carried"
_NOTHING = "does nothing on any kernel since 2.6"
_MEMBERSHIP = "groups are carried by themselves (pipeline.resources.multicast)"
_UNREADABLE = "the kernel does not tell it"
_TCP_KIND = "is a matter of TCP connections, carried or refused there"
#: every other option that the headers know: why it is not in the table
EXCLUDED: dict[str, str] = {
    **dict.fromkeys(("SO_TYPE", "SO_PROTOCOL", "SO_DOMAIN", "SO_ACCEPTCONN", "SO_COOKIE", "SO_NETNS_COOKIE"), _FIXED),
    **dict.fromkeys(
        ("SO_PEERCRED", "SO_PEERNAME", "SO_PEERSEC", "SO_PEERGROUPS", "SO_PEERPIDFD", "SO_BPF_EXTENSIONS", "SO_MEMINFO",
         "SO_INCOMING_NAPI_ID", "IP_MTU", "IP_PROTOCOL", "IPV6_PATHMTU", "IP_PKTOPTIONS", "IPV6_2292PKTOPTIONS",
         "PACKET_ROLLOVER_STATS", "PACKET_HDRLEN", "TCP_INFO", "TCP_CC_INFO", "TCP_SAVED_SYN", "TCP_IS_MPTCP"),
        _SAYS,
    ),
    **dict.fromkeys(
        ("SO_DETACH_FILTER", "SO_DETACH_BPF", "SO_DETACH_REUSEPORT_BPF", "SO_CNX_ADVICE", "IPV6_ADDRFORM",
         "SO_DEVMEM_DONTNEED", "PACKET_FANOUT_DATA", "TCP_QUICKACK", "TCP_ZEROCOPY_RECEIVE"),
        _ACT,
    ),
    **dict.fromkeys(
        ("SO_SNDBUFFORCE", "SO_RCVBUFFORCE", "SO_BINDTOIFINDEX", "SO_GET_FILTER", "SO_RCVTIMEO_OLD", "SO_SNDTIMEO_OLD",
         "SO_RCVTIMEO_NEW", "SO_SNDTIMEO_NEW", "SO_TIMESTAMP_OLD", "SO_TIMESTAMPNS_OLD", "SO_TIMESTAMPING_OLD",
         "IP_RECVRETOPTS", "IP_ORIGDSTADDR", "IPV6_ORIGDSTADDR", "TCP_CM_INQ"),
        _OTHER_NAME,
    ),
    **dict.fromkeys(
        ("SO_BSDCOMPAT", "SO_SNDLOWAT", "SO_SECURITY_AUTHENTICATION", "SO_SECURITY_ENCRYPTION_TRANSPORT",
         "SO_SECURITY_ENCRYPTION_NETWORK", "PACKET_RECV_OUTPUT", "PACKET_TX_TIMESTAMP", "IPV6_AUTHHDR",
         "IPV6_USE_MIN_MTU",
         "NETLINK_RX_RING", "NETLINK_TX_RING"),
        _NOTHING,
    ),
    **dict.fromkeys(
        ("IP_ADD_MEMBERSHIP", "IP_DROP_MEMBERSHIP", "IP_UNBLOCK_SOURCE", "IP_BLOCK_SOURCE", "IP_ADD_SOURCE_MEMBERSHIP",
         "IP_DROP_SOURCE_MEMBERSHIP", "IP_MSFILTER", "MCAST_JOIN_GROUP", "MCAST_BLOCK_SOURCE", "MCAST_UNBLOCK_SOURCE",
         "MCAST_LEAVE_GROUP", "MCAST_JOIN_SOURCE_GROUP", "MCAST_LEAVE_SOURCE_GROUP", "MCAST_MSFILTER",
         "IPV6_ADD_MEMBERSHIP", "IPV6_DROP_MEMBERSHIP"),
        _MEMBERSHIP,
    ),
    **dict.fromkeys(
        ("PACKET_ADD_MEMBERSHIP", "PACKET_DROP_MEMBERSHIP", "PACKET_FANOUT", "PACKET_RX_RING", "PACKET_TX_RING"),
        "carried or refused by pipeline.resources.packet_socket",
    ),
    **dict.fromkeys(
        ("NETLINK_ADD_MEMBERSHIP", "NETLINK_DROP_MEMBERSHIP", "NETLINK_LIST_MEMBERSHIPS"),
        "carried by pipeline.resources.netlink_socket",
    ),
    **dict.fromkeys(
        ("SO_BUSY_POLL_BUDGET", "SO_ATTACH_REUSEPORT_CBPF", "SO_ATTACH_REUSEPORT_EBPF", "IP_IPSEC_POLICY",
         "IP_XFRM_POLICY", "IPV6_IPSEC_POLICY", "IPV6_XFRM_POLICY", "IPV6_PKTINFO", "IPV6_HOPLIMIT", "IPV6_NEXTHOP",
         "TCP_MD5SIG", "TCP_MD5SIG_EXT"),
        _UNREADABLE,
    ),
    **dict.fromkeys(
        ("TCP_REPAIR", "TCP_REPAIR_QUEUE", "TCP_QUEUE_SEQ", "TCP_REPAIR_OPTIONS", "TCP_TIMESTAMP", "TCP_REPAIR_WINDOW",
         "TCP_ULP", "TCP_FASTOPEN_KEY", "TCP_AO_ADD_KEY", "TCP_AO_DEL_KEY", "TCP_AO_INFO", "TCP_AO_GET_KEYS",
         "TCP_AO_REPAIR"),
        _TCP_KIND,
    ),
    "SO_ERROR": "reading it takes the error away: a pending one is refused",
    "SO_ATTACH_BPF": "an extended filter cannot be read, and is refused",
    "SO_INCOMING_CPU": "the kernel writes the processor of the last packet into it",
    "SO_DEVMEM_LINEAR": "is seen with a message only",
    "SO_DEVMEM_DMABUF": "is seen with a message only",
    "SO_INQ": "is another name of TCP_INQ for unix sockets, read by no getsockopt",
    "IPV6_MTU": "reading it tells the path's: a smaller limit that the program has set is not told",
    "IPV6_JOIN_ANYCAST": "addresses joined are refused (pipeline.resources.multicast)",
    "IPV6_LEAVE_ANYCAST": "see IPV6_JOIN_ANYCAST",
    "IPV6_FLOWLABEL_MGR": "leases of flow labels are refused (pipeline.resources.multicast)",
    "PACKET_STATISTICS": "reading it sets the counters back; they begin anew",
}  # fmt: skip
