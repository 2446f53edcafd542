"""Unread datagrams of UDP sockets: looked at without taking them, and queued again as if they had just come.

Looking: SO_PEEK_OFF makes MSG_PEEK walk through the queue; a child sets it for the walk and puts it back. The
sender's address comes with each datagram, and what the socket's options ask for (the address it was
sent to, hops, type of service, mark).

Queuing again: `pipeline.resources.datagrams_again`.

Not carried, hence refused, as they go away by being read: datagrams whose place or time of arrival the program gets
to see (IP_PKTINFO of another device than lo, timestamps), those that GRO has put together, and what came with IP
options. An empty datagram that was looked at before (by the program, or for a dump that came to nothing) is not seen by
the walk: it is refused where it comes first, and lost where it comes behind others.

Source: udp(7), ip(7), ipv6(7); net/core/datagram.c (__skb_try_recv_from_queue).
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import Blocker, Refused
from pipeline.ids import LocalFd
from pipeline.image.schema import U8, U32, Index
from pipeline.kernel import interfaces
from pipeline.resources import inet_address, sockets
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.shielded import Shield
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.sockets import SocketState

_SO_PEEK_OFF, _SO_MEMINFO = 42, 55
MAPPED = bytes(10) + b"\xff\xff"
_LO_INDEX = 1
_BUFFER_BYTES = 1 << 16
_CONTROL_BYTES = 1024
_DEFAULT_HOPS = 64
_IP, _IPV6, _SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET

Packed = Annotated[bytes, Meta(max_length=16)]


class Datagram(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One unread datagram.

    `by`: the open file that has sent it, if it is of the tree. `to`: the packed address it was sent to, empty where the
    program cannot see it. `hops`, `service`, `flow`: of its IP header. `mark`, `priority`: of the packet in its host.
    """

    data: Annotated[bytes, Meta(max_length=_BUFFER_BYTES)]
    sender: Address
    to: Packed = b""
    hops: U8 = _DEFAULT_HOPS
    service: U8 = 0
    flow: Annotated[int, Meta(ge=0, le=0xFFFFF)] = 0
    mark: U32 = 0
    priority: U32 = 0
    by: Index | None = None


Queue = Annotated[list[Datagram], Meta(max_length=1 << 16)]


class _Told(Struct):
    """What the child answers that looks."""

    found: list[Datagram] = []
    refused: Blocker | None = None


_DECODER = msgspec.msgpack.Decoder(_Told)


def peek(sock: socket.socket, subject: str, shield: Shield) -> list[Datagram]:
    """Every unread datagram of a socket, which is frozen and has no error pending.

    A child of `shield` looks, so that the peek offset is given back whatever becomes of us.

    Raises:
        Refused: one came with something that cannot come back; names it.
    """
    fd = LocalFd(sock.fileno())
    if not are_unread(fd, sock):
        return []
    told = _DECODER.decode(shield.run(_look_there, [fd], subject))
    if told.refused is not None:
        raise Refused([told.refused])
    return told.found


def _look_there(fds: Sequence[LocalFd], subject: str) -> bytes:
    with borrowed(fds[0]) as sock:
        return msgspec.msgpack.encode(_look(sock, subject))


def _look(sock: socket.socket, subject: str) -> _Told:
    before = sock.getsockopt(_SOL, _SO_PEEK_OFF)
    sock.setsockopt(_SOL, _SO_PEEK_OFF, 0)
    try:
        found = list(_walk(sock, subject))
        if not (found and not found[0].data) and _begins_empty(sock):
            raise _refused(
                subject,
                "before, is empty and was looked at then (MSG_PEEK); nobody can tell whether others did",
            )
        return _Told(found)
    except Refused as refused:
        return _Told(refused=refused.blockers[0])
    finally:
        sock.setsockopt(_SOL, _SO_PEEK_OFF, before)


def _begins_empty(sock: socket.socket) -> bool:
    """Whether an empty datagram that the walk did not find comes first."""
    sock.setsockopt(_SOL, _SO_PEEK_OFF, -1)
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _refused(subject: str, what: str) -> Refused:
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
                raise _refused(subject, f"with {_NAMES.get((level, kind), f'ancillary data {level}/{kind}')}")
        if index != _LO_INDEX:
            raise _refused(subject, "by another device than lo, and the program asks by which (PKTINFO)")
    to = found.get("to")
    if isinstance(to, bytes) and _is_shared(to):
        raise _refused(subject, "by multicast or broadcast, and the program asks for its address (PKTINFO)")
    address = inet_address.pack(sock, sock.family, sender)
    if address.interface:
        raise _refused(subject, f"from a neighbour, {address}")
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
    return bool(found & select.POLLIN) and (not found & select.POLLRDHUP or held_bytes(sock) > 0)


def held_bytes(sock: socket.socket) -> int:
    """The memory that queued datagrams take (SK_MEMINFO_RMEM_ALLOC)."""
    return int(struct.unpack_from("<I", sock.getsockopt(_SOL, _SO_MEMINFO, 4))[0])


def refuse_unread(view: FdView, sock: socket.socket, scope: CaptureScope) -> Iterator[Blocker]:
    """Refuse what waits to be read in a socket whose queue is not carried, unless a person lets it be dropped."""
    if scope.policy.udp_queue != "drop" and are_unread(view.local, sock):
        yield Blocker(
            view.subject,
            "messages wait to be read",
            "wait until they are read, or let them be dropped (--udp-queue drop)",
            transient=True,
        )


def check(sock: socket.socket, subject: str) -> Iterator[Blocker]:
    """Whether what waits in a socket can be queued again in its network."""
    if not interfaces.is_up(sock, b"lo"):
        remedy = "wait until they are read, or let them be dropped (--udp-queue drop)"
        yield Blocker(
            subject, "datagrams wait to be read, and lo is down in its network", remedy, transient=True
        )


def with_senders(
    queue: Sequence[Datagram], state: SocketState, subject: str, scope: CaptureScope
) -> list[Datagram]:
    """The queue of a socket, with the sockets of the tree that have sent it.

    Raises:
        Refused: one was sent by somebody else, and nobody like ourselves could queue it again.
    """
    if not queue:
        return []
    known = _senders(state, scope)
    found = [msgspec.structs.replace(one, by=_sender_of(one, known)) for one in queue]
    strangers = [one for one in found if one.by is None]
    if strangers and not _may_inject(state, scope):
        raise Refused(
            [
                Blocker(
                    subject,
                    f"a datagram from {strangers[0].sender} waits to be read, who is not of the tree, and only who has "
                    "CAP_NET_RAW in its network can queue that again",
                    "wait until it is read, let it be dropped (--udp-queue drop), or run the pipeline as root",
                    transient=True,
                )
            ]
        )
    return found


def _may_inject(state: SocketState, scope: CaptureScope) -> bool:
    try:
        scope.in_network(
            state.netns, lambda: socket.socket(state.family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        ).close()
    except PermissionError:
        return False
    return True


_Known = dict[int, list[tuple[Index, bytes]]]


def _senders(state: SocketState, scope: CaptureScope) -> _Known:
    """Port -> open file and address of each socket of the tree with this protocol in this network."""
    key = ("senders", state.netns, state.protocol)
    known: _Known | None = scope.peers().get(key)
    if known is None:
        known = scope.peers()[key] = {}
        for index, view in scope.files():
            who = view.identity
            if who is None or (who.type, who.protocol) != (socket.SOCK_DGRAM, state.protocol):
                continue
            if who.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            with view.as_socket() as sock:
                if sockets.network(sock, scope) == state.netns:
                    local = inet_address.local(sock, who.family)
                    known.setdefault(local.port, []).append((index, local.host))
    return known


def _sender_of(datagram: Datagram, known: _Known) -> Index | None:
    host = datagram.sender.host
    plain = host.removeprefix(MAPPED)
    for index, local in known.get(datagram.sender.port, ()):
        if local in (host, plain) or not any(local):
            return index
    return None
