"""Raw and ping sockets: made again with addresses, options and filters; what waits in them is refused or dropped."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.policy import DumpPolicy
from pipeline.resources import raw_socket
from pipeline.userns.visit import visit
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of

IP, IPV6, SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET
pytestmark = pytest.mark.root


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def test_raw_sockets_keep_addresses_options_and_filter() -> None:
    def setup() -> tuple[int, ...]:
        four = socket.socket(socket.AF_INET, socket.SOCK_RAW, 200)
        four.setsockopt(IP, 3, 1)
        four.bind(("127.0.0.1", 0))
        four.connect(("127.0.0.9", 0))
        six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 201)
        six.setsockopt(IPV6, 7, 4)
        six.bind(("::1", 0))
        icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        icmp.setsockopt(255, 1, struct.pack("<I", 0x1234))
        icmp.setsockopt(
            IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.7.7.7") + socket.inet_aton("127.0.0.1")
        )
        return kept(four, six, icmp)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        with Rebuilt(capture, records) as new:
            with of(new.fd(child.result[0])) as four, of(new.fd(child.result[1])) as six:
                assert (four.proto, four.getsockname()[0]) == (200, "127.0.0.1")
                assert "0100007F:00C8 0900007F:0000 01" in Path("/proc/thread-self/net/raw").read_text()
                assert four.getsockopt(IP, 3) == 1
                assert (six.proto, six.getsockname()[0]) == (201, "::1")
                assert six.getsockopt(IPV6, 7) == 4
                with socket.socket(socket.AF_INET6, socket.SOCK_RAW, 201) as sender:
                    sender.setsockopt(IPV6, 7, 4)
                    sender.sendto(b"checked ", ("::1", 0))
                    assert six.recv(100, socket.MSG_DONTWAIT)[:4] == b"chec"
            with of(new.fd(child.result[2])) as icmp:
                assert icmp.getsockopt(255, 1, 4) == struct.pack("<I", 0x1234)
                with pytest.raises(OSError, match="in use"):
                    icmp.setsockopt(
                        IP,
                        socket.IP_ADD_MEMBERSHIP,
                        socket.inet_aton("239.7.7.7") + socket.inet_aton("127.0.0.1"),
                    )


def test_what_waits_in_a_raw_socket_is_refused_or_dropped() -> None:
    def setup() -> tuple[int, ...]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, 203)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 203) as sender:
            sender.sendto(b"waits", ("127.0.0.1", 0))
        return kept(sock)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            (blocker,) = capture.blockers(fd)
            assert blocker.transient
            assert "messages wait to be read" in blocker.reason
        with Capture(child.pid, policy=DumpPolicy(udp_queue="drop")) as capture:
            records = capture.records()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock, pytest.raises(BlockingIOError):
            sock.recv(1, socket.MSG_DONTWAIT)


def ping_socket(group: int) -> tuple[int, ...]:
    """In a network whose range of groups is that one alone."""
    unshare(CLONE.NEWNET)
    os.system("ip link set lo up")
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write(f"{group} {group}")
    os.setegid(group)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    os.setegid(0)
    sock.bind(("127.0.0.1", 4711))
    sock.connect(("127.0.0.1", 0))
    return kept(sock)


def look_there(pid: int, _: int, look: Callable[[], bytes]) -> bytes:
    """Look in the network of a process."""
    holder = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return visit([(holder, CLONE.NEWNET)], look)
    finally:
        os.close(holder)


@pytest.mark.parametrize("group", [0, 4242])
def test_ping_sockets_keep_their_identifier_and_peer(group: int) -> None:
    with subject(partial(ping_socket, group)) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            capture.network = lambda _: 9  # type: ignore[method-assign]
            capture.look_in_network = partial(look_there, child.pid)  # type: ignore[method-assign]
            assert not capture.blockers(fd)
            records = capture.records()
        child.call(partial(close, fd))
        answers = []

        def look() -> bytes:
            with Rebuilt(capture, records, finish=False) as new, of(new.fd(fd)) as sock:
                sock.send(struct.pack(">BBHHH", 8, 0, 0, 0, 1) + b"echo")
                sock.settimeout(2)
                answers.append((sock.getsockname(), sock.recv(100)))
            return b""

        look_there(child.pid, 9, look)
        ((name, answer),) = answers
        assert name == ("127.0.0.1", 4711)
        assert answer[0] == 0
        assert struct.unpack(">H", answer[4:6]) == (4711,)
        assert answer[8:] == b"echo"


def test_a_ping_socket_that_nobody_may_make_is_named() -> None:
    with subject(partial(ping_socket, 0)) as child:
        with Capture(child.pid) as capture:
            capture.network = lambda _: 9  # type: ignore[method-assign]
            capture.look_in_network = partial(look_there, child.pid)  # type: ignore[method-assign]
            records = capture.records()
    with open("/proc/sys/net/ipv4/ping_group_range") as file:
        first, last = map(int, file.read().split())
    if first <= last:
        pytest.skip("this network lets groups make ping sockets")
    with pytest.raises(RebuildError, match="ping_group_range"):
        Rebuilt(capture, records).__enter__()


def test_sockets_beside_a_multicast_router_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        unshare(CLONE.NEWNET)
        router = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
        router.setsockopt(IP, 200, 1)
        return kept(router, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))

    with subject(setup) as child, Capture(child.pid) as capture:
        capture.network = lambda _: 9  # type: ignore[method-assign]
        capture.look_in_network = partial(look_there, child.pid)  # type: ignore[method-assign]
        router, other = child.result
        assert "a multicast router runs in its network" in capture.reasons(router)
        assert not capture.blockers(other)


def test_raw_and_ping_sockets_are_told_apart() -> None:
    assert not raw_socket.is_ping(raw_socket.Identity(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP))
    assert raw_socket.is_ping(raw_socket.Identity(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP))
