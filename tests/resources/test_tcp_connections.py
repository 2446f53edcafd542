"""TCP connections in every state: read without a trace at the source, closed silently, made again, gone on with."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import msgspec
import pytest
from msgspec.structs import replace

from pipeline.errors import Refused
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.ledger import LEDGER
from pipeline.policy import DumpPolicy
from pipeline.resources import tcp_read, tcp_rebuild
from pipeline.resources.shielded import Shield
from pipeline.resources.tcp_state import Connection, State, info_of
from tests.resources.fdharness import Capture, Rebuilt, Subject, subject
from tests.resources.sockharness import of, polled

pytestmark = pytest.mark.root

TCP = socket.IPPROTO_TCP
SOL = socket.SOL_SOCKET
FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1")]
IDS = ["v4", "v6", "mapped"]


def pair(family: int = socket.AF_INET, host: str = "127.0.0.1") -> tuple[socket.socket, ...]:
    """Client, server side, and listener, which listens on."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(SOL, socket.SO_REUSEADDR, 1)
    listener.bind((host, 0))
    listener.listen(5)
    client = socket.socket(family, socket.SOCK_STREAM)
    client.connect(listener.getsockname())
    server, _ = listener.accept()
    return client, server, listener


def kept(*found: socket.socket) -> tuple[int, ...]:
    return tuple(sock.detach() for sock in found)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


@contextmanager
def moved(
    child: Subject, runs: bool = True, policy: DumpPolicy | None = None
) -> Iterator[tuple[Rebuilt, list[dict[str, object]]]]:
    """Everything that `child` has is captured, has ended there, and is made again here."""
    with Capture(child.pid, policy=policy) as capture:
        records = capture.records()
        child.call(partial(close, *child.result))
        capture.held.ended()
        capture.held.settled()
        assert capture.held.complaints == []
    states = {f.index: f.state for f in records if f.kind == "tcp"}
    with Rebuilt(capture, records, runs=runs) as new:
        assert new.notes == []
        yield new, [states[i] for i in sorted(states)]


def state(sock: socket.socket) -> State:
    return State(info_of(sock).state)


def reaches(sock: socket.socket, wanted: State) -> None:
    deadline = time.monotonic() + 60
    while state(sock) != wanted:
        assert time.monotonic() < deadline, f"{state(sock).name} instead of {wanted.name}"
        time.sleep(0.002)


def all_of(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(5)
    found = b""
    while len(found) < size:
        piece = sock.recv(size - len(found))
        if not piece:
            break
        found += piece
    return found


@pytest.mark.parametrize(("family", "host"), FAMILIES, ids=IDS)
def test_a_connection_goes_on_with_both_queues_and_its_options(family: int, host: str) -> None:
    text = bytes(range(256)) * 40

    def setup() -> tuple[int, ...]:
        client, server, listener = pair(family, host)
        client.setsockopt(TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(SOL, socket.SO_KEEPALIVE, 1)
        client.setsockopt(TCP, socket.TCP_KEEPIDLE, 77)
        client.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 4321)
        client.setsockopt(TCP, socket.TCP_CONGESTION, b"reno")
        client.setsockopt(SOL, socket.SO_REUSEADDR, 1)
        client.sendall(text)
        server.sendall(text[::-1])
        server.recv(100)
        os.fchown(client.fileno(), 7, 8)
        return kept(client, server, listener)

    with subject(setup) as child:
        with moved(child) as (new, _):
            c, s, ls = (of(new.fd(fd)) for fd in child.result)
            with c, s, ls:
                assert (state(c), state(s), state(ls)) == (State.ESTABLISHED, State.ESTABLISHED, State.LISTEN)
                assert c.getpeername() == s.getsockname() == ls.getsockname()
                assert s.getpeername() == c.getsockname()
                assert c.getsockopt(TCP, socket.TCP_NODELAY) == 1
                assert c.getsockopt(SOL, socket.SO_KEEPALIVE) == 1
                assert c.getsockopt(TCP, socket.TCP_KEEPIDLE) == 77
                assert c.getsockopt(TCP, socket.TCP_USER_TIMEOUT) == 4321
                assert c.getsockopt(TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
                assert c.getsockopt(SOL, socket.SO_REUSEADDR) == 1
                assert os.fstat(c.fileno()).st_uid == 7
                assert all_of(s, len(text) - 100) == text[100:]
                assert all_of(c, len(text)) == text[::-1]
                c.sendall(b"goes on")
                assert all_of(s, 7) == b"goes on"
                s.sendall(b"and back")
                assert all_of(c, 8) == b"and back"
                c.shutdown(socket.SHUT_WR)
                assert s.recv(1) == b""


def test_where_peeking_goes_on_stays() -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.sendall(b"0123456789")
        server.setsockopt(SOL, 42, 0)
        assert server.recv(4, socket.MSG_PEEK) == b"0123"
        return kept(client, server)

    with subject(setup) as child, moved(child) as (new, _), of(new.fd(child.result[1])) as s:
        assert s.getsockopt(SOL, 42) == 4
        assert s.recv(3, socket.MSG_PEEK) == b"456"
        assert s.recv(100) == b"0123456789"


def test_what_was_agreed_and_the_sequence_numbers_stay() -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.sendall(b"x" * 1000)
        return kept(client, server)

    def agreed(sock: socket.socket) -> bytes:
        return sock.getsockopt(TCP, socket.TCP_INFO, 104)[5:7]

    with subject(setup) as child:
        fd, _ = child.result
        with Capture(child.pid) as capture, of(capture.view(fd).local) as before:
            told = agreed(before)
        with moved(child, runs=False) as (new, states), of(new.fd(fd)) as c:
            assert agreed(c) == told
            assert c.getsockopt(TCP, socket.TCP_MAXSEG) == states[0]["connection"]["mss"]  # type: ignore[index]
            c.setsockopt(TCP, 19, -1)
            assert c.getsockopt(TCP, socket.TCP_MAXSEG) > 30_000
            (now,) = tcp_read.read([new.fd(fd)], Shield())
            was = msgspec.convert(states[0]["connection"], Connection)
            assert abs((now.timestamp - was.timestamp) % (1 << 32)) < 5000
            assert replace(now, timestamp=0) == replace(was, timestamp=0)


def test_a_full_send_queue_stays_in_order_behind_a_closed_window() -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.setsockopt(SOL, socket.SO_SNDBUF, 300_000)
        server.setsockopt(SOL, socket.SO_RCVBUF, 65536)
        client.setblocking(False)
        number = 0
        try:
            while True:
                number += client.send(b"".join(b"%07d " % (number // 8 + i) for i in range(500)))
        except BlockingIOError:
            pass
        fds = kept(client, server)
        return (*fds, number)

    with subject(setup) as child:
        client, server, number = child.result
        child.result = (client, server)
        with Capture(child.pid) as capture, of(capture.view(client).local) as copy:
            assert struct.unpack("=i", fcntl.ioctl(copy, 0x894B, bytes(4)))[0] > 100_000
        with moved(child) as (new, _):
            with of(new.fd(client)) as c, of(new.fd(server)) as s:
                assert c.getsockopt(SOL, socket.SO_SNDBUF) == 600_000
                found = all_of(s, number)
                assert len(found) == number
                assert found == b"".join(b"%07d " % i for i in range(number // 8 + 1))[:number]
                c.send(b"behind it")
                assert all_of(s, 9) == b"behind it"


def half_closed(how: str) -> tuple[int, ...]:
    client, server, listener = pair()
    client.sendall(b"last words")
    if how in ("FIN_WAIT2", "both"):
        client.shutdown(socket.SHUT_WR)
        server.sendall(b"an answer")
    if how == "both":
        server.shutdown(socket.SHUT_WR)
    time.sleep(0.02)
    return kept(client, server, listener)


@pytest.mark.parametrize("how", ["FIN_WAIT2", "both"])
def test_half_closed_within_the_tree(how: str) -> None:
    with subject(partial(half_closed, how)) as child:
        with Capture(child.pid) as capture:
            before = []
            for fd in child.result:
                with of(capture.view(fd).local) as copy:
                    before.append(state(copy))
        wanted = [State.FIN_WAIT2, State.CLOSE_WAIT] if how == "FIN_WAIT2" else [State.CLOSE, State.CLOSE]
        assert before[:2] == wanted
        with moved(child) as (new, _):
            c, s, ls = (of(new.fd(fd)) for fd in child.result)
            with c, s, ls:
                assert [state(c), state(s)] == before[:2]
                assert all_of(s, 100) == b"last words"
                assert s.recv(1) == b""
                if how == "FIN_WAIT2":
                    with pytest.raises(BrokenPipeError):
                        c.send(b"no more")
                    s.sendall(b", and more")
                    assert all_of(c, 19) == b"an answer, and more"
                    s.shutdown(socket.SHUT_WR)
                assert all_of(c, 100) == (b"" if how == "FIN_WAIT2" else b"an answer")
                reaches(c, State.CLOSE)
                reaches(s, State.CLOSE)
                assert polled(c.fileno()) & select.POLLRDHUP
                assert c.getsockname()[1] != 0


def test_a_connection_is_left_as_it_was_when_the_tree_runs_on() -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.setsockopt(SOL, socket.SO_REUSEADDR, 1)
        server.setsockopt(SOL, socket.SO_REUSEADDR, 0)
        client.sendall(b"unread")
        return kept(client, server)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            capture.records()
            capture.held.close()
            with of(capture.view(child.result[0]).local) as c, of(capture.view(child.result[1]).local) as s:
                assert c.getsockopt(SOL, socket.SO_REUSEADDR) == 1
                assert s.getsockopt(SOL, socket.SO_REUSEADDR) == 0
                assert s.getsockopt(TCP, 19) == 0
                assert c.getsockopt(TCP, 19) == 0
                c.sendall(b" until now")
                assert all_of(s, 16) == b"unread until now"


def test_a_rebuild_that_fails_says_nothing_to_the_peer() -> None:
    def setup() -> tuple[int, ...]:
        return kept(*pair()[:2])

    with subject(setup) as child:
        with moved(child, runs=False) as (new, _), of(new.fd(child.result[0])) as c:
            assert c.getsockopt(TCP, 19) == 1
            fds = [os.dup(new.fd(child.result[1]))]
        # its other end is still there, and did not hear of the end of the first
        with socket.socket(fileno=fds[0]) as s:
            assert state(s) == State.ESTABLISHED
            assert s.getsockopt(TCP, 19) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_clients_of_the_tree_that_wait_are_accepted_in_their_order(count: int) -> None:
    def setup() -> tuple[int, ...]:
        listener = socket.create_server(("127.0.0.1", 0))
        clients = []
        for _ in range(count):
            client = socket.create_connection(listener.getsockname())
            clients.append(client)
            time.sleep(0.02)
        return kept(listener, *clients)

    with subject(setup) as child:
        with moved(child) as (new, _), of(new.fd(child.result[0])) as listener:
            for fd in child.result[1:]:
                with of(new.fd(fd)) as client:
                    accepted, address = listener.accept()
                    with accepted:
                        assert address == client.getsockname()
                        client.sendall(b"at last")
                        assert all_of(accepted, 7) == b"at last"
                        assert not fcntl.fcntl(client, fcntl.F_GETFL) & os.O_NONBLOCK


def test_clients_that_have_sent_something_are_waited_for() -> None:
    def setup() -> tuple[int, ...]:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        client.sendall(b"a question")
        time.sleep(0.02)
        return kept(listener, client)

    with subject(setup) as child, Capture(child.pid) as capture:
        (blocker,) = capture.blockers(child.result[0])
        assert blocker.transient
        assert "1 connection(s) wait to be accepted" in blocker.reason


def test_a_connection_that_is_being_made_is_begun_anew() -> None:
    def setup() -> tuple[int, ...]:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fill = socket.create_connection(listener.getsockname())
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        time.sleep(0.02)
        return kept(client, fill, listener)

    with subject(setup) as child:
        with Capture(child.pid) as capture, of(capture.view(child.result[0]).local) as copy:
            assert state(copy) == State.SYN_SENT
            name = copy.getsockname()
        with moved(child) as (new, _):
            c, f, ls = (of(new.fd(fd)) for fd in child.result)
            with c, f, ls:
                assert state(c) == State.SYN_SENT
                assert c.getsockname() == name
                assert fcntl.fcntl(c, fcntl.F_GETFL) & os.O_NONBLOCK
                accepted, address = ls.accept()
                assert address == f.getsockname()
                accepted.close()
                reaches(c, State.ESTABLISHED)
                ls.settimeout(3)
                accepted, address = ls.accept()
                assert address == name
                accepted.close()


def test_policies() -> None:
    def setup() -> tuple[int, ...]:
        client, server, listener = pair()
        client.sendall(b"never read")
        return kept(client, server, listener)

    with subject(setup) as child:
        with Capture(child.pid, policy=DumpPolicy(tcp="refuse")) as capture:
            assert "--tcp refuse was given" in capture.reasons(child.result[0])
            assert capture.reasons(child.result[2]) == ""
        with Capture(child.pid, policy=DumpPolicy(tcp="close")) as capture:
            assert capture.reasons(child.result[0]) == ""
        with moved(child, policy=DumpPolicy(tcp="close")) as (new, _):
            with of(new.fd(child.result[0])) as c, of(new.fd(child.result[1])) as s:
                for sock in (c, s):
                    assert polled(sock.fileno()) & (select.POLLERR | select.POLLHUP)
                    with pytest.raises(ConnectionResetError):
                        sock.recv(10)
                    assert sock.recv(10) == b""
                    with pytest.raises(BrokenPipeError):
                        sock.send(b"x")


def test_what_has_no_way_back_is_named() -> None:
    def setup() -> tuple[int, ...]:
        urgent, server, _ = pair()
        urgent.send(b"!", socket.MSG_OOB)
        reset, other, _ = pair()
        other.setsockopt(SOL, socket.SO_LINGER, struct.pack("=2i", 1, 0))
        other.close()
        time.sleep(0.02)
        return kept(server, reset, urgent)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "urgent data" in capture.reasons(child.result[0])
        assert "an error of its TCP connection" in capture.reasons(child.result[1])


def test_both_ends_say_no_more_and_not_all_is_sent() -> None:
    """CLOSING with bytes that the window keeps back: there is no way to it, so the tree is not taken."""

    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        server.setsockopt(SOL, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.send(bytes(10_000))
        client.shutdown(socket.SHUT_WR)
        server.shutdown(socket.SHUT_WR)
        reaches(client, State.CLOSING)
        return kept(client, server)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "send no more, and not all was sent yet (CLOSING)" in capture.reasons(child.result[0])
        assert capture.reasons(child.result[1]) == ""
        with pytest.raises(Refused, match="CLOSING"):  # it may come to that behind the check
            capture.kind(child.result[1]).capture(capture.view(child.result[1]), capture)
        capture.held.close()
        assert not LEDGER.held()


def test_a_connection_in_repair_mode_is_left_to_who_repairs_it() -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.setsockopt(TCP, tcp_read.REPAIR, tcp_read.ON)
        return kept(client, server)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "in repair mode" in capture.reasons(child.result[0])
        assert capture.reasons(child.result[1]) == ""


def test_who_reads_gives_back_what_it_has_changed() -> None:
    """Itself: who has started it may be gone by then."""
    client, server, listener = pair()
    server.setsockopt(SOL, socket.SO_REUSEADDR, 1)
    server.setsockopt(SOL, 42, 3)
    tcp_read._read_whole(server)
    assert server.getsockopt(TCP, tcp_read.REPAIR) == 0
    assert server.getsockopt(SOL, socket.SO_REUSEADDR) == 1
    assert server.getsockopt(SOL, 42) == 3
    close(*kept(client, server, listener))


@pytest.mark.parametrize("ended", [False, True], ids=["connected", "ended"])
def test_who_reads_is_killed_and_all_is_given_back(monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    def setup() -> tuple[int, ...]:
        client, server, _ = pair()
        client.sendall(b"0123456789")
        server.setsockopt(SOL, socket.SO_REUSEADDR, 1)
        server.setsockopt(SOL, 42, 0)
        assert server.recv(4, socket.MSG_PEEK) == b"0123"
        if ended:
            client.shutdown(socket.SHUT_WR)
            server.shutdown(socket.SHUT_WR)
            reaches(client, State.CLOSE)
        return kept(client, server)

    ours = os.getpid()

    @contextmanager
    def killed_within(sock: socket.socket) -> Iterator[None]:
        sock.setsockopt(SOL, 42, -1)
        if not ended:
            sock.setsockopt(TCP, tcp_read.REPAIR, tcp_read.ON)
        assert os.getpid() != ours, "who holds the tree must not do that"
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    monkeypatch.setattr(tcp_read, "_whole_queue", killed_within)
    with subject(setup) as child, Capture(child.pid) as capture:
        with pytest.raises((Refused, OSError), match="was killed"):
            capture.records()
        capture.held.close()
        for fd in child.result:
            with of(capture.view(fd).local) as sock:
                assert sock.getsockopt(TCP, tcp_read.REPAIR) == 0
        with of(capture.view(child.result[1]).local) as server:
            assert server.getsockopt(SOL, socket.SO_REUSEADDR) == 1
            assert server.getsockopt(SOL, 42) == 4
            assert server.recv(100) == b"0123456789"
        if not ended:
            with of(capture.view(child.result[0]).local) as client:
                assert client.send(b"and on") == 6
    assert not LEDGER.held()


def test_room_for_queues_is_made_without_privileges_on_the_host() -> None:
    """CAP_NET_ADMIN in a user namespace permits repair mode, and no SO_SNDBUFFORCE."""
    client, server, listener = pair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            unshare(CLONE.NEWUSER)
            before = client.getsockopt(SOL, socket.SO_RCVBUF)
            tcp_rebuild.make_room_to_receive(client, 20_000)
            code = int(client.getsockopt(SOL, socket.SO_RCVBUF) <= before)
        finally:
            os._exit(code)
    close(*kept(client, server, listener))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
