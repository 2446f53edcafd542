"""Unread datagrams of UDP sockets, queued again as if they had just come.

While the new socket is bound to a port that the kernel has chosen, a raw socket sends it
whole packets through the loopback device of its network, with the sender's address in their header, from
wherever that is: for what is sent with a header of one's own, the kernel looks for the way out only, and the
way out to a local address is the way in. Disconnecting (AF_UNSPEC) gives the port back and leaves the
queue alone; then the socket is bound to its true address. So no other socket of the port can get them.

A raw socket needs CAP_NET_RAW in the network, which a plain user has in networks of their own only. In the host's, a
datagram that a socket of the tree has sent is sent again by that socket, when all are there; any other is refused.

Source: udp(7), raw(7); net/ipv4/udp.c (__udp_disconnect), net/ipv4/raw.c (raw_send_hdrinc).
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

from pipeline.errors import RebuildError
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.datagrams import MAPPED, Datagram, held_bytes
from pipeline.resources.inet_address import Address
from pipeline.resources.kinds import CreateScope
from pipeline.resources.socket_identity import borrowed
from pipeline.resources.sockets import SocketState

_SO_RCVBUFFORCE = 33
_SO_MARK, _SO_PRIORITY = 36, 12
_LOOPBACK = {socket.AF_INET: socket.inet_aton("127.0.0.1"), socket.AF_INET6: bytes(15) + b"\1"}
#: room that a queued datagram takes beside its bytes
_OVERHEAD_BYTES = 2048
_LARGEST_BUFFER_BYTES = 0x3FFF_FFFF
#: how long a packet may take through lo
_ARRIVAL_S = 1.0
_SOL = socket.SOL_SOCKET


def send_again(
    sock: socket.socket,
    local: Address | None,
    datagrams: Sequence[Datagram],
    subject: str,
    scope: CreateScope,
) -> None:
    """Let the tree's own sockets send recorded datagrams again, to one that is bound and all of which stand.

    Raises:
        RebuildError: one was sent by nobody of the tree, or does not arrive.
    """
    port = local.port if local is not None else 0
    for datagram in datagrams:
        if datagram.by is None:
            raise RebuildError(
                f"{subject}: a datagram from {datagram.sender} can be queued again only by who has CAP_NET_RAW here; "
                "restore as root, or with --udp-queue drop"
            )
        before = held_bytes(sock)
        try:
            with borrowed(scope.file(datagram.by)) as sender:
                host = local.host if local is not None and any(local.host) else b""
                host = host[-4:] if sender.family == socket.AF_INET else host
                to = socket.inet_ntop(sender.family, host or _LOOPBACK[sender.family])
                sender.sendto(datagram.data, socket.MSG_DONTWAIT, (to, port))
        except (OSError, ValueError, KeyError) as error:
            raise RebuildError(
                f"{subject}: an unread datagram from {datagram.sender} cannot be sent again: {error}; restore as root, "
                "or with --udp-queue drop"
            ) from error
        if not _has_grown(sock, before):
            raise RebuildError(
                f"{subject}: an unread datagram from {datagram.sender} does not arrive a second time; restore as root, "
                "or with --udp-queue drop"
            )


def queue_again(
    sock: socket.socket, state: SocketState, datagrams: Sequence[Datagram], subject: str, scope: CreateScope
) -> bool:
    """Queue recorded datagrams in a new socket, which is not bound before and not bound afterwards.

    Its options, but those in the way, are set: some say what is noted with a datagram when it comes.

    Returns:
        False where nobody may do so here: nothing has happened.

    Raises:
        RebuildError: room for the queue is not to be had here, or one does not arrive.
    """
    try:
        _injector(state.family, state.netns, scope).close()
    except PermissionError:
        return False
    room = sum(2 * len(one.data) + _OVERHEAD_BYTES for one in datagrams)
    _make_room(sock, min(room, _LARGEST_BUFFER_BYTES))
    sock.bind(("" if state.family == socket.AF_INET else "::", 0))
    port = sock.getsockname()[1]
    injectors: dict[int, socket.socket] = {}
    try:
        for datagram in datagrams:
            host = datagram.sender.host
            mapped = state.family == socket.AF_INET6 and host.startswith(MAPPED)
            family = socket.AF_INET if mapped else socket.AddressFamily(state.family)
            size = 4 if state.family == socket.AF_INET else 16
            if len(host) != size or len(datagram.to) not in (0, 4, size):
                raise RebuildError(f"{subject}: a datagram of another family, from {host.hex()}")
            if family not in injectors:
                injectors[family] = _injector(family, state.netns, scope)
            packet, to = _packet(family, state.protocol, datagram, port)
            injector = injectors[family]
            injector.setsockopt(_SOL, _SO_MARK, struct.pack("=I", datagram.mark))
            injector.setsockopt(_SOL, _SO_PRIORITY, struct.pack("=I", datagram.priority))
            before = held_bytes(sock)
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
    return True


def _injector(family: int, netns: int, scope: CreateScope) -> socket.socket:
    return scope.in_network(netns, lambda: socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))


def _make_room(sock: socket.socket, room: int) -> None:
    if sock.getsockopt(_SOL, socket.SO_RCVBUF) >= room:
        return
    try:
        sock.setsockopt(_SOL, _SO_RCVBUFFORCE, room)
    except PermissionError:
        sock.setsockopt(_SOL, socket.SO_RCVBUF, room)


def _has_grown(sock: socket.socket, before: int) -> bool:
    """Whether the queue takes more memory than before, or does so in a moment: packets come in by a softirq."""
    deadline = time.monotonic() + _ARRIVAL_S
    while held_bytes(sock) <= before:
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
