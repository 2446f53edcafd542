"""The options table: every option of the kernel's headers is in it or excluded with a reason; values come back."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.kernel import interfaces
from pipeline.resources import socket_filter, socket_options
from pipeline.resources.socket_identity import Identity
from pipeline.resources.socket_table import EXCLUDED, OPTIONS, Option
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of

SOL = socket.SOL_SOCKET
_INCLUDE = Path("/usr/include")
#: header, prefix of its options, and what has that prefix and is no option
_HEADERS = [
    ("asm-generic/socket.h", "SO_", r"$^"),
    ("linux/in.h", "IP_", r"PMTUDISC_|DEFAULT_"),
    ("linux/in.h", "MCAST_", r"EXCLUDE|INCLUDE"),
    ("linux/in6.h", "IPV6_", r"FL_|FLOWINFO_FLOWLABEL|FLOWINFO_PRIORITY|PRIORITY_|TLV_|PMTUDISC_|PREFER_"),
    ("linux/udp.h", "UDP_", r"ENCAP_"),
    ("linux/tcp.h", "TCP_", r"MSS_|REPAIR_O|MD5SIG_(MAX|FLAG)|RECEIVE_ZERO|AO_MAX|AO_KEYF|ACCECN"),
    (
        "linux/if_packet.h",
        "PACKET_",
        r"(HOST|BROADCAST|MULTICAST|OTHERHOST|OUTGOING|LOOPBACK|USER|KERNEL|FASTROUTE)$|FANOUT_[A-CE-Z]|MR_",
    ),
    (
        "linux/netlink.h",
        "NETLINK_",
        (
            r"(ROUTE|UNUSED|USERSOCK|FIREWALL|SOCK_DIAG|NFLOG|XFRM|SELINUX|ISCSI|AUDIT|FIB_LOOKUP|CONNECTOR|NETFILTER"
            r"|IP6_FW|DNRTMSG|KOBJECT_UEVENT|GENERIC|SCSITRANSPORT|ECRYPTFS|RDMA|CRYPTO|SMC|INET_DIAG)$"
        ),
    ),
]


def _names(header: str, prefix: str, others: str) -> Iterator[str]:
    for line in (_INCLUDE / header).read_text().splitlines():
        found = re.match(rf"\s*#\s*define\s+({prefix}\w+)\s+\S", line)
        if found and not re.match(others, found[1].removeprefix(prefix)):
            yield found[1]


@pytest.mark.parametrize(("header", "prefix", "others"), _HEADERS, ids=[h + ":" + p for h, p, _ in _HEADERS])
def test_every_option_of_the_kernel_is_carried_or_excluded_with_a_reason(
    header: str, prefix: str, others: str
) -> None:
    if not (_INCLUDE / header).exists():
        pytest.skip(f"no kernel headers here: {header}")
    names = set(_names(header, prefix, others))
    assert len(names) > 3
    table = {option.name for option in OPTIONS}
    assert names - table - set(EXCLUDED) == set()
    assert table & set(EXCLUDED) == set()
    assert all(EXCLUDED.values())


def _filtered(length: int) -> bytes:
    return struct.pack("<HBBI", 0x28, 0, 0, 0) + struct.pack("<HBBI", 6, 0, 0, length)


@pytest.mark.root
def test_a_classic_filter_comes_back_and_stays_locked() -> None:
    def setup() -> tuple[int, ...]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        socket_filter.attach(sock, _filtered(77))
        sock.setsockopt(SOL, 44, 1)
        return (sock.detach(),)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(os.close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert socket_filter.read(sock) == _filtered(77)
            with pytest.raises(PermissionError):
                socket_filter.attach(sock, b"")


@pytest.mark.root
def test_filters_that_cannot_come_back_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        unix, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        socket_filter.attach(unix, _filtered(9))
        return unix.detach(), other.detach()

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "attached to a unix socket" in capture.reasons(child.result[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with pytest.raises(OSError, match="Invalid argument"):
            socket_filter.attach(sock, b"\xff" * 8)
        with pytest.raises(OSError, match="no instructions"):
            socket_filter.attach(sock, b"\xff" * 7)


@pytest.mark.root
def test_an_extended_filter_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        code = ctypes.create_string_buffer(
            struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
        )
        licence = ctypes.create_string_buffer(b"GPL")
        attributes = struct.pack("<IIQQ", 1, 2, ctypes.addressof(code), ctypes.addressof(licence)).ljust(
            72, b"\0"
        )
        program = ctypes.CDLL(None, use_errno=True).syscall(321, 5, attributes, len(attributes))
        if program < 0:
            return (sock.detach(), 0)
        sock.setsockopt(SOL, 50, struct.pack("<i", program))
        os.close(program)
        return (sock.detach(), 1)

    with subject(setup) as child, Capture(child.pid) as capture:
        fd, loaded = child.result
        if not loaded:
            pytest.skip("no extended packet filters can be loaded here")
        assert "an extended packet filter" in capture.reasons(fd)


def test_interfaces_among_the_options_travel_by_name() -> None:
    def setup() -> tuple[int, ...]:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, 76, struct.pack(">I", 1))
        sock.setsockopt(socket.IPPROTO_IP, 50, struct.pack(">I", 1))
        return (sock.detach(),)

    with subject(setup) as child, Capture(child.pid) as capture:
        (fd,) = child.result
        records = capture.records()
        options = records[-1].state["socket"]["options"]
        for name in ("IPV6_MULTICAST_IF", "IPV6_UNICAST_IF", "IP_UNICAST_IF"):
            assert options[name] == b"lo"
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF) == 1
            assert sock.getsockopt(socket.IPPROTO_IPV6, 76, 4) == struct.pack(">I", 1)
            assert sock.getsockopt(socket.IPPROTO_IP, 50, 4) == struct.pack(">I", 1)


#: options with a value that is not the default, for each kind of socket
_UDP = (socket.AF_INET, socket.SOCK_DGRAM, 17)
_UDP6 = (socket.AF_INET6, socket.SOCK_DGRAM, 17)
_LITE = (socket.AF_INET, socket.SOCK_DGRAM, 136)
_RAW = (socket.AF_INET, socket.SOCK_RAW, 1)
_RAW6 = (socket.AF_INET6, socket.SOCK_RAW, 58)
_PACKET = (socket.AF_PACKET, socket.SOCK_RAW, 0)
_ROUTE = (socket.AF_NETLINK, socket.SOCK_RAW, 0)
_VALUES: list[tuple[tuple[int, int, int], str, bytes]] = [
    *[(_UDP, name, struct.pack("<i", value)) for name, value in {
        "SO_REUSEADDR": 1, "SO_REUSEPORT": 1, "SO_BROADCAST": 1, "SO_NO_CHECK": 1, "SO_PRIORITY": 5, "SO_MARK": 0x1234,
        "SO_TIMESTAMPNS": 1, "SO_RXQ_OVFL": 1, "SO_BUSY_POLL": 50, "SO_PREFER_BUSY_POLL": 1, "SO_RCVMARK": 1,
        "SO_PEEK_OFF": 3,
        "SO_SNDBUF": 40000, "SO_RCVBUF": 50000, "IP_TOS": 0x20, "IP_TTL": 33, "IP_PKTINFO": 1, "IP_RECVERR": 1,
        "IP_MTU_DISCOVER": 2, "IP_TRANSPARENT": 1, "IP_FREEBIND": 1, "IP_MULTICAST_TTL": 7, "IP_MULTICAST_LOOP": 0,
        "IP_MULTICAST_ALL": 0, "IP_LOCAL_PORT_RANGE": 20000 | 30000 << 16, "UDP_CORK": 1, "UDP_SEGMENT": 1200,
        "UDP_GRO": 1,
        "UDP_ENCAP": 2,
    }.items()],
    (_UDP, "SO_TIMESTAMPING", struct.pack("<ii", 0x18, 0)),
    (_UDP, "SO_TIMESTAMPING_NEW", struct.pack("<ii", 0x18, 0)),
    (_UDP, "SO_TXTIME", struct.pack("<iI", 1, 1)),
    (_UDP, "SO_BINDTODEVICE", b"lo"),
    (_UDP, "SO_MAX_PACING_RATE", struct.pack("<q", 123456)),
    (_UDP, "IP_MULTICAST_IF", socket.inet_aton("127.0.0.1")),
    (_UDP, "IP_OPTIONS", b"\x94\x04\x00\x00"),
    *[(_UDP6, name, struct.pack("<i", value)) for name, value in {
        "IPV6_V6ONLY": 1, "IPV6_UNICAST_HOPS": 9, "IPV6_MULTICAST_HOPS": 3, "IPV6_RECVPKTINFO": 1, "IPV6_TCLASS": 8,
        "IPV6_DONTFRAG": 1, "IPV6_2292PKTINFO": 1, "IPV6_AUTOFLOWLABEL": 0, "UDP_NO_CHECK6_TX": 1,
        "UDP_NO_CHECK6_RX": 1,
    }.items()],
    (_UDP6, "IPV6_DSTOPTS", b"\x00\x00\x01\x04\x00\x00\x00\x00"),
    *[(_LITE, name, struct.pack("<i", value)) for name, value in {"UDPLITE_SEND_CSCOV": 20,
    "UDPLITE_RECV_CSCOV": 9}.items()],
    *[(_RAW, name, struct.pack("<i", value)) for name, value in {
        "IP_HDRINCL": 1, "ICMP_FILTER": 0x100, "IP_NODEFRAG": 1, "IP_ROUTER_ALERT": 1,
    }.items()],
    (_RAW6, "ICMPV6_FILTER", b"\xff" * 16 + b"\x0f" * 16),
    ((socket.AF_INET6, socket.SOCK_RAW, 200), "IPV6_CHECKSUM", struct.pack("<i", 4)),
    ((socket.AF_INET6, socket.SOCK_RAW, 200), "IPV6_HDRINCL", struct.pack("<i", 1)),
    *[(_PACKET, name, struct.pack("<i", value)) for name, value in {
        "PACKET_VERSION": 2, "PACKET_RESERVE": 16, "PACKET_COPY_THRESH": 5, "PACKET_AUXDATA": 1, "PACKET_ORIGDEV": 1,
        "PACKET_LOSS": 1, "PACKET_VNET_HDR": 1, "PACKET_VNET_HDR_SZ": 12, "PACKET_TIMESTAMP": 0x40,
        "PACKET_TX_HAS_OFF": 1,
        "PACKET_QDISC_BYPASS": 1, "PACKET_IGNORE_OUTGOING": 1,
    }.items()],
    *[(_ROUTE, "NETLINK_" + name, struct.pack("<i", 1)) for name in (
        "PKTINFO", "BROADCAST_ERROR", "NO_ENOBUFS", "LISTEN_ALL_NSID", "CAP_ACK", "EXT_ACK", "GET_STRICT_CHK",
    )],
]  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize(("who", "name", "value"), _VALUES, ids=[f"{n}-{w[0]}-{w[2]}" for w, n, _ in _VALUES])
def test_an_option_is_read_and_set(who: tuple[int, int, int], name: str, value: bytes) -> None:
    identity = Identity(*who)
    with socket.socket(*who) as old, socket.socket(*who) as new:
        assert socket_options.capture(old, identity)[name] != value
        socket_options.apply(old, identity, {name: value}, "one")
        found = socket_options.capture(old, identity)
        assert found[name] == value
        socket_options.apply(new, identity, found, "another")
        assert socket_options.capture(new, identity) == found
    with socket.socket(*who) as like, socket.socket(*who) as new:
        fresh = socket_options.capture(like, identity)
        socket_options.apply(new, identity, found, "one that is like another", fresh=fresh)
        assert socket_options.capture(new, identity) == found


_TCP_VALUES = {
    "SO_LINGER": struct.pack("<ii", 1, 20),
    "SO_RCVTIMEO": struct.pack("<qq", 3, 500_000),
    "SO_SNDTIMEO": struct.pack("<qq", 4, 0),
    "TCP_KEEPCNT": struct.pack("<i", 7),
    "TCP_KEEPIDLE": struct.pack("<i", 77),
    "TCP_KEEPINTVL": struct.pack("<i", 11),
    "TCP_USER_TIMEOUT": struct.pack("<i", 9000),
}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("name", sorted(socket_options._ALONE))
def test_an_option_that_is_said_to_change_no_other_does_not(name: str, family: int) -> None:
    who = Identity(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        before = socket_options.capture(sock, who)
        value = _TCP_VALUES.get(name, struct.pack("<i", 1))
        socket_options.apply(sock, who, {name: value}, "socket")
        after = socket_options.capture(sock, who)
    assert after == before | {name: value}
    assert after != before


def test_what_is_known_of_a_fresh_socket_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until something is set that may change another option."""
    who = Identity(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with socket.socket() as like, socket.socket() as sock:
        fresh = socket_options.capture(like, who)
        read: list[str] = []
        genuine = socket_options._read

        def counted(sock: socket.socket, option: Option) -> bytes | None:
            read.append(option.name)
            return genuine(sock, option)

        monkeypatch.setattr(socket_options, "_read", counted)
        one = struct.pack("<i", 1)
        socket_options.apply(sock, who, fresh | {"TCP_NODELAY": one}, "socket", fresh=fresh)
        assert not read
        socket_options.apply(sock, who, fresh | {"SO_TIMESTAMP": one}, "socket", fresh=fresh)
        assert "SO_TIMESTAMPNS" in read
        assert "SO_KEEPALIVE" not in read


def test_values_of_another_size_or_socket_are_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        identity = Identity(socket.AF_INET, socket.SOCK_DGRAM, 17)
        for name, value, words in (
            ("IP_TTL", b"\1", "IP_TTL has 1 bytes, not 4"),
            ("NETLINK_PKTINFO", bytes(4), "does not exist for this socket"),
            ("IPV6_ROUTER_ALERT", bytes(4), "does not exist for this socket"),
            ("IP_UNICAST_IF", b"nowhere", "IP_UNICAST_IF cannot be set to nowhere"),
            ("IP_UNICAST_IF", b"n" * 17, "IP_UNICAST_IF has 17 bytes"),
        ):
            with pytest.raises(RebuildError, match=words):
                socket_options.apply(sock, identity, {name: value}, "socket")


@pytest.mark.root
@pytest.mark.parametrize("locks", [0, 1])
def test_a_buffer_that_the_kernel_has_tuned_may_be_smaller_at_first(locks: int) -> None:
    """A plain user may not ask for so much, and the kernel gives it again where the program has asked for nothing."""
    large = struct.pack("<i", 64 << 20)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setresuid(65534, 65534, 65534)
            with socket.socket() as sock:
                values = {"SO_SNDBUF": large, "SO_BUF_LOCK": struct.pack("<i", locks)}
                who = Identity(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
                socket_options.apply(sock, who, values, "it")
                code = 0
        except RebuildError:
            code = 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == locks


def test_interfaces_are_asked_of_a_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert interfaces.name_of(sock, interfaces.number_of(sock, b"lo")) == b"lo"
        assert interfaces.is_up(sock, b"lo") in (True, False)
        for ask in (
            lambda: interfaces.name_of(sock, 99_999),
            lambda: interfaces.number_of(sock, b"n" * 16),
            lambda: interfaces.is_up(sock, b"nowhere"),
        ):
            with pytest.raises(OSError, match=r"No such device|so long a name"):
                ask()
