"""TCP listeners, and sockets that are not carried: made again with address and options; what has a queue is refused."""

from __future__ import annotations

import errno
import os
import socket
import struct
from functools import partial
from typing import Literal

import pytest

from pipeline.errors import RebuildError, TargetError
from pipeline.kernel import tcpdiag
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.policy import DumpPolicy
from pipeline.resources.sockets import EXTERNAL_NETWORK
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import OTHER, of

SOL = socket.SOL_SOCKET
TCP = socket.IPPROTO_TCP


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.root
def test_a_listener_is_made_again_with_address_backlog_and_options() -> None:
    def setup() -> tuple[int, ...]:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(SOL, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(SOL, socket.SO_RCVBUF, 77777)
        listener.setsockopt(SOL, socket.SO_LINGER, struct.pack("<2i", 1, 5))
        listener.setsockopt(TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(TCP, socket.TCP_KEEPIDLE, 123)
        listener.setsockopt(TCP, socket.TCP_DEFER_ACCEPT, 7)
        listener.setsockopt(TCP, socket.TCP_FASTOPEN, 9)
        listener.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 4321)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.settimeout(None)
        listener.bind(("::1", 0))
        listener.listen(33)
        os.fchown(listener.fileno(), 7, 8)
        return kept(listener)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            state = next(f.state for f in records if f.kind == "tcp")
            port = state["local"][1]
            assert sock.getsockname()[:2] == ("::1", port)
            assert sock.getsockopt(SOL, socket.SO_RCVBUF) == 2 * 77777
            assert sock.getsockopt(SOL, socket.SO_LINGER, 8) == struct.pack("<2i", 1, 5)
            assert sock.getsockopt(SOL, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(SOL, socket.SO_REUSEADDR) == 0
            assert sock.getsockopt(TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(TCP, socket.TCP_KEEPIDLE) == 123
            assert sock.getsockopt(TCP, socket.TCP_DEFER_ACCEPT) == 7
            assert sock.getsockopt(TCP, socket.TCP_FASTOPEN) == 9
            assert sock.getsockopt(TCP, socket.TCP_USER_TIMEOUT) == 4321
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
            assert struct.unpack_from("<I", sock.getsockopt(TCP, socket.TCP_INFO, 32), 28) == (33,)
            stat = os.fstat(sock.fileno())
            assert (stat.st_uid, stat.st_gid) == (7, 8)
            with socket.create_connection(("::1", port)) as client:
                client.send(b"now")
                accepted, _ = sock.accept()
                with accepted:
                    assert accepted.recv(10) == b"now"


def test_a_listener_comes_back_while_its_old_connections_are_in_time_wait() -> None:
    def setup() -> tuple[int, ...]:
        return kept(socket.create_server(("127.0.0.1", 0)))

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
            capture.held.close()
            with of(capture.view(fd).local) as copy:
                address = copy.getsockname()
                with socket.create_connection(address) as client:
                    accepted, _ = copy.accept()
                    accepted.close()
                    assert client.recv(1) == b""
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.getsockname() == address


def test_bound_and_fresh_tcp_sockets() -> None:
    def setup() -> tuple[int, ...]:
        bound, fresh = socket.socket(), socket.socket()
        bound.bind(("127.0.0.1", 0))
        fresh.setsockopt(SOL, socket.SO_REUSEPORT, 1)
        fresh.setblocking(False)
        return kept(bound, fresh)

    with subject(setup) as child:
        bound, fresh = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, bound))
        with Rebuilt(capture, records) as new, of(new.fd(bound)) as sock, of(new.fd(fresh)) as other:
            assert sock.getsockname()[1] == next(
                f.state["local"][1] for f in records if f.kind == "tcp" and f.state["local"]
            )
            with pytest.raises(OSError, match="Invalid argument"):
                sock.bind(("127.0.0.1", 0))
            assert other.getsockname() == ("0.0.0.0", 0)
            assert other.getsockopt(SOL, socket.SO_REUSEPORT) == 1
            other.bind(("127.0.0.1", 0))


def test_sockets_of_one_port_group_come_back_together() -> None:
    def setup() -> tuple[int, ...]:
        first = socket.create_server(("127.0.0.1", 0), reuse_port=True)
        second = socket.create_server(first.getsockname(), reuse_port=True)
        return kept(first, second)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        with Rebuilt(capture, records) as new:
            with of(new.fd(child.result[0])) as first, of(new.fd(child.result[1])) as second:
                assert first.getsockname() == second.getsockname()


def test_a_port_that_is_in_use_is_named() -> None:
    def setup() -> tuple[int, ...]:
        return kept(socket.create_server(("127.0.0.1", 0)))

    with subject(setup) as child, Capture(child.pid) as capture:
        with pytest.raises(RebuildError, match=r"127\.0\.0\.1:\d+: the address is in use"):
            Rebuilt(capture).__enter__()


def test_a_connection_that_was_reset_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        server.setsockopt(SOL, socket.SO_LINGER, struct.pack("<2i", 1, 0))
        server.close()
        listener.close()
        return kept(client)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "an error of its TCP connection waits to be read" in capture.reasons(child.result[0])


@pytest.mark.root
@pytest.mark.parametrize("own_network", [False, True])
@pytest.mark.parametrize("tcp", ["established", "close"])
def test_where_the_kernel_does_not_list_connections_they_are_refused(
    monkeypatch: pytest.MonkeyPatch, own_network: bool, tcp: Literal["established", "close"]
) -> None:
    """What is closed and still sends would be lost with the network of the tree, and nobody would know."""

    def setup() -> tuple[int, ...]:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        return kept(listener, client, server, socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    def unlisted(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(tcpdiag, "dump", unlisted)
    monkeypatch.setattr(Capture, "own_network", lambda _: 1 if own_network else EXTERNAL_NETWORK)
    with subject(setup) as child, Capture(child.pid, policy=DumpPolicy(tcp=tcp)) as capture:
        *held, fresh = ["does not list TCP connections" in capture.reasons(fd) for fd in child.result]
    assert held == [tcp == "established"] * 3
    assert fresh == (own_network and tcp == "established")


def test_other_sockets_are_refused_by_name_with_a_remedy() -> None:
    def setup() -> tuple[int, ...]:
        return kept(
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262), socket.socket(40, socket.SOCK_STREAM)
        )

    with subject(setup) as child, Capture(child.pid) as capture:
        mptcp, vsock = child.result
        for fd, name, remedy in (
            (mptcp, "MPTCP sockets", "without MPTCP"),
            (vsock, "sockets of vsock", "close"),
        ):
            assert OTHER.matches(capture.view(fd))
            (blocker,) = OTHER.check(capture.view(fd), capture)
            assert name in blocker.reason
            assert remedy in blocker.remedy
            with pytest.raises(TargetError, match="cannot be carried"):
                OTHER.capture(capture.view(fd), capture)


@pytest.mark.root
def test_a_socket_of_another_network_namespace_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        unshare(CLONE.NEWNET)
        return kept(socket.socket(), socket.socket(socket.AF_UNIX))

    with subject(setup) as child, Capture(child.pid) as capture:
        for fd in child.result:
            assert "a network namespace that no process of the tree is in" in capture.reasons(fd)
