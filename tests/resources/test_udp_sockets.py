"""UDP and UDP-Lite sockets: ends, options, unread datagrams with their senders, multicast groups, halves."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest

from pipeline.errors import RebuildError, Refused
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.policy import DumpPolicy, RestorePolicy
from pipeline.resources import datagrams, multicast, udp_socket
from pipeline.resources.inet_address import Address
from pipeline.resources.shielded import Shield
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of

SOL, IP, IPV6 = socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6
UDPLITE = 136
_GROUP_REQ = struct.Struct("<I4x128s")


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def udp(family: int = socket.AF_INET, protocol: int = 0, address: str = "") -> socket.socket:
    """A socket that is bound to a loopback address."""
    sock = socket.socket(family, socket.SOCK_DGRAM, protocol)
    sock.bind((address or ("127.0.0.1" if family == socket.AF_INET else "::1"), 0))
    return sock


def test_udp_sockets_keep_their_ends_options_and_device() -> None:
    def setup() -> tuple[int, ...]:
        one, two, fresh = udp(), udp(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(SOL, socket.SO_BINDTODEVICE, b"lo")
        one.setsockopt(SOL, socket.SO_BROADCAST, 1)
        one.setsockopt(IP, socket.IP_TTL, 77)
        one.connect(two.getsockname())
        return kept(one, two, fresh)

    with subject(setup) as child:
        one, two, fresh = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, one, two))
        with Rebuilt(capture, records) as new:
            with of(new.fd(one)) as a, of(new.fd(two)) as b, of(new.fd(fresh)) as c:
                assert a.getpeername() == b.getsockname()
                assert a.getsockopt(SOL, socket.SO_BROADCAST) == 1
                assert a.getsockopt(IP, socket.IP_TTL) == 77
                assert a.getsockopt(SOL, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
                assert c.getsockname() == ("0.0.0.0", 0)
                a.send(b"to the other")
                assert b.recvfrom(100) == (b"to the other", a.getsockname())


_MESSAGES = [b"", b"first", b"", b"", b"x" * 60_000, b"last", b""]


@pytest.mark.root
@pytest.mark.parametrize("protocol", [socket.IPPROTO_UDP, UDPLITE], ids=["udp", "udplite"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::", "mapped"])
def test_unread_datagrams_come_back_with_their_senders(address: str, protocol: int) -> None:
    family = socket.AF_INET if "." in address else socket.AF_INET6

    def setup() -> tuple[int, ...]:
        sock = udp(family, protocol, "::" if address == "mapped" else address)
        sock.setsockopt(SOL, socket.SO_RCVBUF, 200_000)
        sock.setsockopt(SOL, 42, 2)
        port = sock.getsockname()[1]
        return (*kept(sock), port)

    inside = socket.AF_INET if address == "mapped" else family
    host = "127.0.0.1" if inside == socket.AF_INET else "::1"
    with subject(setup) as child:
        fd, port = child.result
        senders = [udp(inside, protocol), udp(inside, protocol)]
        try:
            for number, message in enumerate(_MESSAGES):
                senders[number % 2].sendto(message, (host, port))
            names = [sender.getsockname()[1] for sender in senders]
            with Capture(child.pid) as capture:
                records = capture.records()
                with of(capture.view(fd).local) as sock:
                    assert sock.getsockopt(SOL, 42) == 2, "the peek offset of the target was moved"
        finally:
            for sender in senders:
                sender.close()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.getsockname()[1] == port
            assert sock.getsockopt(SOL, socket.SO_RCVBUF) == 400_000
            assert sock.getsockopt(SOL, 42) == 2
            shown = "::ffff:127.0.0.1" if address == "mapped" else host
            for number, message in enumerate(_MESSAGES):
                data, sender_name = sock.recvfrom(70_000, socket.MSG_DONTWAIT)
                assert data == message
                assert sender_name[:2] == (shown, names[number % 2])
            with pytest.raises(BlockingIOError):
                sock.recv(1, socket.MSG_DONTWAIT)
            with udp(inside, protocol) as late:
                late.sendto(b"a new one", (host, port))
                assert sock.recv(100) == b"a new one"


def _filled(*messages: bytes, prepare: Callable[[socket.socket], None] = lambda _: None) -> socket.socket:
    """A socket with datagrams that it has sent to itself."""
    sock = udp()
    prepare(sock)
    for message in messages:
        sock.sendto(message, sock.getsockname())
    return sock


@pytest.mark.root
def test_what_comes_with_a_datagram_comes_back() -> None:
    def prepare(sock: socket.socket) -> None:
        for option in (socket.IP_RECVTOS, 12, 8):
            sock.setsockopt(IP, option, 1)
        sock.setsockopt(SOL, 75, 1)
        sock.setsockopt(IP, socket.IP_TOS, 0x48)
        sock.setsockopt(IP, socket.IP_TTL, 99)
        sock.setsockopt(SOL, 36, struct.pack("=I", 0x89AB_CDEF))

    with subject(lambda: kept(_filled(b"marked", prepare=prepare))) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
            with of(capture.view(fd).local) as sock:
                before = sock.recvmsg(100, 1000, socket.MSG_PEEK)
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert len(before[1]) == 4
            assert sock.recvmsg(100, 1000) == before


@pytest.mark.root
def test_a_filter_does_not_judge_a_second_time() -> None:
    from pipeline.resources import socket_filter

    def setup() -> tuple[int, ...]:
        sock = _filled(b"came before the filter")
        socket_filter.attach(sock, struct.pack("<HBBI", 6, 0, 0, 0))
        return kept(sock)

    with subject(setup) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, fd))
        with Rebuilt(capture, records) as new, of(new.fd(fd)) as sock:
            assert sock.recv(100, socket.MSG_DONTWAIT) == b"came before the filter"
            sock.sendto(b"dropped", sock.getsockname())
            with pytest.raises(BlockingIOError):
                sock.recv(100, socket.MSG_DONTWAIT)


@pytest.mark.root
def test_unread_datagrams_are_dropped_or_refused_when_a_person_says_so() -> None:
    with subject(lambda: kept(_filled(b"one", b"two"))) as child:
        (fd,) = child.result
        with Capture(child.pid, policy=DumpPolicy(udp_queue="refuse")) as capture:
            (blocker,) = capture.blockers(fd)
            assert blocker.transient
            assert "messages wait to be read" in blocker.reason
        with Capture(child.pid, policy=DumpPolicy(udp_queue="drop")) as capture:
            assert next(f.state["queue"] for f in capture.records() if f.kind == "udp") == []
        with Capture(child.pid) as capture:
            records = capture.records()
        assert len(next(f.state["queue"] for f in records if f.kind == "udp")) == 2
        child.call(partial(close, fd))
        with Rebuilt(capture, records, policy=RestorePolicy(udp_queue="drop")) as new, of(new.fd(fd)) as sock:
            with pytest.raises(BlockingIOError):
                sock.recv(100, socket.MSG_DONTWAIT)


def _without_raw_sockets(_: int, make: Callable[[], socket.socket]) -> socket.socket:
    """What a plain user gets in the network of the host."""
    made = make()
    if made.type == socket.SOCK_RAW and made.family != socket.AF_NETLINK:
        made.close()
        raise PermissionError(1, "Operation not permitted")
    return made


def _both_ends() -> tuple[int, ...]:
    receiver, sender, everywhere = udp(), udp(), udp(socket.AF_INET6, address="::")
    for message in _MESSAGES:
        sender.sendto(message, receiver.getsockname())
    sender.sendto(b"mapped", ("127.0.0.1", everywhere.getsockname()[1]))
    return kept(receiver, sender, everywhere)


def test_datagrams_within_the_tree_are_sent_again_where_nobody_may_queue_them() -> None:
    with subject(_both_ends) as child:
        receiver, sender, everywhere = child.result
        with Capture(child.pid) as capture:
            capture.in_network = _without_raw_sockets  # type: ignore[method-assign]
            records = capture.records()
        child.call(partial(close, *child.result))
        new = Rebuilt(capture, records)
        new.in_network = _without_raw_sockets  # type: ignore[method-assign]
        with new, of(new.fd(receiver)) as a, of(new.fd(sender)) as b, of(new.fd(everywhere)) as c:
            assert [a.recvfrom(70_000, socket.MSG_DONTWAIT) for _ in _MESSAGES] == [
                (message, b.getsockname()) for message in _MESSAGES
            ]
            assert c.recvfrom(100, socket.MSG_DONTWAIT)[:1] == (b"mapped",)
        for change, words in (
            ({"by": None}, "only by who has CAP_NET_RAW"),
            ({"by": 999}, "cannot be sent again"),
        ):
            others = []
            for file in records:
                state = dict(file.state)
                if file.kind == "udp" and state["queue"]:
                    queue = msgspec.convert(state["queue"], list[datagrams.Datagram])
                    state["queue"] = msgspec.to_builtins(
                        [msgspec.structs.replace(one, **change) for one in queue], builtin_types=(bytes,)
                    )
                others.append(msgspec.structs.replace(file, state=state))
            bad = Rebuilt(capture, others)
            bad.in_network = _without_raw_sockets  # type: ignore[method-assign]
            with pytest.raises(RebuildError, match=words):
                bad.__enter__()


def test_datagrams_of_strangers_are_refused_where_nobody_may_queue_them() -> None:
    def setup() -> tuple[int, ...]:
        receiver = udp()
        with udp() as stranger:
            stranger.sendto(b"from outside", receiver.getsockname())
        return kept(receiver)

    with subject(setup) as child, Capture(child.pid) as capture:
        capture.in_network = _without_raw_sockets  # type: ignore[method-assign]
        assert not capture.blockers(child.result[0])
        with pytest.raises(Refused, match="who is not of the tree") as refusal:
            capture.records()
        assert all(blocker.transient for blocker in refusal.value.blockers)


_SEEN: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "time": (lambda sock: sock.setsockopt(SOL, 35, 1), "came with its time of arrival"),
    "port": (lambda sock: sock.setsockopt(IP, 20, 1), "came with its original port"),
    "options": (
        lambda sock: (sock.setsockopt(IP, 6, 1), sock.setsockopt(IP, 4, b"\x94\x04\0\0"))[0],
        "came with IP options",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("what", _SEEN)
def test_datagrams_that_came_with_more_are_refused_by_name(what: str) -> None:
    prepare, words = _SEEN[what]
    with subject(lambda: kept(_filled(b"one", prepare=prepare))) as child, Capture(child.pid) as capture:
        (fd,) = child.result
        assert not capture.blockers(fd)
        with pytest.raises(Refused, match=words):
            capture.records()
        with of(capture.view(fd).local) as sock:
            assert sock.getsockopt(SOL, 42) == -1, "the peek offset of the target was moved"
            assert sock.recv(100, socket.MSG_DONTWAIT) == b"one"


def test_a_pipeline_that_is_killed_while_it_looks_gives_the_peek_offset_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = datagrams._walk

    def slowly(sock: socket.socket, subject: str) -> Iterator[datagrams.Datagram]:
        yield from walk(sock, subject)
        time.sleep(0.3)

    monkeypatch.setattr(datagrams, "_walk", slowly)
    with udp() as receiver, udp() as sender:
        sender.sendto(b"unread", receiver.getsockname())
        pipeline = os.fork()
        if not pipeline:
            datagrams.peek(receiver, "", Shield())
            os._exit(0)
        deadline = time.monotonic() + 60
        while receiver.getsockopt(SOL, 42) < 0:
            assert time.monotonic() < deadline
        os.kill(pipeline, signal.SIGKILL)
        os.waitpid(pipeline, 0)
        assert receiver.getsockopt(SOL, 42) == -1, "it ends when that has been given back"
        assert receiver.recv(10) == b"unread"


def test_datagrams_by_multicast_or_in_one_piece_are_refused_by_name() -> None:
    def setup() -> tuple[int, ...]:
        lo = socket.inet_aton("127.0.0.1")
        grouped, whole = udp(address="0.0.0.0"), udp()
        grouped.setsockopt(IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.4.5.6") + lo)
        grouped.setsockopt(IP, 8, 1)
        whole.setsockopt(socket.IPPROTO_UDP, 104, 1)
        with udp() as sender:
            sender.setsockopt(IP, socket.IP_MULTICAST_IF, lo)
            sender.sendto(b"to all", ("239.4.5.6", grouped.getsockname()[1]))
            sender.setsockopt(socket.IPPROTO_UDP, 103, 100)
            sender.sendto(b"x" * 300, whole.getsockname())
        return kept(grouped, whole)

    with subject(setup) as child, Capture(child.pid) as capture:
        for fd, words in zip(child.result, ("by multicast", r"others in one piece \(UDP_GRO\)"), strict=True):
            with of(capture.view(fd).local) as sock, pytest.raises(Refused, match=words):
                datagrams.peek(sock, "it", Shield())


def test_an_empty_datagram_that_was_looked_at_is_refused() -> None:
    with subject(lambda: kept(_filled(b"", b"behind"), _filled(b""))) as child, Capture(child.pid) as capture:
        for fd in child.result:
            with of(capture.view(fd).local) as sock:
                assert sock.recv(10, socket.MSG_PEEK) == b""
                with pytest.raises(Refused, match="is empty and was looked at then") as refusal:
                    datagrams.peek(sock, "it", Shield())
                assert all(blocker.transient for blocker in refusal.value.blockers)
                assert sock.getsockopt(SOL, 42) == -1
                assert sock.recv(10, socket.MSG_DONTWAIT) == b""


def test_a_check_does_not_hide_an_empty_datagram_behind_a_shutdown() -> None:
    def setup() -> tuple[int, ...]:
        socks = _filled(b"", b"behind"), udp()
        for sock in socks:
            sock.connect(sock.getsockname())
            sock.shutdown(socket.SHUT_RD)
        return kept(*socks)

    with subject(setup) as child, Capture(child.pid) as capture:
        for fd, messages in zip(child.result, ([b"", b"behind"], []), strict=True):
            assert not capture.blockers(fd)
            with of(capture.view(fd).local) as sock:
                assert [one.data for one in datagrams.peek(sock, "it", Shield())] == messages
                assert datagrams.are_unread(capture.view(fd).local, sock) == bool(messages)


@pytest.mark.root
def test_datagrams_wait_in_a_network_without_lo() -> None:
    def setup() -> tuple[int, ...]:
        unshare(CLONE.NEWNET)
        return kept(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    with subject(setup) as child, Capture(child.pid) as capture:
        with of(capture.view(child.result[0]).local) as sock:
            (blocker,) = datagrams.check(sock, "it")
            assert "lo is down" in blocker.reason
            assert blocker.transient


def test_what_nobody_can_read_is_refused() -> None:
    def setup() -> tuple[int, ...]:
        empty, corked, failed = (
            udp(),
            socket.socket(type=socket.SOCK_DGRAM),
            socket.socket(type=socket.SOCK_DGRAM),
        )
        corked.connect(empty.getsockname())
        corked.setsockopt(socket.IPPROTO_UDP, 1, 1)
        corked.send(b"held back")
        failed.connect(("127.0.0.1", 9))
        failed.send(b"nobody there")
        select.select([], [], [failed], 0.2)
        return kept(empty, corked, failed)

    with subject(setup) as child, Capture(child.pid) as capture:
        empty, corked, failed = child.result
        assert not capture.blockers(empty)
        assert "not sent yet" in capture.reasons(corked)
        assert "an error waits" in capture.reasons(failed)


def test_halves_stay_shut_down() -> None:
    def setup() -> tuple[int, ...]:
        fds = []
        for how in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            sock = udp()
            sock.connect(("127.0.0.1", 9))
            sock.shutdown(how)
            fds.append(sock.detach())
        return tuple(fds)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        assert [f.state["shut"] for f in records if f.kind == "udp"] == [1, 2, 3]
        with Rebuilt(capture, records) as new:
            for fd, shut in zip(child.result, (1, 2, 3), strict=True):
                with of(new.fd(fd)) as sock:
                    poll = select.poll()
                    poll.register(sock, select.POLLRDHUP)
                    events = poll.poll(0)
                    assert bool(events) == (shut != 2)
                    if shut & 2:
                        with pytest.raises(BrokenPipeError):
                            sock.send(b"x")
                    else:
                        sock.send(b"x")


def _joined(sock: socket.socket) -> list[multicast.Membership]:
    with Capture(os.getpid()) as capture:
        return multicast.capture(sock, 4, capture)


def test_multicast_groups_come_back_with_their_sources() -> None:
    def setup() -> tuple[int, ...]:
        four, six = udp(address="0.0.0.0"), udp(socket.AF_INET6, address="::")
        lo = socket.inet_aton("127.0.0.1")
        four.setsockopt(IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.1.2.3") + lo)
        for source in ("192.0.2.1", "192.0.2.2"):
            four.setsockopt(IP, 39, socket.inet_aton("239.1.2.4") + lo + socket.inet_aton(source))
        four.setsockopt(IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.1.2.5") + lo)
        four.setsockopt(IP, 38, socket.inet_aton("239.1.2.5") + lo + socket.inet_aton("192.0.2.9"))
        six.setsockopt(
            IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, "ff15::77") + struct.pack("<I", 1)
        )
        six.setsockopt(IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.1.2.6") + lo)
        return kept(four, six)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        with Rebuilt(capture, records) as new:
            with of(new.fd(child.result[0])) as four, of(new.fd(child.result[1])) as six:
                found = {socket.inet_ntop(socket.AF_INET, m.group): m for m in _joined(four)}
                assert set(found) == {"239.1.2.3", "239.1.2.4", "239.1.2.5"}
                assert all(m.interface == b"lo" for m in found.values())
                assert (found["239.1.2.3"].only, found["239.1.2.3"].sources) == (False, [])
                sources = sorted(socket.inet_ntoa(s) for s in found["239.1.2.4"].sources)
                assert (found["239.1.2.4"].only, sources) == (True, ["192.0.2.1", "192.0.2.2"])
                assert found["239.1.2.5"] == multicast.Membership(
                    b"lo", socket.inet_aton("239.1.2.5"), False, [socket.inet_aton("192.0.2.9")]
                )
                assert {m.group for m in _joined(six)} == {
                    socket.inet_pton(socket.AF_INET6, "ff15::77"),
                    socket.inet_aton("239.1.2.6"),
                }


def test_groups_of_bad_records_are_named() -> None:
    with udp() as sock:
        for one, words in (
            (multicast.Membership(b"nowhere", bytes(4)), "0.0.0.0 on nowhere: "),
            (multicast.Membership(b"lo", bytes(4)), "0.0.0.0 on lo: Invalid"),
            (multicast.Membership(b"lo", bytes(5)), "0000000000 on lo: "),
        ):
            with pytest.raises(RebuildError, match=words):
                multicast.join(sock, [one], "socket")


@pytest.mark.root
def test_anycast_and_flow_labels_are_refused_where_nobody_knows_whose_they_are() -> None:
    def setup() -> tuple[int, ...]:
        unshare(CLONE.NEWNET)
        holder, plain = (socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(2))
        os.system("ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
        any_address = socket.inet_pton(socket.AF_INET6, "2001:db8::5")
        holder.setsockopt(IPV6, 27, any_address + struct.pack("<I", 1))
        label = struct.pack(
            "<16sIBBHHH4x", socket.inet_pton(socket.AF_INET6, "::1"), socket.htonl(0x12345), 0, 255, 1, 60, 60
        )
        holder.setsockopt(IPV6, 32, label)
        return kept(holder, plain)

    def look(pid: int, act: Callable[[], bytes]) -> bytes:
        from pipeline.userns.visit import visit

        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            return visit([(fd, CLONE.NEWNET)], act)
        finally:
            os.close(fd)

    with subject(setup) as child, Capture(child.pid) as capture:
        capture.look_in_network = lambda _, act: look(child.pid, act)  # type: ignore[method-assign]
        with of(capture.view(child.result[1]).local) as sock:
            found = [str(b) for b in multicast.check(capture.view(child.result[1]), sock, 4, capture)]
        assert any("joined anycast address 2001:db8::5" in text for text in found), found
        assert any("flow label 12345" in text for text in found), found


@pytest.mark.root
def test_datagrams_of_bad_records_are_named() -> None:
    with subject(lambda: kept(_filled(b"one"))) as child:
        (fd,) = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, fd))
    (found,) = (f for f in records if f.kind == "udp")
    record = msgspec.convert(found.state, udp_socket.UdpState)
    for bad in (
        datagrams.Datagram(b"x", Address(bytes(16), 1)),
        datagrams.Datagram(b"x", Address(bytes(4), 1), bytes(7)),
    ):
        changed = msgspec.to_builtins(msgspec.structs.replace(record, queue=[bad]), builtin_types=(bytes,))
        others = [msgspec.structs.replace(f, state=changed) if f.kind == "udp" else f for f in records]
        with pytest.raises(RebuildError, match="a datagram of another family"):
            Rebuilt(capture, others).__enter__()


@pytest.mark.root
def test_records_of_another_kind_of_socket_are_named() -> None:
    from tests.resources.fdharness import KINDS

    def setup() -> tuple[int, ...]:
        return kept(
            udp(),
            socket.socket(socket.AF_INET, socket.SOCK_RAW, 200),
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0),
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        )

    with subject(setup) as child, Capture(child.pid) as capture:
        records = [f for f in capture.records() if f.kind in ("udp", "raw", "packet", "netlink")]
        for one in records:
            for other in records:
                kind = next(k for k in KINDS if k.name == one.kind)
                state = one.state | {"socket": other.state["socket"]}
                if one is not other:
                    changed = [msgspec.structs.replace(one, state=state)]
                    with pytest.raises(RebuildError, match="is no socket of this kind"):
                        Rebuilt(capture, changed, finish=False).__enter__()
                    assert msgspec.convert(state, kind.record)


@pytest.mark.root
def test_a_datagram_larger_than_any_is_named() -> None:
    with subject(lambda: kept(udp())) as child, Capture(child.pid) as capture:
        records = capture.records()
        (found,) = (f for f in records if f.kind == "udp")
        record = msgspec.convert(found.state, udp_socket.UdpState)
        large = datagrams.Datagram(bytes(65_536), Address(bytes(4), 1))
        changed = msgspec.to_builtins(msgspec.structs.replace(record, queue=[large]), builtin_types=(bytes,))
        with pytest.raises(RebuildError, match="larger than any"):
            Rebuilt(capture, [msgspec.structs.replace(found, state=changed)], finish=False).__enter__()
