"""TCP connections whose peer is outside of the tree: held off while nobody has them, in every state; and let go."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RebuildError, Refused
from pipeline.kernel import nfnetlink, rtnetlink, tcpdiag
from pipeline.kernel.rtnetlink import Netlink
from pipeline.kernel.tcpdiag import TcpEntry
from pipeline.ledger import LEDGER
from pipeline.resources import tcp_lock, tcp_read, tcp_tree
from pipeline.resources.tcp_state import State, info_of
from tests.harness.networks import network, shell, within
from tests.resources.fdharness import Capture, Rebuilt, Subject, subject
from tests.resources.sockharness import of

pytestmark = pytest.mark.root

TCP, SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
HERE = "127.0.0.1"


@pytest.fixture
def around() -> Iterator[str]:
    with network() as path:
        yield path


class Peer:
    """A listener outside of the tree, and what was accepted by it."""

    def __init__(self, family: int = socket.AF_INET, host: str = HERE) -> None:
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.bind((host, 0))
        self.listener.listen(5)
        self.family = family
        self.name = self.listener.getsockname()

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(5)
        return sock


def connecting(family: int, name: tuple[object, ...]) -> tuple[int, ...]:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.connect(name)
    return (sock.detach(),)


def act(fd: int, what: bytes | None, shutdown: bool) -> None:
    """Send something, `LONG` if it is None: as much as there is room for."""
    text = LONG if what is None else what
    with of(fd) as sock:
        if text:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                while text:
                    text = text[sock.send(text) :]
            sock.setblocking(True)
        if shutdown:
            sock.shutdown(socket.SHUT_WR)


def close(fd: int) -> None:
    os.close(fd)


def state(sock: socket.socket) -> State:
    return State(info_of(sock).state)


def tables() -> list[str]:
    with nfnetlink.open_socket() as sock:
        return nfnetlink.tables(sock)


@contextmanager
def moved(child: Subject, meanwhile: Callable[[], None] | None = None) -> Iterator[socket.socket]:
    """The subject's one socket, made again here after it has ended there."""
    (fd,) = child.result
    with Capture(child.pid) as capture:
        records = capture.records()
        assert any(table.startswith("pipeline-looking-") for table in tables())
        child.call(partial(close, fd))
        capture.held.ended()
        assert capture.held.complaints == []
    (kept,) = tables()
    assert kept.startswith("pipeline-kept-")
    if meanwhile is not None:
        meanwhile()
    with Rebuilt(capture, records) as new:
        assert new.notes == []
        assert tables() == []
        with of(new.fd(fd)) as sock:
            sock.settimeout(5)
            yield sock
    assert not LEDGER.held()


def exchange(one: socket.socket, other: socket.socket) -> None:
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"still there?")
        assert receive(receiver, 12) == b"still there?"


def receive(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (piece := sock.recv(size - len(found))):
        found += piece
    return found


def _sum(data: bytes) -> int:
    """The checksum of IP and TCP, RFC 1071."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def knock(source: str, to: tuple[str, int]) -> None:
    """Send the first segment of a connection from a host that will not answer."""
    ends = socket.inet_aton(source) + socket.inet_aton(to[0])
    parts = (4000, to[1], 1, 0, 5 << 12 | 2, 65535)  # SYN
    draft = struct.pack(">HHIIHHHH", *parts, 0, 0)
    check = _sum(ends + struct.pack(">BBH", 0, socket.IPPROTO_TCP, len(draft)) + draft)
    segment = struct.pack(">HHIIHHHH", *parts, check, 0)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, socket.IPPROTO_TCP, 0) + ends
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(head + segment, to)


def test_a_handshake_that_is_half_done_is_waited_for(around: str) -> None:
    """Its client may believe that it is connected, and the listener does not say that it is there."""
    shell(
        around,
        """
        ip link add silent type veth peer name void
        ip addr add 10.9.0.1/24 dev silent
        ip link set silent up
        ip link set void up
        ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev silent
        """,
    )

    def listening() -> tuple[int, ...]:
        sock = socket.create_server(("10.9.0.1", 4001))
        return (sock.detach(),)

    def half_open() -> list[TcpEntry]:
        with Netlink(rtnetlink.socket_of(tcpdiag.NETLINK_SOCK_DIAG)) as diag:
            return list(tcpdiag.dump(diag, [State.SYN_RECV, State.NEW_SYN_RECV]))

    def run() -> None:
        with subject(listening) as child, Capture(child.pid) as capture:
            capture.records()
        with subject(listening) as child, Capture(child.pid) as capture:
            knock("10.9.0.2", ("10.9.0.1", 4001))
            assert [entry.inode for entry in half_open()] == [0]
            with pytest.raises(Refused) as refused:
                capture.records()
            (blocker,) = refused.value.blockers
            assert blocker.reason == "1 connection(s) are just being made"
            assert blocker.transient
        assert not LEDGER.held()

    within(around, run)


def test_the_table_of_all_connections_is_walked_once(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the whole host, and the tree stands still meanwhile."""
    asked: list[set[int]] = []
    dump = tcpdiag.dump

    def counted(diag: Netlink, states: Collection[int]) -> Iterator[TcpEntry]:
        asked.append(set(states))
        return dump(diag, states)

    def setup() -> tuple[int, ...]:
        listener = socket.create_server((HERE, 0))
        client = socket.create_connection(listener.getsockname())
        return (client.detach(), listener.accept()[0].detach(), listener.detach())

    monkeypatch.setattr(tcpdiag, "dump", counted)

    def run() -> None:
        with subject(setup) as child, Capture(child.pid) as capture:
            capture.records()

    within(around, run)
    assert [states for states in asked if states != {State.LISTEN}] == [set(tcp_tree._LISTED)]


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, HERE), (socket.AF_INET6, "::1")], ids=["v4", "v6"]
)
def test_a_peer_outside_hears_nothing_while_nobody_has_the_connection(
    around: str, family: int, host: str
) -> None:
    def run() -> None:
        peer = Peer(family, host)
        with subject(partial(connecting, family, peer.name)) as child:
            theirs = peer.accept()
            theirs.sendall(b"before")
            child.call(partial(act, child.result[0], b"unread", False))

            def meanwhile() -> None:
                theirs.sendall(b", while nobody is there")
                time.sleep(0.3)
                poll = select.poll()
                poll.register(theirs, select.POLLRDHUP | select.POLLERR)
                assert poll.poll(0) == []
                assert state(theirs) == State.ESTABLISHED

            with moved(child, meanwhile) as ours:
                assert receive(ours, 29) == b"before, while nobody is there"
                assert receive(theirs, 6) == b"unread"
                exchange(ours, theirs)
                ours.close()
        theirs.close()
        peer.listener.close()

    within(around, run)


LONG = b"".join(b"%07d " % n for n in range(60_000))


def test_what_the_window_keeps_back_and_the_end_behind_it(around: str) -> None:
    """FIN_WAIT1: bytes not sent yet, and a FIN behind them."""

    def run() -> None:
        peer = Peer()
        peer.listener.setsockopt(SOL, socket.SO_RCVBUF, 65536)
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            child.call(partial(act, child.result[0], None, True))
            with moved(child) as ours:
                assert state(ours) == State.FIN_WAIT1
                theirs.sendall(b"heard")
                assert receive(ours, 5) == b"heard"
                found = receive(theirs, len(LONG) + 1)
                assert found == LONG[: len(found)]
                assert len(found) > 100_000
                assert theirs.recv(1) == b""
                time.sleep(0.05)
                assert state(ours) == State.FIN_WAIT2
                ours.close()
        theirs.close()
        peer.listener.close()

    within(around, run)


def test_the_peer_has_said_its_last_word(around: str) -> None:
    """CLOSE_WAIT, and LAST_ACK with bytes that were not sent."""

    def run(shutdown: bool) -> None:
        peer = Peer()
        peer.listener.setsockopt(SOL, socket.SO_RCVBUF, 65536)
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            theirs.sendall(b"the end")
            theirs.shutdown(socket.SHUT_WR)
            time.sleep(0.02)
            child.call(partial(act, child.result[0], None, shutdown))
            with moved(child) as ours:
                assert state(ours) == (State.LAST_ACK if shutdown else State.CLOSE_WAIT)
                assert receive(ours, 100) == b"the end"
                if not shutdown:
                    ours.setblocking(False)
                    ours.shutdown(socket.SHUT_WR)
                found = receive(theirs, len(LONG) + 1)
                assert found == LONG[: len(found)]
                assert len(found) > 100_000
                deadline = time.monotonic() + 60
                while state(ours) != State.CLOSE:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                ours.close()
        theirs.close()
        peer.listener.close()

    within(around, lambda: run(False))
    within(around, lambda: run(True))


def test_both_ends_have_crossed(around: str) -> None:
    """CLOSING: our FIN is on its way, the peer's has come."""

    def run() -> None:
        peer = Peer()
        port = peer.name[1]
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            subprocess.run(
                ["nft", "-f", "-"],
                input=f"table inet t {{ chain c {{ type filter hook output priority 0; tcp dport {port} drop; }}; }}",
                text=True,
                check=True,
            )
            child.call(partial(act, child.result[0], b"", True))
            theirs.sendall(b"mine")
            theirs.shutdown(socket.SHUT_WR)
            time.sleep(0.02)
            (fd,) = child.result
            with Capture(child.pid) as capture, of(capture.view(fd).local) as copy:
                assert state(copy) == State.CLOSING
            subprocess.run(["nft", "delete", "table", "inet", "t"], check=True)
            with moved(child) as ours:
                assert receive(ours, 100) == b"mine"
                assert theirs.recv(1) == b""
                deadline = time.monotonic() + 60
                while state(ours) != State.CLOSE:
                    assert time.monotonic() < deadline, state(ours)
                    time.sleep(0.01)
                ours.close()
        theirs.close()
        peer.listener.close()

    within(around, run)


def test_a_dumper_that_is_killed_leaves_the_connection_alive(around: str) -> None:
    def run() -> None:
        peer = Peer()
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            child.call(partial(act, child.result[0], b"unread", False))
            for n in range(20):
                dumper = os.fork()
                if dumper == 0:
                    try:
                        while True:
                            with Capture(child.pid) as capture:
                                capture.records()
                                capture.held.close()
                    finally:
                        os._exit(1)
                time.sleep(0.01 + 0.003 * n)
                os.kill(dumper, signal.SIGKILL)
                os.waitpid(dumper, 0)
                # who reads for it ends a moment later
                deadline = time.monotonic() + 60
                while tables():
                    assert time.monotonic() < deadline, tables()
                    time.sleep(0.005)
                with Capture(child.pid) as capture, of(capture.view(child.result[0]).local) as ours:
                    assert ours.getsockopt(TCP, tcp_read.REPAIR) == 0
                theirs.sendall(b"%08d" % n)
                assert receive(theirs, 6) == b"unread" if n == 0 else True
                with Capture(child.pid) as capture, of(capture.view(child.result[0]).local) as ours:
                    ours.settimeout(5)
                    assert receive(ours, 8) == b"%08d" % n
        theirs.close()
        peer.listener.close()

    within(around, run)


def test_an_address_that_is_not_here_is_named(around: str) -> None:
    def run() -> None:
        shell(around, "ip addr add 10.77.0.1/32 dev lo")
        peer = Peer(host="10.77.0.1")
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            with Capture(child.pid) as capture:
                records = capture.records()
                child.call(partial(close, child.result[0]))
                capture.held.ended()
            theirs.close()
            peer.listener.close()
            shell(around, "ip addr del 10.77.0.1/32 dev lo")
            with pytest.raises(RebuildError, match=r"10\.77\.0\.1:\d+: no interface here has the address"):
                Rebuilt(capture, records).__enter__()
            (swept,) = tcp_lock.sweep()
            assert swept.removed
            assert tables() == []

    within(around, run)


@pytest.mark.parametrize("fails", [False, True], ids=["made", "fails"])
def test_no_lock_is_kept_without_a_note_and_no_note_without_a_lock(
    around: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    """Who is killed in between leaves no lock that `clean` takes away while its image waits."""
    make = nfnetlink.make_lock
    note = tmp_path / f"pipeline-kept-{'ab' * 8}.image"

    def made(sock: socket.socket, table: str, *rest: Any, owned: bool) -> None:
        if not owned:
            assert note.exists()
            if fails:
                raise OSError(errno.ENOBUFS, "no room")
        make(sock, table, *rest, owned=owned)

    def run() -> None:
        ends = [(bytes([127, 0, 0, 1]), 1, bytes([127, 0, 0, 1]), 2)]
        lock = tcp_lock.Lock("ab" * 8, lambda open_one: open_one(), ends, (), around=True)
        try:
            with pytest.raises(OSError, match="no room") if fails else nullcontext():
                lock.keep(str(tmp_path))
            assert note.exists() is not fails
            assert (note.stem in tables()) is not fails
            lock.forget()
            assert not note.exists()
        finally:
            lock.close()
        assert tables() == []
        assert not LEDGER.held()

    monkeypatch.setattr(nfnetlink, "make_lock", made)
    monkeypatch.setattr(tcp_lock, "notes_directory", lambda: tmp_path)
    within(around, run)


def test_a_reset_that_comes_before_the_lock_is_seen(around: str) -> None:
    def run() -> None:
        peer = Peer()
        with subject(partial(connecting, socket.AF_INET, peer.name)) as child:
            theirs = peer.accept()
            with Capture(child.pid) as capture:
                assert capture.blockers(child.result[0]) == []
                theirs.setsockopt(SOL, socket.SO_LINGER, struct.pack("=2i", 1, 0))
                theirs.close()
                time.sleep(0.02)
                kind = capture.kind(child.result[0])
                with pytest.raises(Refused) as refused:
                    kind.capture(capture.view(child.result[0]), capture)
                assert all(blocker.transient for blocker in refused.value.blockers)
                capture.held.close()
            assert tables() == []
            with Capture(child.pid) as capture, of(capture.view(child.result[0]).local) as ours:
                with pytest.raises(OSError) as told:
                    ours.recv(1)
                assert told.value.errno == errno.ECONNRESET
        peer.listener.close()

    within(around, run)
