"""Unix sockets: pairs, queues, closed ends, names, listeners; and every refusal."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import RebuildError, Refused
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id, PathRef
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.sockdiag import UnixDiag
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl
from pipeline.remote.puppet import Puppet
from pipeline.resources import unix_pairs
from pipeline.resources.kinds import FdView
from pipeline.resources.unix_names import Place
from pipeline.resources.unix_socket import _socket_file
from pipeline.resources.unix_state import SocketFile, UnixState
from tests.resources.fdharness import Capture, Rebuilt, Subject, subject
from tests.resources.sockharness import of, polled

SOL = socket.SOL_SOCKET
STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
PEEK_OFF, UCRED = 42, struct.Struct("<iII")


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def unix(kind: int = STREAM) -> socket.socket:
    return socket.socket(socket.AF_UNIX, kind)


def caught(child: Subject) -> tuple[Capture, list]:  # type: ignore[type-arg]
    """The records of a subject, whose sockets are closed then, as if it had ended."""
    with Capture(child.pid) as capture:
        records = capture.records()
    child.call(partial(os.closerange, 3, 200))
    return capture, records


# -- pairs --------------------------------------------------------------------------


def test_a_stream_pair_keeps_unread_bytes_in_both_directions_and_is_not_consumed() -> None:
    content = os.urandom(150_000)

    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.sendall(b"from ")
        a.sendall(b"a")
        b.setblocking(False)
        assert b.send(content) == len(content)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        a, b = child.result
        with of(new.fd(a)) as one, of(new.fd(b)) as other:
            assert one.recv(1 << 20) == content
            assert other.recv(100) == b"from a"
            other.send(b"more")
            assert one.recv(100) == b"more"
            assert not os.get_blocking(other.fileno())
            assert os.get_blocking(one.fileno())
        assert child.call(partial(os.read, b, 100)) == b"from a"
        assert child.call(partial(os.read, a, 10)) == content[:10]


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_messages_keep_their_bounds_and_peek_offsets_stay(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        b.setsockopt(SOL, PEEK_OFF, 3)
        for message in (b"one", b"", b"three" * 1000, b"4"):
            a.send(message)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        _a, b = child.result
        for fd in (new.fd(b), capture.view(b).local):
            with of(fd) as sock:
                assert sock.getsockopt(SOL, PEEK_OFF) == 3
                assert [sock.recv(9000) for _ in range(4)] == [b"one", b"", b"three" * 1000, b"4"]


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
@pytest.mark.root
def test_a_message_longer_than_the_first_buffer(kind: int) -> None:
    content = os.urandom(700_000)

    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.setsockopt(SOL, 32, 2_000_000)
        a.send(b"before")
        a.send(content)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        a, b = child.result
        with of(new.fd(b)) as sock, of(new.fd(a)) as sender:
            assert sock.recv(10) == b"before"
            assert sock.recv(1 << 20) == content
            assert sender.getsockopt(SOL, socket.SO_SNDBUF) == 4_000_000


@pytest.mark.root
def test_options_and_owner_of_a_pair() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.setsockopt(SOL, socket.SO_PASSCRED, 1)
        a.setsockopt(SOL, socket.SO_SNDBUF, 50_000)
        a.setsockopt(SOL, socket.SO_RCVTIMEO, struct.pack("<2q", 3, 500_000))
        os.fchown(a.fileno(), 7, 8)
        a.send(b"unread")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        a, b = child.result
        with of(new.fd(a)) as sock:
            assert sock.getsockopt(SOL, socket.SO_PASSCRED) == 1
            assert sock.getsockopt(SOL, socket.SO_SNDBUF) == 100_000
            assert sock.getsockopt(SOL, 72) == 1
            assert sock.getsockopt(SOL, socket.SO_RCVTIMEO, 16) == struct.pack("<2q", 3, 500_000)
            assert (os.fstat(sock.fileno()).st_uid, os.fstat(sock.fileno()).st_gid) == (7, 8)
        assert os.read(new.fd(b), 10) == b"unread"


def test_halves_that_are_shut_down_stay_so_behind_unread_bytes() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.send(b"last words")
        a.shutdown(socket.SHUT_WR)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        a, b = (new.fd(fd) for fd in child.result)
        assert os.read(b, 100) == b"last words"
        assert os.read(b, 100) == b""
        with pytest.raises(BrokenPipeError):
            os.write(a, b"x")
        os.write(b, b"answer")
        assert os.read(a, 100) == b"answer"


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_a_peer_that_was_closed(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        b.send(b"left behind")
        b.close()
        return kept(a)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        fd = new.fd(child.result[0])
        assert polled(fd) == polled(capture.view(child.result[0]).local)
        assert os.read(fd, 100) == b"left behind"
        assert os.read(fd, 100) == b""
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"x")


def test_a_peer_that_was_closed_with_unread_bytes() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.send(b"never read")
        b.send(b"left")
        b.close()
        return kept(a)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        fd = new.fd(child.result[0])
        for end in (fd, capture.view(child.result[0]).local):
            assert polled(end) & select.POLLERR
            assert os.read(end, 100) == b"left"
            with pytest.raises(ConnectionResetError):
                os.read(end, 100)
            assert os.read(end, 100) == b""


def test_a_seqpacket_peer_that_was_closed_with_unread_messages() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        a.send(b"never read")
        b.close()
        c, d = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        c.send(b"never read")
        d.send(b"left")
        d.close()
        return kept(a, c)

    with subject(setup) as child:
        a, c = child.result
        with Capture(child.pid) as capture:
            assert "an error waits to be read" in capture.reasons(c)
        child.call(partial(os.close, c))
        with Capture(child.pid) as capture, Rebuilt(capture) as new:
            for end in (new.fd(a), capture.view(a).local):
                with pytest.raises(ConnectionResetError):
                    os.read(end, 100)
                assert os.read(end, 100) == b""


def test_a_datagram_peer_that_was_closed() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
        b.bind(b"\0pipeline-test-closed")
        b.send(b"left behind")
        b.close()
        return kept(a)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        with of(new.fd(child.result[0])) as sock:
            assert sock.recvfrom(100) == (b"left behind", b"\0pipeline-test-closed")
            with pytest.raises(ConnectionRefusedError):
                sock.send(b"x")
            with pytest.raises(OSError, match="not connected"):
                sock.send(b"x")


def test_ends_in_two_processes_that_share_one_socket() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        forked = os.fork()
        if not forked:
            b.close()
            a.send(b"!")
            select.select([], [], [])
        a.close()
        assert b.recv(1)
        return forked, a.fileno(), b.detach(), 0

    with subject(setup) as child:
        other, _, b, _ = child.result
        with Capture(child.pid, other) as capture:
            a = next(fd for fd in range(3, 10) if capture.file_at(other, fd) is not None)
            with Rebuilt(capture) as new:
                os.write(new.in_puppet(a, other), b"across")
                assert os.read(new.in_puppet(b), 100) == b"across"


# -- credentials --------------------------------------------------------------------


@pytest.mark.root
def test_credentials_of_unread_messages_name_the_rebuilt_process() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
        b.setsockopt(SOL, socket.SO_PASSCRED, 1)
        ucred = UCRED.pack(os.getpid(), 7, 8)
        a.sendmsg([b"signed"], [(SOL, 2, ucred)])
        a.send(b"plain")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        with of(new.fd(child.result[1])) as sock:
            data, ((_, _, ucred),), _, sender = sock.recvmsg(100, 100)
            assert (data, UCRED.unpack(ucred)) == (b"signed", (new.host_pid(child.pid), 7, 8))
            assert not sender
            data, ((_, _, ucred),), _, _ = sock.recvmsg(100, 100)
            assert (data, UCRED.unpack(ucred)) == (b"plain", (new.host_pid(child.pid), 0, 0))


@pytest.mark.root
def test_credentials_of_a_process_outside_are_refused_when_seen() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        b.setsockopt(SOL, socket.SO_PASSCRED, 1)
        a.sendmsg([b"signed"], [(SOL, 2, UCRED.pack(os.getppid(), 0, 0))])
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture:
        with pytest.raises(Refused, match=f"credentials of pid {os.getpid()} outside the tree"):
            capture.records()


@pytest.mark.root
def test_peer_ids_are_kept_and_a_listener_is_owned_by_the_rebuilt_process() -> None:
    def setup() -> tuple[int, ...]:
        listener = unix()
        listener.bind(b"\0pipeline-test-ids")
        listener.listen(5)
        os.setegid(8)
        os.seteuid(7)
        pair = socket.socketpair()
        os.seteuid(0)
        os.setegid(0)
        return kept(listener, *pair)

    def peer(sock: socket.socket) -> tuple[int, int, int]:
        return UCRED.unpack(sock.getsockopt(SOL, socket.SO_PEERCRED, 12))

    with subject(setup) as child:
        capture, records = caught(child)
        _listener, a, b = child.result
        with Rebuilt(capture, records) as new:
            for fd in (a, b):
                with of(new.fd(fd)) as sock:
                    assert peer(sock) == (new.host_pid(child.pid), 7, 8)
            with unix() as client:
                client.connect(b"\0pipeline-test-ids")
                assert peer(client) == (new.host_pid(child.pid), 0, 0)
        assert os.geteuid() == 0
        assert prctl(PRCTL.GET_DUMPABLE) == 1


def _groups_of_peer(sock: socket.socket) -> tuple[int, ...]:
    answer = sock.getsockopt(SOL, 59, 1024)
    return struct.unpack(f"{len(answer) // 4}I", answer)


@pytest.mark.root
@pytest.mark.parametrize("euid", [0, 7])
def test_the_groups_of_peers_are_kept(euid: int) -> None:
    def setup() -> tuple[int, ...]:
        listener, client, waiting = (unix() for _ in range(3))
        os.setgroups([9, 5])
        os.seteuid(euid)
        pair = socket.socketpair()
        listener.bind(b"\0pipeline-test-groups")
        listener.listen(5)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        waiting.connect(listener.getsockname())
        os.seteuid(0)
        if euid:
            os.setgroups([])
        return kept(listener, *pair, client, accepted, waiting)

    with subject(setup) as child:
        capture, records = caught(child)
        listener, *others, waiting = child.result
        with Rebuilt(capture, records) as new, of(new.fd(listener)) as door:
            for fd in (*others, waiting):
                with of(new.fd(fd)) as sock:
                    assert _groups_of_peer(sock) == (5, 9)
            with door.accept()[0] as accepted:
                assert _groups_of_peer(accepted) == (() if euid else (5, 9)), "those of its holder"


class _Mapped(Rebuilt):
    """Rebuilt in a user namespace that maps the first eight ids only."""

    def _spawn(self) -> Puppet:
        puppet = super()._spawn()
        puppet.syscall(NR.unshare, CLONE.NEWUSER)
        for kind in ("uid", "gid"):
            Path(f"/proc/{puppet.pid}/{kind}_map").write_text("0 0 8", encoding="ascii")
        return puppet


@pytest.mark.root
def test_a_group_that_has_no_id_where_the_peer_is_costs_nothing_else() -> None:
    def setup() -> tuple[int, ...]:
        os.setgroups([3, 9])
        return kept(*socket.socketpair())

    with subject(setup) as child:
        capture, records = caught(child)
        with _Mapped(capture, records) as new:
            for fd in child.result:
                with of(new.fd(fd)) as sock:
                    pid, *_ = UCRED.unpack(sock.getsockopt(SOL, socket.SO_PEERCRED, 12))
                    assert pid == new.host_pid(child.pid)
                    assert _groups_of_peer(sock) == (3,)


@pytest.mark.root
def test_the_ids_of_a_peer_that_has_ended_are_kept() -> None:
    def setup() -> tuple[int, ...]:
        ours, theirs = socket.socketpair()
        if (forked := os.fork()) == 0:
            os.setgroups([4])
            os.setegid(8)
            os.seteuid(7)
            pair = socket.socketpair()
            socket.send_fds(theirs, [b"x"], [sock.fileno() for sock in pair])
            os._exit(0)
        _, fds, _, _ = socket.recv_fds(ours, 1, 2)
        os.waitpid(forked, 0)
        ours.close()
        theirs.close()
        return tuple(fds)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for fd in child.result:
            with of(new.fd(fd)) as sock:
                found = UCRED.unpack(sock.getsockopt(SOL, socket.SO_PEERCRED, 12))
                assert found == (os.getpid(), 7, 8)
                assert _groups_of_peer(sock) == (4,)


# -- names --------------------------------------------------------------------------


def _listening(name: bytes | str, mode: int = 0o640) -> tuple[int, ...]:
    listener = unix()
    listener.bind(name)
    if isinstance(name, str):
        os.chmod(name, mode)
        os.chown(name, 7, 8)
    listener.listen(5)
    return kept(listener)


@pytest.mark.root
def test_a_listener_replaces_its_own_stale_file(tmp_path: Path) -> None:
    path = str(tmp_path / "some" / "socket")
    os.mkdir(tmp_path / "some")
    with subject(partial(_listening, path)) as child:
        capture, records = caught(child)
        (fd,) = child.result
        stale = os.stat(path).st_ino
        with Rebuilt(capture, records) as new, unix() as client, of(new.fd(fd)) as listener:
            found = os.stat(path)
            assert stat.S_IMODE(found.st_mode) == 0o640
            assert (found.st_uid, found.st_gid) == (7, 8)
            assert found.st_ino != stale
            assert listener.getsockname() == path
            client.connect(path)
            accepted, _ = listener.accept()
            with accepted:
                client.send(b"hello")
                assert accepted.recv(10) == b"hello"
        assert os.listdir(tmp_path / "some") == ["socket"]


@pytest.mark.root
def test_a_listener_comes_back_where_its_file_is_missing(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with subject(partial(_listening, path)) as child:
        capture, records = caught(child)
        os.unlink(path)
        with Rebuilt(capture, records), unix() as client:
            client.connect(path)
    assert os.listdir(tmp_path) == ["socket"]


@pytest.mark.parametrize("replacement", ["file", "socket"])
@pytest.mark.root
def test_another_file_in_the_place_of_a_socket_is_not_replaced(tmp_path: Path, replacement: str) -> None:
    path = tmp_path / "socket"
    with subject(partial(_listening, str(path))) as child:
        capture, records = caught(child)
        path.unlink()
        if replacement == "file":
            path.write_text("mine")
        else:
            with unix() as other:
                other.bind(str(path))
            os.chmod(path, 0o640)
            os.chown(path, 7, 8)
        with pytest.raises(RebuildError, match="another file is there"):
            Rebuilt(capture, records).__enter__()
        assert os.listdir(tmp_path) == ["socket"]
        assert path.is_socket() == (replacement == "socket")


@pytest.mark.root
def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "gone")
    with subject(partial(_listening, str(tmp_path / "gone" / "socket"))) as child:
        capture, records = caught(child)
        os.unlink(tmp_path / "gone" / "socket")
        os.rmdir(tmp_path / "gone")
        with pytest.raises(RebuildError, match=r"gone/socket: its directory: .*No such file"):
            Rebuilt(capture, records).__enter__()


@pytest.mark.root
def test_a_relative_name_is_kept_as_written_and_its_file_lands_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)

    def setup() -> tuple[int, ...]:
        os.chdir(tmp_path / "a" / "b")
        listener = unix()
        listener.bind("../.././relative")
        listener.listen(1)
        os.chdir("/")
        return kept(listener)

    with subject(setup) as child:
        capture, records = caught(child)
        os.unlink(tmp_path / "relative")
        here = os.getcwd()
        with Rebuilt(capture, records) as new, of(new.fd(child.result[0])) as sock, unix() as client:
            assert sock.getsockname() == "../.././relative"
            client.connect(str(tmp_path / "relative"))
        assert os.getcwd() == here
    assert sorted(os.listdir(tmp_path)) == ["a", "relative"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_socket_whose_file_was_removed_keeps_the_name_only(tmp_path: Path, linked: bool) -> None:
    path = str(tmp_path / "removed")

    def setup() -> tuple[int, ...]:
        listener = unix()
        listener.bind(path)
        listener.listen(1)
        if linked:
            os.link(path, tmp_path / "other name")
        os.unlink(path)
        Path(path).write_text("another file")
        return kept(listener)

    with subject(setup) as child:
        capture, records = caught(child)
        with Rebuilt(capture, records) as new, of(new.fd(child.result[0])) as sock:
            assert sock.getsockname() == path
            assert sock.getsockopt(SOL, socket.SO_ACCEPTCONN)
        assert Path(path).read_text() == "another file"
        assert sorted(os.listdir(tmp_path)) == [*["other name"][:linked], "removed"]


def test_an_abstract_name_that_is_taken_is_named() -> None:
    with subject(partial(_listening, b"\0pipeline-test-taken")) as child, Capture(child.pid) as capture:
        with pytest.raises(
            RebuildError, match="@pipeline-test-taken: cannot be bound: Address already in use"
        ):
            Rebuilt(capture).__enter__()


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
@pytest.mark.parametrize("abstract", [False, True])
def test_an_accepted_connection_has_the_name_of_its_listener(
    tmp_path: Path, kind: int, abstract: bool
) -> None:
    name: bytes | str = b"\0pipeline-test-accepted" if abstract else str(tmp_path / "socket")

    def setup() -> tuple[int, ...]:
        listener, client = unix(kind), unix(kind)
        listener.bind(name)
        listener.listen(5)
        client.connect(name)
        server, _ = listener.accept()
        server.send(b"hello")
        client.send(b"question")
        return kept(server, listener, client)

    with subject(setup) as child:
        capture, records = caught(child)
        server, listener, client = child.result
        with Rebuilt(capture, records) as new:
            with of(new.fd(server)) as accepted, of(new.fd(client)) as caller, of(new.fd(listener)) as door:
                assert accepted.getsockname() == caller.getpeername() == door.getsockname() == name
                assert not accepted.getpeername()
                assert caller.recv(10) == b"hello"
                assert accepted.recv(10) == b"question"
                with unix(kind) as another:
                    another.connect(name)
                    door.accept()[0].close()


def test_an_accepted_connection_without_its_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    def setup() -> tuple[int, ...]:
        with unix() as listener:
            listener.bind(path)
            listener.listen(5)
            client = unix()
            client.bind(str(tmp_path / "client"))
            client.connect(path)
            server, _ = listener.accept()
        return kept(client, server)

    with subject(setup) as child:
        capture, records = caught(child)
        before = {entry.name: entry.inode() for entry in os.scandir(tmp_path)}
        with Rebuilt(capture, records) as new:
            with of(new.fd(child.result[0])) as client, of(new.fd(child.result[1])) as server:
                assert {client.getsockname(), server.getsockname()} == {path, str(tmp_path / "client")}
                assert client.getsockname() == server.getpeername()
        assert {entry.name: entry.inode() for entry in os.scandir(tmp_path)} == before


@pytest.mark.root
def test_connections_to_one_listener_are_made_through_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = str(tmp_path / "socket"), str(tmp_path / "other")
    listeners = [(path, 0, STREAM), (path, 7, STREAM), (other, 0, STREAM), (path, 0, SEQPACKET)]

    def connections(name: str, uid: int, kind: int) -> list[socket.socket]:
        ends: list[socket.socket] = []
        with unix(kind) as listener:
            listener.bind(name)
            os.seteuid(uid)
            listener.listen(5)
            os.seteuid(0)
            for _ in range(3):
                ends.append(unix(kind))
                ends[-1].connect(name)
                ends.append(listener.accept()[0])
        os.unlink(name)
        return ends

    def setup() -> tuple[int, ...]:
        ends = [end for listener in listeners for end in connections(*listener)]
        for number, end in enumerate(ends):
            end.send(b"%d" % (number ^ 1))
        return kept(*ends)

    class Counted(Place):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            places.append(self)

    places: list[Place] = []
    monkeypatch.setattr(unix_pairs, "Place", Counted)
    with subject(setup) as child:
        capture, records = caught(child)
        with Rebuilt(capture, records) as new:
            for number, fd in enumerate(child.result):
                name, uid, kind = listeners[number // 6]
                is_client = number % 2 == 0
                with of(new.fd(fd)) as end:
                    assert (end.type, end.recv(10)) == (kind, b"%d" % number)
                    assert (end.getpeername(), end.getsockname()) == ((name, "") if is_client else ("", name))
                    peer = UCRED.unpack(end.getsockopt(SOL, socket.SO_PEERCRED, 12))
                    assert peer == (new.host_pid(child.pid), uid if is_client else 0, 0)
    assert len(places) == len(listeners)
    assert not os.listdir(tmp_path)


@pytest.mark.root
def test_clients_that_wait_are_accepted_later_in_their_order() -> None:
    def setup() -> tuple[int, ...]:
        listener = unix()
        listener.bind(b"\0pipeline-test-waiting")
        listener.listen(7)
        clients = [unix() for _ in range(3)]
        os.seteuid(7)
        for number, client in enumerate(reversed(clients)):
            if number == 1:
                client.bind(b"\0pipeline-test-client")
            client.connect(b"\0pipeline-test-waiting")
        return kept(listener, *clients)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(os.closerange, 3, 200))
        listener, *clients = child.result
        with Rebuilt(capture, records) as new, of(new.fd(listener)) as door:
            for number, fd in enumerate(reversed(clients)):
                accepted, name = door.accept()
                with accepted:
                    assert name == (b"\0pipeline-test-client" if number == 1 else "")
                    assert UCRED.unpack(accepted.getsockopt(SOL, socket.SO_PEERCRED, 12))[1] == 7
                    os.write(new.fd(fd), b"%d" % number)
                    assert accepted.recv(10) == b"%d" % number


# -- datagram sockets -----------------------------------------------------------------


def test_bound_datagram_sockets_with_messages_from_everybody(tmp_path: Path) -> None:
    path = str(tmp_path / "receiver")

    def setup() -> tuple[int, ...]:
        receiver, named, nameless = unix(DGRAM), unix(DGRAM), unix(DGRAM)
        receiver.bind(path)
        named.bind(b"\0pipeline-test-named")
        named.connect(path)
        named.send(b"named")
        nameless.sendto(b"nameless", path)
        with unix(DGRAM) as gone:
            gone.bind(str(tmp_path / "gone"))
            gone.sendto(b"gone", path)
        named.send(b"again")
        return kept(receiver, named, nameless)

    with subject(setup) as child:
        capture, records = caught(child)
        receiver, named, nameless = child.result
        with Rebuilt(capture, records) as new, of(new.fd(receiver)) as sock, of(new.fd(named)) as one:
            os.set_blocking(sock.fileno(), False)
            assert [sock.recvfrom(100) for _ in range(4)] == [
                (b"named", b"\0pipeline-test-named"),
                (b"nameless", None),
                (b"gone", str(tmp_path / "gone")),
                (b"again", b"\0pipeline-test-named"),
            ]
            assert sock.getsockname() == one.getpeername() == path
            one.send(b"still connected")
            assert sock.recv(100) == b"still connected"
            with of(new.fd(nameless)) as other:
                other.sendto(b"by path", path)
            assert sock.recv(100) == b"by path"
    assert sorted(os.listdir(tmp_path)) == ["gone", "receiver"]


def test_two_datagram_sockets_connected_to_each_other(tmp_path: Path) -> None:
    one_name, other_name = str(tmp_path / "one"), b"\0pipeline-test-other"

    def setup() -> tuple[int, ...]:
        one, other = unix(DGRAM), unix(DGRAM)
        one.bind(one_name)
        other.bind(other_name)
        one.connect(other_name)
        other.connect(one_name)
        one.send(b"waits")
        return kept(one, other)

    with subject(setup) as child:
        capture, records = caught(child)
        with Rebuilt(capture, records) as new:
            with of(new.fd(child.result[0])) as one, of(new.fd(child.result[1])) as other:
                assert other.recvfrom(100) == (b"waits", one_name)
                assert (one.getpeername(), other.getpeername()) == (other_name, one_name)
                with unix(DGRAM) as stranger, pytest.raises(PermissionError):
                    stranger.sendto(b"x", one_name)


# -- without privileges -----------------------------------------------------------------


def _as_nobody(act: Callable[[], str]) -> str:
    """Run `act` in a child without any capability; returns what it did, or its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            prctl(PRCTL.SET_DUMPABLE, 1)
            os.write(writer, act().encode())
        except BaseException as error:  # noqa: BLE001 - the parent compares it
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


class _Plain:
    """As much of a scope as socket files need."""

    def __init__(self) -> None:
        self.open = partial(Rebuilt.open, self)
        self.user = self.group = lambda who: who.id if isinstance(who, Id) else Id(0, who)
        self.path = lambda _pid, link: PathRef(0, link)


@pytest.mark.parametrize("name", ["absolute", "../relative"])
@pytest.mark.root
def test_a_plain_user_binds_a_name_as_it_was_written(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="pipeline-test-") as directory:
        os.chmod(directory, 0o777)
        path = os.path.join(directory, os.path.basename(name))
        written = path if name == "absolute" else name
        nobody = Id(0, 65534)
        file = SocketFile(path=PathRef(0, path.encode()), mode=0o600, uid=nobody, gid=nobody, mtime_ns=1)

        def act() -> str:
            with unix() as sock:
                place = Place(sock, written.encode(), file, _Plain())
                place.settle()
                sock.listen(1)
                with unix() as client:
                    client.connect(path)
                return sock.getsockname()

        assert _as_nobody(act) == written
        found = os.stat(path)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 65534)
        assert os.listdir(directory) == [os.path.basename(name)]


@pytest.mark.root
def test_a_socket_file_is_found_by_name_where_the_kernel_does_not_give_it_away() -> None:
    with tempfile.TemporaryDirectory(prefix="pipeline-test-") as directory:
        os.chmod(directory, 0o777)
        path = os.path.join(directory, "socket")

        def act() -> str:
            with unix() as sock:
                sock.bind(path)
                found = fstat_view(sock)
                with UnixDiag(lambda make: make()) as diag:
                    known = diag.find(found.stat.st_ino)
                file = _socket_file(found, sock, path.encode(), known, _Plain())
                os.rename(path, path + "2")
                with unix() as other:
                    other.bind(path)
                return (
                    f"{file.path.path.decode()} {_socket_file(found, sock, path.encode(), known, _Plain())}"
                )

        assert _as_nobody(act) == f"{path} None"


def fstat_view(sock: socket.socket) -> FdView:
    """A view of a socket of this very process."""
    fd = sock.fileno()
    return FdView(HostPid(os.getpid()), fd, LocalFd(fd), b"socket:[]", os.fstat(fd), {}, 0, 0)


# -- refusals -------------------------------------------------------------------------


def test_a_peer_outside_is_named() -> None:
    def setup() -> tuple[int, ...]:
        ours, theirs = socket.socketpair()
        forked = os.fork()
        if not forked:
            ours.close()
            select.select([], [], [])
        theirs.close()
        return forked, *kept(ours)

    with subject(setup) as child:
        forked, fd = child.result
        while len(os.listdir(f"/proc/{forked}/fd")) != len(os.listdir(f"/proc/{child.pid}/fd")):
            select.select([], [], [], 0.001)
        with Capture(child.pid) as capture:
            (blocker,) = capture.blockers(fd)
            assert f"its peer without a name is held by pid {forked} " in blocker.reason


def test_waiting_clients_that_cannot_be_carried_are_refused() -> None:
    name = b"\0pipeline-test-refused"

    def setup() -> tuple[int, ...]:
        listener, closed, wrote = unix(), unix(), unix()
        listener.bind(name)
        listener.listen(5)
        wrote.connect(name)
        wrote.send(b"early")
        closed.connect(name)
        closed.close()
        return kept(listener, wrote)

    with subject(setup) as child, unix() as outsider:
        outsider.connect(name)
        with Capture(child.pid) as capture:
            listener, wrote = child.result
            reasons = capture.reasons(listener)
            assert "a client that is closed already waits" in reasons
            assert "a client outside the tree waits" in reasons
            assert all(blocker.transient for blocker in capture.blockers(listener))
            assert "data was sent on a connection that was not accepted" in capture.reasons(wrote)


def test_a_connection_that_an_outside_listener_did_not_accept_is_refused() -> None:
    name = b"\0pipeline-test-outside"

    def setup() -> tuple[int, ...]:
        client = unix()
        client.connect(name)
        return kept(client)

    with unix() as listener:
        listener.bind(name)
        listener.listen(5)
        with subject(setup) as child, Capture(child.pid) as capture:
            (blocker,) = capture.blockers(child.result[0])
            assert blocker.transient
            assert "@pipeline-test-outside outside the tree was not accepted yet" in blocker.reason


def test_a_socket_that_somebody_outside_holds_too_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        forked = os.fork()
        if not forked:
            select.select([], [], [])
        return forked, *kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture:
        forked, a, _ = child.result
        assert f"also held by pid {forked}" in capture.reasons(a)


def test_a_one_sided_peer_without_a_name_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        a, b, c = *socket.socketpair(socket.AF_UNIX, DGRAM), unix(DGRAM)
        c.bind(b"\0pipeline-test-third")
        a.connect(c.getsockname())
        return kept(a, b, c)

    with subject(setup) as child, Capture(child.pid) as capture:
        reasons = capture.reasons(child.result[1])
        assert "datagram socket without a name that left it" in reasons
        assert not capture.blockers(child.result[0])


def test_a_listener_with_more_clients_than_the_kernel_lists_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_long(self: UnixDiag, inode: int) -> None:
        raise OSError(errno.EMSGSIZE, "Message too long")

    with subject(partial(_listening, b"\0pipeline-test-crowd")) as child, Capture(child.pid) as capture:
        monkeypatch.setattr(UnixDiag, "find", too_long)
        with pytest.raises(Refused, match="more clients wait to be accepted than the kernel lists"):
            capture.blockers(child.result[0])


# -- bad records ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peer": 999}, "open file 999 is no unix socket of the image"),
        ({"mutual": False, "peer": 999}, "open file 999 is no unix socket of the image"),
        (
            {"mutual": False, "peer": None, "name": b"\0pipeline-test-bad", "backlog": 1, "clients": [999]},
            "open file 999 is no unix socket",
        ),
        ({"mutual": False, "peer": None, "name": b"/tmp/a\0b"}, "no name of a file"),
        ({"socket": {"family": socket.AF_INET}}, "is no socket of this kind"),
    ],
)
def test_bad_records_are_named(change: dict[str, Any], words: str) -> None:
    with subject(lambda: kept(*socket.socketpair())) as child, Capture(child.pid) as capture:
        index = capture.file_at(child.pid, child.result[0])
        records = []
        for file in capture.records():
            if file.index == index:
                socket_state = file.state["socket"] | change.get("socket", {})
                file = msgspec.structs.replace(file, state=file.state | change | {"socket": socket_state})
            records.append(file)
        with pytest.raises(RebuildError, match=words):
            Rebuilt(capture, records).__enter__()


@pytest.mark.parametrize("change", [{"shutdown": 4}, {"name": b"x" * 109}])
def test_records_out_of_bounds_are_no_records(change: dict[str, Any]) -> None:
    with subject(lambda: kept(unix())) as child, Capture(child.pid) as capture:
        (state,) = (file.state for file in capture.records() if file.kind == "unix")
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(state | change, UnixState)
