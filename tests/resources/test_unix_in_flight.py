"""What is in the queues of unix sockets beside bytes: files in flight, out-of-band data, senders; and outsiders."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RebuildError, Refused
from pipeline.policy import DumpPolicy
from pipeline.resources import in_flight, unix_queue
from pipeline.resources.unix_look import look
from pipeline.resources.unix_unread import Walk
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of, polled

SOL = socket.SOL_SOCKET
STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
PEEK_OFF, PASSPIDFD, SCM_PIDFD, SIOCATMARK = 42, 76, 4, 0x8905
CLOSE = DumpPolicy(unix_outside="close")


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    return tuple(sock.detach() for sock in sockets)


def send(sock: socket.socket, data: bytes, *fds: int) -> None:
    assert sock.sendmsg([data], [(SOL, socket.SCM_RIGHTS, array.array("i", fds))]) == len(data)


def receive(sock: socket.socket, size: int = 100) -> tuple[bytes, list[int]]:
    data, control, flags, _ = sock.recvmsg(size, 4096, socket.MSG_DONTWAIT)
    assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
    fds = array.array("i")
    for _, kind, value in control:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(value)
    return data, list(fds)


def at_mark(sock: socket.socket) -> bool:
    return bool(struct.unpack("i", fcntl.ioctl(sock, SIOCATMARK, bytes(4)))[0])


# -- files in flight -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_files_of_several_kinds_arrive_with_their_message(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        reader, writer = os.pipe()
        os.write(writer, b"in the pipe")
        memory = os.memfd_create("sent")
        os.write(memory, b"memory")
        event = os.eventfd(5)
        epoll = select.epoll()
        epoll.register(reader, select.EPOLLIN)
        null = os.open("/dev/null", os.O_RDWR)
        send(a, b"no", null)
        a.send(b"plain ")
        send(a, b"files", reader, writer, memory, event, epoll.fileno())
        send(a, b"again", event)
        a.send(b"rest")
        for fd in (reader, writer, memory, event, null):
            os.close(fd)
        epoll.close()
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert not capture.found_in_flight
        for number in (new.fd(child.result[1]), capture.view(child.result[1]).local):
            with of(number) as sock:
                data, fds = receive(sock)
                assert (data, len(fds)) == (b"no", 1)
                os.close(fds[0])
                # A stream gives the bytes before together with those that carry descriptors, unless one reads less.
                if kind == STREAM:
                    assert receive(sock, 6) == (b"plain ", [])
                    data, fds = receive(sock, 2)
                    assert (data, len(fds)) == (b"fi", 5)
                    assert receive(sock, 3) == (b"les", [])
                else:
                    assert receive(sock) == (b"plain ", [])
                    data, fds = receive(sock)
                    assert data == b"files"
                reader, writer, memory, event, epoll = fds
                with select.epoll.fromfd(epoll) as instance:
                    assert [how for _, how in instance.poll(0)] == [select.EPOLLIN]
                    assert os.read(reader, 100) == b"in the pipe"
                    assert instance.poll(0) == []
                assert os.pread(memory, 10, 0) == b"memory"
                data, (same,) = receive(sock)
                assert data == b"again"
                os.write(same, struct.pack("=Q", 2))
                assert os.eventfd_read(event) == 7
                assert receive(sock) == (b"rest", [])
                for fd in (reader, writer, memory, event, same):
                    os.close(fd)


def test_what_an_epoll_instance_in_flight_has_told_is_not_told_again() -> None:
    """Of two pipes that can be written to it has told of both; of a one-shot event once."""

    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        (reader, writer), (other, once) = os.pipe(), os.pipe()
        with select.epoll() as epoll:
            epoll.register(writer, select.EPOLLOUT | select.EPOLLET)
            epoll.register(reader, select.EPOLLIN | select.EPOLLET)
            epoll.register(once, select.EPOLLOUT | select.EPOLLONESHOT)
            assert {fd for fd, _ in epoll.poll(0)} == {writer, once}
            send(a, b"files", epoll.fileno(), reader, writer, other, once)
        for fd in (reader, writer, other, once):
            os.close(fd)
        return kept(a, b)

    with (
        subject(setup) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture) as new,
        of(new.fd(child.result[1])) as sock,
    ):
        _, fds = receive(sock)
        with select.epoll.fromfd(fds[0]) as instance:
            assert instance.poll(0) == []
            os.write(fds[2], b"x")
            assert [how for _, how in instance.poll(0)] == [select.EPOLLIN]
        for fd in fds[1:]:
            os.close(fd)


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_descriptors_with_an_empty_message(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        send(a, b"", 0)
        a.send(b"behind")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        with of(new.fd(child.result[1])) as sock:
            data, fds = receive(sock)
            assert (data, len(fds)) == (b"", 1)
            assert receive(sock) == (b"behind", [])
            os.close(fds[0])


def test_sockets_in_flight_in_each_other_and_in_themselves() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        c, d = socket.socketpair()
        send(a, b"b in b", b.fileno())
        send(a, b"c in b", c.fileno())
        send(c, b"b in d", b.fileno())
        send(d, b"d in c", d.fileno(), a.fileno())
        c.close()
        d.close()
        b.send(b"to a")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert len(capture.files()) == 4 + 1  # and /dev/null
        a, b = child.result
        with of(new.fd(b)) as sock, of(new.fd(a)) as peer:
            data, (same,) = receive(sock)
            assert data == b"b in b"
            assert os.fstat(same).st_ino == os.fstat(new.fd(b)).st_ino
            data, (other,) = receive(sock)
            assert data == b"c in b"
            with socket.socket(fileno=other) as c:
                data, (d, alike) = receive(c)
                assert data == b"d in c"
                assert os.fstat(alike).st_ino == os.fstat(new.fd(a)).st_ino
                with socket.socket(fileno=d) as last:
                    data, (again,) = receive(last)
                    assert (data, os.fstat(again).st_ino) == (b"b in d", os.fstat(same).st_ino)
                    last.send(b"joined")
                    assert c.recv(100) == b"joined"
            assert peer.recv(100) == b"to a"
            for fd in (same, alike, again):
                os.close(fd)


def test_files_in_flight_to_a_bound_datagram_socket(tmp_path: Path) -> None:
    name = str(tmp_path / "socket")

    def setup() -> tuple[int, ...]:
        receiver, sender = (socket.socket(socket.AF_UNIX, DGRAM) for _ in range(2))
        receiver.bind(name)
        sender.bind(name + ".from")
        with tempfile.TemporaryFile() as file:
            file.write(b"unnamed")
            file.flush()
            file.seek(3)
            rights = array.array("i", [file.fileno()])
            sender.sendmsg([b"file"], [(SOL, socket.SCM_RIGHTS, rights)], 0, name)
        sender.close()
        return kept(receiver)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new, of(new.fd(child.result[0])) as sock:
            data, control, _, sender = sock.recvmsg(100, 100)
            (fd,) = array.array("i", control[0][2])
            assert (data, sender) == (b"file", name + ".from")
            assert os.pread(fd, 100, 0) == b"unnamed"
            os.close(fd)


def test_nothing_is_left_open_and_the_queue_stays_as_it_is() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        b.setsockopt(SOL, PEEK_OFF, 4)
        a.send(b"x" * 1000)
        send(a, b"y" * 3000, 0, 1)
        return kept(a, b)

    before = os.listdir("/proc/self/fd")
    with subject(setup) as child:
        with Capture(child.pid) as capture:
            with of(capture.view(child.result[1]).local) as sock:
                assert sock.getsockopt(SOL, PEEK_OFF) == 4
        assert child.call(partial(os.read, child.result[1], 1000)) == b"x" * 1000
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_pipeline_that_is_killed_while_it_looks_gives_back_what_it_borrowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = Walk.run

    def slowly(self: Walk) -> None:
        walk(self)
        time.sleep(0.3)

    def state(sock: socket.socket) -> tuple[int, int]:
        return sock.getsockopt(SOL, PEEK_OFF), sock.getsockopt(SOL, socket.SO_PASSCRED)

    monkeypatch.setattr(Walk, "run", slowly)
    a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
    with a, b:
        a.send(b"unread")
        b.setsockopt(SOL, PEEK_OFF, 3)
        pipeline = os.fork()
        if not pipeline:
            look(b, "")
            os._exit(0)
        deadline = time.monotonic() + 60
        while state(b)[0] == 3 or not state(b)[1]:
            assert time.monotonic() < deadline
        os.kill(pipeline, signal.SIGKILL)
        os.waitpid(pipeline, 0)
        assert state(b) == (3, 0), "it ends when that has been given back"
        assert b.recv(10) == b"unread"


def test_more_than_can_be_held_here_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        send(a, b"many", *([0] * 250))
        return kept(a, b)

    with subject(setup) as child:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limits[0]), limits[1]))
        try:
            with Capture(child.pid) as capture:
                (blocker,) = capture.found_in_flight
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert "too many descriptors (RLIMIT_NOFILE)" in blocker.reason


@pytest.mark.root
def test_more_messages_with_files_than_a_socket_takes_at_once() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        a.setsockopt(SOL, 32, 8 << 20)
        for number in range(400):
            send(a, b"%d" % number, number % 2)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert not capture.found_in_flight
        _, b = child.result
        unread = capture.unread(capture.view(b))
        assert [one.data for one in unread] == [b"%d" % number for number in range(400)]
        assert [one.files for one in unread] == [(capture.file_at(child.pid, 0),)] * 400


def test_what_cannot_be_carried_is_named_in_flight_too() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        reader, writer = os.pipe()
        forked = os.fork()
        if not forked:
            select.select([], [], [])
        send(a, b"x", reader)
        os.close(reader)
        os.close(writer)
        return forked, *kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture:
        (view,) = [view for _, view in capture.files() if view.fd < 0]
        assert view.subject.startswith(f"pid {child.pid}: a file in flight in a unix socket (pipe:[")
        (blocker,) = capture.blockers(view.fd)
        assert f"pid {child.result[0]}" in blocker.reason


def test_descriptors_of_a_connection_that_was_not_accepted_are_not_looked_for() -> None:
    name = b"\0pipeline-test-flight"

    def setup() -> tuple[int, ...]:
        listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen(5)
        client.connect(name)
        send(client, b"early", 0)
        return kept(listener, client)

    with subject(setup) as child, Capture(child.pid) as capture:
        listener, client = child.result
        assert in_flight.count(capture.view(listener)) == 1
        assert not capture.found_in_flight
        (blocker,) = capture.blockers(client)
        assert blocker.transient
        assert "where nobody can look" in blocker.reason


# -- out-of-band data ------------------------------------------------------------------


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("before", [b"", b"before"])
@pytest.mark.parametrize("after", [b"", b"after"])
def test_an_out_of_band_byte_stays_where_it_is(before: bytes, after: bytes, inline: bool) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        b.setsockopt(SOL, socket.SO_OOBINLINE, inline)
        for data, flags in ((before, 0), (b"!", socket.MSG_OOB), (after, 0)):
            if data:
                a.send(data, flags)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for number in (new.fd(child.result[1]), capture.view(child.result[1]).local):
            with of(number) as sock:
                assert polled(number) & select.POLLPRI
                if before:
                    assert not at_mark(sock)
                    assert sock.recv(100) == before
                assert at_mark(sock)
                if inline:
                    assert sock.recv(100) == b"!" + after
                else:
                    assert sock.recv(1, socket.MSG_OOB) == b"!"
                    assert not after or sock.recv(100) == after
                with pytest.raises(BlockingIOError):
                    sock.recv(100, socket.MSG_DONTWAIT)


def test_marks_of_bytes_that_were_taken_stay() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        for data in (b"one", b"two"):
            a.send(data)
            a.send(b"!", socket.MSG_OOB)
            b.recv(1, socket.MSG_OOB)
        a.send(b"three")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for number in (new.fd(child.result[1]), capture.view(child.result[1]).local):
            with of(number) as sock:
                assert not at_mark(sock)
                assert sock.recv(100) == b"one"
                assert at_mark(sock)
                assert sock.recv(100) == b"two"
                assert sock.recv(100) == b"three"
                assert not polled(number) & select.POLLPRI


def test_out_of_band_among_descriptors() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.send(b"plain")
        send(a, b"file", 0)
        a.send(b"more")
        a.send(b"!", socket.MSG_OOB)
        send(a, b"again", 1)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert not capture.found_in_flight
        with of(new.fd(child.result[1])) as sock:
            assert receive(sock, 5) == (b"plain", [])
            data, (one,) = receive(sock)
            assert data == b"file"
            assert receive(sock) == (b"more", [])
            assert at_mark(sock)
            assert sock.recv(1, socket.MSG_OOB) == b"!"
            data, (two,) = receive(sock)
            assert data == b"again"
            os.close(one)
            os.close(two)


# -- senders ------------------------------------------------------------------------------


@pytest.mark.root
def test_a_pidfd_of_the_sender_names_the_rebuilt_process() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
        b.setsockopt(SOL, PASSPIDFD, 1)
        a.send(b"from me")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        with of(new.fd(child.result[1])) as sock:
            assert sock.getsockopt(SOL, PASSPIDFD) == 1
            data, ((_, kind, value),), _, _ = sock.recvmsg(100, 100)
            (fd,) = struct.unpack("i", value)
            info = Path(f"/proc/self/fdinfo/{fd}").read_text()
            os.close(fd)
            assert (data, kind) == (b"from me", SCM_PIDFD)
            assert f"\nPid:\t{new.host_pid(child.pid)}\n" in info


@pytest.mark.parametrize("named", [False, True])
def test_a_process_sends_again_itself_what_nobody_else_may_send_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """As a plain user restores; root may say who a message is from."""
    send_some = unix_queue._send_some

    def plainly(sender: socket.socket, view: memoryview, control: Any, to: Any, how: int) -> int:
        if any(kind == 2 for _, kind, _ in control):
            raise PermissionError(1, "not permitted")
        return send_some(sender, view, control, to, how)

    def setup() -> tuple[int, ...]:
        if named:
            a, b = (socket.socket(socket.AF_UNIX, DGRAM) for _ in range(2))
            b.bind(str(tmp_path / "receiver"))
            a.bind(str(tmp_path / "sender"))
            a.connect(b.getsockname())
        else:
            a, b = socket.socketpair()
        b.setsockopt(SOL, socket.SO_PASSCRED, 1)
        send(a, b"file", 0)
        if not named:
            a.send(b"more" * 50_000)
        return kept(a, b)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(os.closerange, 3, 200))
        monkeypatch.setattr(unix_queue, "_send_some", plainly)
        with Rebuilt(capture, records) as new, of(new.fd(child.result[1])) as sock:
            data, control, _, sender = sock.recvmsg(100, 100)
            found = {kind: value for _, kind, value in control}
            assert data == b"file"
            assert struct.unpack("3i", found[2]) == (new.host_pid(child.pid), os.getuid(), os.getgid())
            os.close(*array.array("i", found[socket.SCM_RIGHTS]))
            assert sender == (str(tmp_path / "sender") if named else None)
            if not named:
                assert sock.recv(1 << 20, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"more" * 50_000


def sign(sock: socket.socket, data: bytes) -> None:
    """Send a message that says who it is from, whether the receiver asks or not."""
    ucred = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
    sock.sendmsg([data], [(SOL, 2, ucred)])


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_senders_are_kept_for_a_program_that_asks_for_them_later(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        a.send(b"from nobody")
        sign(a, b"signed")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for number, pid in (
            (new.fd(child.result[1]), new.host_pid(child.pid)),
            (capture.view(child.result[1]).local, child.pid),
        ):
            with of(number) as sock:
                assert not sock.getsockopt(SOL, socket.SO_PASSCRED)
                sock.setsockopt(SOL, socket.SO_PASSCRED, 1)
                for data, who in (
                    (b"from nobody", (0, 65534, 65534)),
                    (b"signed", (pid, os.getuid(), os.getgid())),
                ):
                    found, ((_, _, ucred),), _, _ = sock.recvmsg(100, 100, socket.MSG_DONTWAIT)
                    assert (found, struct.unpack("3i", ucred)) == (data, who)


def test_bytes_of_several_senders_stay_together_where_nobody_asks() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair()
        a.send(b"from nobody, ")
        sign(a, b"signed")
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert os.read(new.fd(child.result[1]), 100) == b"from nobody, signed"


# -- empty messages that were looked at before ------------------------------------------------


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_an_empty_message_that_was_looked_at_is_refused(kind: int) -> None:
    def setup() -> tuple[int, ...]:
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(2)]
        for a, b in pairs:
            a.send(b"")
            assert b.recv(10, socket.MSG_PEEK) == b""
        pairs[0][0].send(b"behind")
        return kept(*pairs[0], *pairs[1])

    with subject(setup) as child, Capture(child.pid) as capture:
        for fd in (child.result[1], child.result[3]):
            with of(capture.view(fd).local) as sock:
                with pytest.raises(Refused, match="an empty message that was looked at before") as refusal:
                    look(sock, "it")
                assert all(blocker.transient for blocker in refusal.value.blockers)
                assert sock.recv(10, socket.MSG_DONTWAIT) == b""


def test_an_empty_packet_stays_behind_a_shutdown_for_reading() -> None:
    def setup() -> tuple[int, ...]:
        a, b = socket.socketpair(socket.AF_UNIX, SEQPACKET)
        for message in (b"one", b"", b"two"):
            a.send(message)
        b.shutdown(socket.SHUT_RD)
        return kept(a, b)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for number in (new.fd(child.result[1]), capture.view(child.result[1]).local):
            with of(number) as sock:
                assert [sock.recv(10, socket.MSG_DONTWAIT) for _ in range(4)] == [b"one", b"", b"two", b""]


def _sent_by_one_that_ended() -> tuple[int, ...]:
    a, b = socket.socketpair(socket.AF_UNIX, DGRAM)
    b.setsockopt(SOL, socket.SO_PASSCRED, 1)
    if (forked := os.fork()) == 0:
        a.send(b"last words")
        os._exit(0)
    os.waitpid(forked, 0)
    return kept(a, b)


def test_the_sender_of_a_message_that_has_ended_is_named_or_is_nobody_by_decision() -> None:
    with subject(_sent_by_one_that_ended) as child:
        with (
            Capture(child.pid) as capture,
            pytest.raises(Refused, match="unread message carries the credentials"),
        ):
            capture.records()
        with Capture(child.pid, policy=CLOSE) as capture, Rebuilt(capture) as new:
            with of(new.fd(child.result[1])) as sock:
                data, ((_, _, ucred),), _, _ = sock.recvmsg(100, 100)
                assert data == b"last words"
                assert struct.unpack("3i", ucred) == (0, 65534, 65534)


# -- outside the tree -----------------------------------------------------------------------


def connected_to(name: str, kind: int, words: Sequence[bytes] = ()) -> tuple[int, ...]:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.connect(name)
    for word in words:
        sock.send(word)
    return kept(sock)


@pytest.mark.parametrize("abstract", [False, True])
def test_a_datagram_socket_is_connected_to_its_daemon_again(tmp_path: Path, abstract: bool) -> None:
    name = "\0pipeline-test-log" if abstract else str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, DGRAM) as daemon:
        daemon.bind(name)
        with subject(partial(connected_to, name, DGRAM, [b"before"])) as child:
            with Capture(child.pid) as capture:
                records = capture.records()
            daemon.close()
            if not abstract:
                os.unlink(name)
            shown = "@pipeline-test-log" if abstract else name
            with pytest.raises(RebuildError, match=f"cannot connect to {shown} outside the tree"):
                with Rebuilt(capture, records):
                    pass
            with socket.socket(socket.AF_UNIX, DGRAM) as another:
                another.bind(name)
                with Rebuilt(capture, records) as new, of(new.fd(child.result[0])) as sock:
                    sock.send(b"after")
                    assert another.recv(100) == b"after"


def test_a_daemon_that_is_not_there_is_no_matter_by_decision(tmp_path: Path) -> None:
    name = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, DGRAM) as daemon:
        daemon.bind(name)
        with subject(partial(connected_to, name, DGRAM)) as child:
            with Capture(child.pid, policy=CLOSE) as capture:
                records = capture.records()
            os.unlink(name)
            with Rebuilt(capture, records) as new, of(new.fd(child.result[0])) as sock:
                with pytest.raises(OSError, match="not connected"):
                    sock.send(b"x")


def test_a_name_that_is_somebody_elses_by_now_is_not_connected_to(tmp_path: Path) -> None:
    name = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, DGRAM) as daemon, socket.socket(socket.AF_UNIX, DGRAM) as thief:
        daemon.bind(name)
        with subject(partial(connected_to, name, DGRAM)) as child:
            os.rename(name, name + ".old")
            thief.bind(name)
            with Capture(child.pid) as capture:
                (blocker,) = capture.blockers(child.result[0])
                assert f"its peer {name} is held by " in blocker.reason
                assert "--unix-outside close" in blocker.remedy


@pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
def test_a_connection_to_a_daemon_is_refused_or_hung_up_behind_what_it_sent(
    tmp_path: Path, kind: int
) -> None:
    name = str(tmp_path / "daemon")
    with socket.socket(socket.AF_UNIX, kind) as daemon:
        daemon.bind(name)
        daemon.listen(5)
        with subject(partial(connected_to, name, kind)) as child:
            connection, _ = daemon.accept()
            connection.send(b"welcome")
            number = child.result[0]
            with Capture(child.pid) as capture:
                (blocker,) = capture.blockers(number)
                assert "outside the tree" in blocker.reason
                assert "--unix-outside close" in blocker.remedy
            with Capture(child.pid, policy=CLOSE) as capture, Rebuilt(capture) as new:
                with of(new.fd(number)) as sock:
                    assert sock.getpeername() == name
                    assert sock.recv(100) == b"welcome"
                    assert sock.recv(100) == b""
                    with pytest.raises(BrokenPipeError):
                        sock.send(b"x", socket.MSG_NOSIGNAL)
            connection.close()


def test_what_waits_on_either_side_of_the_boundary_is_hung_up_by_decision(tmp_path: Path) -> None:
    outer, inner = str(tmp_path / "outer"), str(tmp_path / "inner")

    def setup() -> tuple[int, ...]:
        client, listener = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        client.connect(outer)
        listener.bind(inner)
        listener.listen(5)
        return kept(client, listener)

    with socket.socket(socket.AF_UNIX) as daemon, socket.socket(socket.AF_UNIX) as outsider:
        daemon.bind(outer)
        daemon.listen(5)
        with subject(setup) as child:
            outsider.connect(inner)
            client, listener = child.result
            with Capture(child.pid) as capture:
                assert "was not accepted yet" in capture.reasons(client)
                assert "a client outside the tree waits" in capture.reasons(listener)
            with Capture(child.pid, policy=CLOSE) as capture:
                records = capture.records()
            child.call(partial(os.close, listener))
            with Rebuilt(capture, records) as new, of(new.fd(client)) as sock, of(new.fd(listener)) as again:
                assert sock.recv(10) == b""
                again.setblocking(False)
                with pytest.raises(BlockingIOError):
                    again.accept()
