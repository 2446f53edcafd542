"""Netlink sockets: port, groups and options come back; what something hangs on is refused."""

from __future__ import annotations

import os
import socket
import struct
from functools import partial
from typing import Self

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.kernel import genetlink
from pipeline.kernel.rtnetlink import Netlink, attribute
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.resources import netlink_socket
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of

NETLINK = socket.AF_NETLINK
SOL_NETLINK = 270


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def netlink(protocol: int) -> socket.socket:
    return socket.socket(NETLINK, socket.SOCK_RAW, protocol)


@pytest.mark.root  # who connects to another than the kernel needs CAP_NET_ADMIN
def test_idle_sockets_keep_port_groups_and_options() -> None:
    def setup() -> tuple[int, ...]:
        route = netlink(0)
        route.bind((0x7FFF0001, 1 << 0 | 1 << 4))
        route.setsockopt(SOL_NETLINK, 1, 33)
        route.setsockopt(SOL_NETLINK, 11, 1)
        route.connect((77, 0))
        return kept(route)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.getsockname() == (0x7FFF0001, 1 << 0 | 1 << 4)
            assert int.from_bytes(sock.getsockopt(SOL_NETLINK, 9, 8), "little") == 1 << 0 | 1 << 4 | 1 << 32
            assert sock.getsockopt(SOL_NETLINK, 11) == 1
            assert sock.getpeername() == (77, 0)


@pytest.mark.root
@pytest.mark.parametrize("protocol", [2, 4, 6, 7, 9, 10, 12, 15])
def test_idle_sockets_of_other_protocols_come_back(protocol: int) -> None:
    def setup() -> tuple[int, ...]:
        sock = netlink(protocol)
        sock.bind((0x7FFF0003, 0))
        return kept(sock)

    try:
        netlink(protocol).close()
    except OSError as error:
        pytest.skip(f"this kernel has no netlink protocol {protocol}: {error}")
    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.proto == protocol
            assert sock.getsockname() == (0x7FFF0003, 0)


def _families() -> dict[str, genetlink.Family]:
    return genetlink.families(lambda make: make())


def test_groups_of_generic_netlink_are_kept_by_name() -> None:
    def setup() -> tuple[int, ...]:
        sock = netlink(16)
        sock.setsockopt(SOL_NETLINK, 1, _families()["nlctrl"].groups["notify"])
        return kept(sock)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
            (found,) = (f for f in records if f.kind == "netlink")
            assert list(map(tuple, found.state["named"])) == [("nlctrl", "notify")]
            assert found.state["groups"] == []
            with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
                number = _families()["nlctrl"].groups["notify"]
                assert int.from_bytes(sock.getsockopt(SOL_NETLINK, 9, 128), "little") == 1 << (number - 1)
            record = msgspec.convert(found.state, netlink_socket.NetlinkState)
            for change, words in (
                ({"families": {"nlctrl": 99}}, "family nlctrl has number 16 in this kernel"),
                ({"named": [("nlctrl", "nothing")]}, "no group nothing of generic netlink family nlctrl"),
            ):
                changed = msgspec.structs.replace(record, **change)
                state = msgspec.to_builtins(changed, builtin_types=(bytes,))
                others = [msgspec.structs.replace(f, state=state) if f is found else f for f in records]
                with pytest.raises(RebuildError, match=words):
                    Rebuilt(capture, others).__enter__()


def test_answers_and_hidden_state_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        asked = netlink(0)
        asked.bind((0, 0))
        asked.send(struct.pack("<IHHII", 20, 18, 0x301, 1, 0) + bytes(4))
        return kept(asked, netlink(11))

    with subject(setup) as child, Capture(child.pid) as capture:
        asked, connector = child.result
        assert "wait to be read" in capture.reasons(asked)
        assert "netlink socket of connector" in capture.reasons(connector)


def _in_a_network_of_its_own(capture: Capture, pid: int) -> None:
    """Let the capture look and make sockets in the network of the subject."""
    from pipeline.userns.visit import fetch, visit

    def way() -> list[tuple[int, int]]:
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        capture._stack.callback(os.close, fd)
        return [(fd, CLONE.NEWNET)]

    capture.network = lambda _: 9  # type: ignore[method-assign]
    capture.look_in_network = lambda _, look: visit(way(), look)  # type: ignore[method-assign]
    capture.in_network = lambda _, make: socket.socket(fileno=fetch(way(), lambda: make().detach()))  # type: ignore[method-assign]


@pytest.mark.root
def test_what_something_of_netfilter_hangs_on_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        unshare(CLONE.NEWNET)
        queue, log, owner, idle = (netlink(12) for _ in range(4))
        for number, sock in enumerate((queue, log, owner, idle)):
            sock.bind((0x7FFF0010 + number, 0))
        # NFQNL_MSG_CONFIG of queue 5, NFULNL_MSG_CONFIG of group 6: bind
        Netlink(queue).do(3 << 8 | 2, struct.pack(">BBH", 0, 0, 5) + attribute(1, struct.pack(">BxH", 1, 2)))
        Netlink(log).do(4 << 8 | 1, struct.pack(">BBH", 0, 0, 6) + attribute(1, b"\1"))
        batch = struct.pack(">BBH", 0, 0, 10)
        table = struct.pack(">BBH", 1, 0, 0) + attribute(1, b"mine\0") + attribute(2, struct.pack(">I", 2))
        message = b"".join(
            struct.pack("<IHHII", 16 + len(body), kind, flags, 1, 0) + body
            for kind, flags, body in ((16, 1, batch), (10 << 8 | 0, 0x405, table), (17, 1, batch))
        )
        owner.send(message)
        owner.recv(4096)
        return kept(queue, log, owner, idle)

    with subject(setup) as child, Capture(child.pid) as capture:
        _in_a_network_of_its_own(capture, child.pid)
        queue, log, owner, idle = child.result
        assert "reads nfnetlink_queue 5" in capture.reasons(queue)
        assert "reads nfnetlink_log 6" in capture.reasons(log)
        assert "owns table mine of nftables" in capture.reasons(owner)
        assert not capture.blockers(idle)


@pytest.mark.root
def test_the_audit_daemon_is_refused() -> None:
    status = struct.pack("<10I", 0, 1, 1, os.getpid(), *[0] * 6)

    class Asked:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, *_: object) -> bytes:
            return status

    with subject(lambda: kept(netlink(9))) as child, Capture(child.pid) as capture:
        (fd,) = child.result
        assert not capture.blockers(fd)
        capture.member = lambda pid: pid if pid == os.getpid() else 0  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(netlink_socket, "Link", lambda sock: (sock.close(), Asked())[1])
            assert f"pid {os.getpid()} is the audit daemon" in capture.reasons(fd)
