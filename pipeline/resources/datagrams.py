"""Unread datagrams of UDP sockets: looked at without taking them, and queued again as if they had just come.

Looking: SO_PEEK_OFF makes MSG_PEEK walk through the queue; it is set for the walk and put back. The
sender's address comes with each datagram, and what the socket's options ask for (the address it was
sent to, hops, type of service, mark).

Queuing again: while the new socket is bound to a port that the kernel has chosen, a raw socket sends it
whole packets through the loopback device of its network, with the sender's address in their header, from
wherever that is: for what is sent with a header of one's own, the kernel looks for the way out only, and the
way out to a local address is the way in. Disconnecting (AF_UNSPEC) gives the port back and leaves the
queue alone; then the socket is bound to its true address. So no other socket of the port can get them.

Not carried, hence refused, as they go away by being read: datagrams whose place or time of arrival the program gets
to see (IP_PKTINFO of another device than lo, timestamps), those that GRO has put together, and what came with IP
options. An empty datagram that was peeked at before is not seen by the walk.

Source: udp(7), ip(7), raw(7); net/core/datagram.c (__skb_try_recv_from_queue), net/ipv4/udp.c
(__udp_disconnect), net/ipv4/raw.c (raw_send_hdrinc).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError, Refused
from pipeline.ids import LocalFd
from pipeline.image.schema import U8, U32
from pipeline.kernel import interfaces
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import inet_address, sockets
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.sockets import SocketState

_SO_PEEK_OFF = 42
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_SO_MARK, _SO_PRIORITY = 36, 12
_LOOPBACK = {socket.AF_INET: socket.inet_aton("127.0.0.1"), socket.AF_INET6: bytes(15) + b"\1"}
_MAPPED = bytes(10) + b"\xff\xff"
_LO_INDEX = 1
_BUFFER_BYTES = 1 << 16
_CONTROL_BYTES = 1024
_DEFAULT_HOPS = 64
#: room that a queued datagram takes beside its bytes
_OVERHEAD_BYTES = 2048
_LARGEST_BUFFER_BYTES = 0x3FFF_FFFF
#: how long a packet may take through lo
_ARRIVAL_S = 1.0
_IP, _IPV6, _SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET

Packed = Annotated[bytes, Meta(max_length=16)]


class Datagram(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One unread datagram.

    `to`: the packed address it was sent to, empty where the program cannot see it. `hops`, `service`, `flow`: of its IP
    header. `mark`, `priority`: of the packet in its host.
    """

    data: Annotated[bytes, Meta(max_length=_BUFFER_BYTES)]
    sender: Address
    to: Packed = b""
    hops: U8 = _DEFAULT_HOPS
    service: U8 = 0
    flow: Annotated[int, Meta(ge=0, le=0xFFFFF)] = 0
    mark: U32 = 0
    priority: U32 = 0


Queue = Annotated[list[Datagram], Meta(max_length=1 << 16)]


@contextmanager
def _from_the_start(sock: socket.socket) -> Iterator[None]:
    before = sock.getsockopt(_SOL, _SO_PEEK_OFF)
    sock.setsockopt(_SOL, _SO_PEEK_OFF, 0)
    try:
        yield
    finally:
        sock.setsockopt(_SOL, _SO_PEEK_OFF, before)


def peek(sock: socket.socket, subject: str) -> list[Datagram]:
    """Every unread datagram of a socket, which is frozen and has no error pending.

    Raises:
        Refused: one came with something that cannot come back; names it.
    """
    with _from_the_start(sock):
        return list(_walk(sock, subject))


def _walk(sock: socket.socket, subject: str) -> Iterator[Datagram]:
    buffer = bytearray(_BUFFER_BYTES)
    while True:
        try:
            length, control, _, sender = sock.recvmsg_into(
                [buffer], _CONTROL_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        yield _understood(sock, bytes(buffer[:length]), control, sender, subject)


def _understood(
    sock: socket.socket,
    data: bytes,
    control: Sequence[tuple[int, int, bytes]],
    sender: tuple[str, int],
    subject: str,
) -> Datagram:
    def refuse(what: str) -> Refused:
        return Refused(
            [
                Blocker(
                    subject,
                    f"a datagram that waits to be read came {what}",
                    "wait until it is read, or let it be dropped (--udp-queue drop)",
                    transient=True,
                )
            ]
        )

    found: dict[str, int | bytes] = {}
    for level, kind, value in control:
        index = _LO_INDEX
        match level, kind:
            case (0, 8):
                index, _, found["to"] = struct.unpack("<i4s4s", value)
            case (41, 50 | 2):
                found["to"], index = struct.unpack("<16si", value)
            case (0, 1) | (41, 67):
                found["service"] = value[0]
            case (0, 2) | (41, 52 | 8):
                found["hops"] = value[0]
            case (41, 11):
                found["flow"] = int.from_bytes(value[:4], "big") & 0xFFFFF
            case (1, 36):
                (found["mark"],) = struct.unpack("<I", value)
            case (1, 12):
                (found["priority"],) = struct.unpack("<I", value)
            case _:
                raise refuse(f"with {_NAMES.get((level, kind), f'ancillary data {level}/{kind}')}")
        if index != _LO_INDEX:
            raise refuse("by another device than lo, and the program asks by which (PKTINFO)")
    to = found.get("to")
    if isinstance(to, bytes) and _is_shared(to):
        raise refuse("by multicast or broadcast, and the program asks for its address (PKTINFO)")
    address = inet_address.pack(sock, sock.family, sender)
    if address.interface:
        raise refuse(f"from a neighbour, {address}")
    return Datagram(data, address, **found)  # type: ignore[arg-type]


_NAMES = {
    (_SOL, 29): "its time of arrival", (_SOL, 35): "its time of arrival", (_SOL, 37): "its time of arrival",
    (_SOL, 63): "its time of arrival", (_SOL, 64): "its time of arrival", (_SOL, 65): "its time of arrival",
    (_SOL, 40): "a count of those that were dropped", (socket.IPPROTO_UDP, 104): "others in one piece (UDP_GRO)",
    (_IP, 20): "its original port", (_IPV6, 74): "its original port",
    (_IP, 6): "IP options", (_IP, 7): "IP options", (_IP, 25): "in fragments", (_IPV6, 77): "in fragments",
}  # fmt: skip


def _is_shared(host: bytes) -> bool:
    if len(host) == 4:
        return host[0] >= 224
    return host[0] == 0xFF


def are_unread(fd: LocalFd, sock: socket.socket) -> bool:
    """Whether something waits to be read. A socket that was shut down for reading is always readable.

    Peeking is avoided: an empty datagram that was peeked at is not seen by a walk that comes later.
    """
    found = sockets.events(fd, select.POLLIN | select.POLLRDHUP)
    if not found & select.POLLIN:
        return False
    if not found & select.POLLRDHUP:
        return True
    try:
        sock.recv(0, socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_TRUNC)
    except BlockingIOError:
        return False
    return True


def refuse_unread(view: FdView, sock: socket.socket, scope: CaptureScope) -> Iterator[Blocker]:
    """Refuse what waits to be read in a socket whose queue is not carried, unless a person lets it be dropped."""
    if scope.policy.udp_queue != "drop" and are_unread(view.local, sock):
        yield Blocker(
            view.subject,
            "messages wait to be read",
            "wait until they are read, or let them be dropped (--udp-queue drop)",
            transient=True,
        )


def check(sock: socket.socket, netns: int, subject: str, scope: CaptureScope) -> Iterator[Blocker]:
    """Whether what waits in a socket of this network can be queued again by somebody like ourselves."""
    remedy = "wait until they are read, or let them be dropped (--udp-queue drop)"
    if not interfaces.is_up(sock, b"lo"):
        yield Blocker(
            subject, "datagrams wait to be read, and lo is down in its network", remedy, transient=True
        )
    try:
        scope.in_network(
            netns, lambda: socket.socket(sock.family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        ).close()
    except PermissionError:
        yield Blocker(
            subject,
            "datagrams wait to be read, and only who has CAP_NET_RAW in its network can queue them again",
            remedy,
            transient=True,
        )


def queue_again(
    sock: socket.socket, state: SocketState, datagrams: Sequence[Datagram], subject: str, scope: CreateScope
) -> None:
    """Queue recorded datagrams in a new socket, which is not bound before and not bound afterwards.

    Its options, but those in the way, are set: some say what is noted with a datagram when it comes.

    Raises:
        RebuildError: a raw socket or room for the queue is not to be had here, or one does not arrive.
    """
    room = sum(2 * len(one.data) + _OVERHEAD_BYTES for one in datagrams)
    _make_room(sock, min(room, _LARGEST_BUFFER_BYTES))
    sock.bind(("" if state.family == socket.AF_INET else "::", 0))
    port = sock.getsockname()[1]
    injectors: dict[int, socket.socket] = {}
    try:
        for datagram in datagrams:
            host = datagram.sender.host
            mapped = state.family == socket.AF_INET6 and host.startswith(_MAPPED)
            family = socket.AF_INET if mapped else socket.AddressFamily(state.family)
            size = 4 if state.family == socket.AF_INET else 16
            if len(host) != size or len(datagram.to) not in (0, 4, size):
                raise RebuildError(f"{subject}: a datagram of another family, from {host.hex()}")
            if family not in injectors:
                injectors[family] = _injector(family, state.netns, scope)
            packet, to = _packet(family, state.protocol, datagram, port)
            injector = injectors[family]
            injector.setsockopt(_SOL, _SO_MARK, datagram.mark)
            injector.setsockopt(_SOL, _SO_PRIORITY, datagram.priority)
            before = _held_bytes(sock)
            injector.sendto(packet, (to, 0))
            if not _has_grown(sock, before):
                raise RebuildError(
                    f"{subject}: a datagram from {datagram.sender} does not get through the network here "
                    "(its firewall?); restore with --udp-queue drop"
                )
    except OSError as error:
        raise RebuildError(
            f"{subject}: unread datagrams cannot be queued again: {error.strerror}; restore as root, or with "
            "--udp-queue drop"
        ) from error
    except struct.error as error:
        raise RebuildError(f"{subject}: an unread datagram is larger than any: {error}") from error
    finally:
        for injector in injectors.values():
            injector.close()
    syscall(NR.connect, sock.fileno(), struct.pack("<H14x", socket.AF_UNSPEC), 16)


def _injector(family: int, netns: int, scope: CreateScope) -> socket.socket:
    return scope.in_network(netns, lambda: socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))


def _make_room(sock: socket.socket, room: int) -> None:
    if sock.getsockopt(_SOL, socket.SO_RCVBUF) >= room:
        return
    try:
        sock.setsockopt(_SOL, _SO_RCVBUFFORCE, room)
    except PermissionError:
        sock.setsockopt(_SOL, socket.SO_RCVBUF, room)


def _held_bytes(sock: socket.socket) -> int:
    """The memory that queued datagrams take (SK_MEMINFO_RMEM_ALLOC)."""
    return int(struct.unpack_from("<I", sock.getsockopt(_SOL, _SO_MEMINFO, 4))[0])


def _has_grown(sock: socket.socket, before: int) -> bool:
    """Whether the queue takes more memory than before, or does so in a moment: packets come in by a softirq."""
    deadline = time.monotonic() + _ARRIVAL_S
    while _held_bytes(sock) <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _packet(family: int, protocol: int, datagram: Datagram, port: int) -> tuple[bytes, str]:
    """The whole IP packet of a datagram, and the address to send it to."""
    source, to = datagram.sender.host, datagram.to or _LOOPBACK[socket.AddressFamily(family)]
    if family == socket.AF_INET:
        source, to = source[-4:], to[-4:]
    # The second field is the length of UDP, and the coverage of UDP-Lite, where 0 is everything.
    length = 8 + len(datagram.data)
    field = length if protocol == socket.IPPROTO_UDP else 0
    head = struct.pack(">HHH", datagram.sender.port, port, field)
    if family == socket.AF_INET:
        pseudo = source + to + struct.pack(">BBH", 0, protocol, length)
        outer = struct.pack(
            ">BBHHHBBH4s4s", 0x45, datagram.service, 20 + length, 0, 0, datagram.hops, protocol, 0, source, to
        )
    else:
        pseudo = source + to + struct.pack(">I3xB", length, protocol)
        first = 6 << 28 | datagram.service << 20 | datagram.flow
        outer = struct.pack(">IHBB16s16s", first, length, protocol, datagram.hops, source, to)
    checksum = _checksum(pseudo + head + b"\0\0" + datagram.data)
    return outer + head + struct.pack(">H", checksum) + datagram.data, socket.inet_ntop(family, to)


def _checksum(covered: bytes) -> int:
    """The one's complement sum of 16-bit words, as a number modulo 65535 is one; never 0, which means none."""
    return 0xFFFF - int.from_bytes(covered + bytes(len(covered) % 2), "big") % 0xFFFF
