"""Packet sockets: protocol, device, options, filter, memberships, fanout; rings and what waits are refused."""

from __future__ import annotations

import os
import socket
import struct
from functools import partial

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.kernel import packetdiag
from pipeline.policy import DumpPolicy
from pipeline.resources import packet_socket, socket_filter
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.sockharness import of

SOL, PACKET = socket.SOL_SOCKET, 263
#: an ethertype that nobody sends
_RARE = 0x88B5
pytestmark = pytest.mark.root


def kept(*sockets: socket.socket) -> tuple[int, ...]:
    """Numbers of sockets that the subject holds from now on."""
    return tuple(sock.detach() for sock in sockets)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def packet(kind: int = socket.SOCK_RAW, protocol: int = _RARE, device: str = "lo") -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, kind, 0 if device else socket.htons(protocol))
    if device:
        sock.bind((device, protocol))
    return sock


def told(sock: socket.socket) -> packetdiag.PacketSocket:
    found = packetdiag.find(lambda make: make(), os.fstat(sock.fileno()).st_ino)
    assert found is not None
    return found


def test_packet_sockets_keep_all_that_they_are() -> None:
    def setup() -> tuple[int, ...]:
        one, everywhere, fresh = packet(), packet(socket.SOCK_DGRAM, device=""), packet(protocol=0, device="")
        one.setsockopt(PACKET, 8, 1)
        one.setsockopt(PACKET, 23, 1)
        socket_filter.attach(one, struct.pack("<HBBI", 6, 0, 0, 20))
        for _ in range(2):
            one.setsockopt(PACKET, 1, struct.pack("<iHH8s", 1, 1, 0, b""))
        one.setsockopt(PACKET, 1, struct.pack("<iHH8s", 1, 0, 6, b"\1\0\x5e\0\0\7"))
        return kept(one, everywhere, fresh)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        with Rebuilt(capture, records) as new:
            one, everywhere, fresh = (of(new.fd(fd)) for fd in child.result)
            with one, everywhere, fresh:
                assert one.getsockname()[:2] == ("lo", _RARE)
                assert (everywhere.getsockname()[:2], everywhere.type) == (("", _RARE), socket.SOCK_DGRAM)
                assert fresh.getsockname()[:2] == ("", 0)
                assert (one.getsockopt(PACKET, 8), one.getsockopt(PACKET, 23)) == (1, 1)
                found = sorted(told(one).members, key=lambda member: member.kind)
                assert found == [
                    packetdiag.Member(1, 1, 0, b"\1\0\x5e\0\0\7"),
                    packetdiag.Member(1, 2, 1, b""),
                ]
                assert one.getsockopt(SOL, socket.SO_ERROR) == 0
                with packet() as sender:
                    sender.send(bytes(12) + struct.pack(">H", _RARE) + b"x" * 50)
                assert len(everywhere.recv(100, socket.MSG_DONTWAIT)) == 50
                sender_frame = one.recv(100, socket.MSG_DONTWAIT)
                assert len(sender_frame) == 20, "the filter cuts"


def test_fanout_groups_come_back() -> None:
    def setup() -> tuple[int, ...]:
        one, two = packet(), packet()
        for sock in (one, two):
            sock.setsockopt(PACKET, 18, struct.pack("<I", 77 | (1 | 0x8000) << 16))
        return kept(one, two)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(close, *child.result))
        with Rebuilt(capture, records) as new:
            for fd in child.result:
                with of(new.fd(fd)) as sock:
                    assert sock.getsockopt(PACKET, 18) & 0xFFFF_FFFF == 77 | (1 | 0x8000) << 16


def test_rings_programs_and_what_waits_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        ring, chosen, full = packet(), packet(), packet()
        ring.setsockopt(PACKET, 10, 1)
        ring.setsockopt(PACKET, 5, struct.pack("<4I", 4096, 2, 2048, 4))
        chosen.setsockopt(PACKET, 18, 78 | 6 << 16)
        with packet(protocol=0) as sender:
            sender.send(bytes(12) + struct.pack(">H", _RARE) + b"x" * 50)
        chosen.recv(100)
        return kept(ring, chosen, full)

    with subject(setup) as child:
        ring, chosen, full = child.result
        with Capture(child.pid) as capture:
            assert "a packet socket with a ring" in capture.reasons(ring)
            assert "a program chooses among its fanout group" in capture.reasons(chosen)
            (blocker,) = capture.blockers(full)
            assert blocker.transient
            assert "messages wait to be read" in blocker.reason
        child.call(partial(close, ring, chosen))
        with Capture(child.pid, policy=DumpPolicy(udp_queue="drop")) as capture:
            with Rebuilt(capture) as new, of(new.fd(full)) as sock, pytest.raises(BlockingIOError):
                sock.recv(100, socket.MSG_DONTWAIT)


def test_devices_of_bad_records_are_named() -> None:
    with subject(lambda: kept(packet())) as child, Capture(child.pid) as capture:
        records = capture.records()
        (found,) = (f for f in records if f.kind == "packet")
        record = msgspec.convert(found.state, packet_socket.PacketState)
        for change in (
            {"device": b"\xffnowhere"},
            {"members": [packet_socket.Member(b"nowhere", 1, 1, b"")]},
            {"members": [packet_socket.Member(b"lo", 1, 99, bytes(32))]},
            {"fanout": 0xFFFF_FFFF},
        ):
            state = msgspec.to_builtins(msgspec.structs.replace(record, **change), builtin_types=(bytes,))
            others = [msgspec.structs.replace(f, state=state) if f is found else f for f in records]
            with pytest.raises(RebuildError, match=r"\(packet\): protocol 0x88b5 on"):
                Rebuilt(capture, others).__enter__()
