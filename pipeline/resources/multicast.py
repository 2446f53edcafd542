"""Multicast groups that a socket has joined: found by asking for each, as the kernel has no call that lists them.

/proc/net/igmp and igmp6 list the groups of a network; for each of them the socket is asked for its
source filter (MCAST_MSFILTER), which only a member has. A group is kept with the name of its device, the mode
of its filter, and the sources.

Refused: what is joined or leased by sockets without the kernel saying by which: addresses joined as anycast
(IPV6_JOIN_ANYCAST) and leases of flow labels (IPV6_FLOWLABEL_MGR), where the network has some.

Source: ip(7), ipv6(7); net/ipv4/igmp.c (ip_mc_gsfget), net/ipv6/mcast.c, net/ipv6/anycast.c,
net/ipv6/ip6_flowlabel.c.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.image.schema import Index
from pipeline.kernel import interfaces
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.userns.visit import read_file

_JOIN_GROUP, _BLOCK_SOURCE, _JOIN_SOURCE_GROUP, _MSFILTER = 42, 43, 46, 48
_EXCLUDE = 0
_STORAGE_BYTES = 128
#: struct group_filter without sources: interface, sockaddr_storage, mode, count
_FILTER_BYTES = 144
_MOST_SOURCES = 1024
_NOT_A_MEMBER = frozenset({errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENODEV, errno.ENOPROTOOPT})
_TABLES = ("igmp", "igmp6", "anycast6", "ip6_flowlabel", "if_inet6")
_PROCESS_SHARE = "2"

Host = Annotated[bytes, Meta(min_length=4, max_length=16)]


class Membership(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One group, packed, joined on device `interface`: all sources but `sources`, or (`only`) these alone."""

    interface: Annotated[bytes, Meta(max_length=15)]
    group: Host
    only: bool = False
    sources: Annotated[list[Host], Meta(max_length=_MOST_SOURCES)] = []


Memberships = Annotated[list[Membership], Meta(max_length=4096)]


def _tables(netns: Index, scope: CaptureScope) -> dict[str, list[list[str]]]:
    """The words of each line of the tables of a network, by table; read once."""
    known: dict[str, list[list[str]]] | None = scope.peers().get(("groups", netns))
    if known is not None:
        return known

    def look() -> bytes:
        texts = []
        for name in _TABLES:
            try:
                texts.append(read_file(f"/proc/thread-self/net/{name}"))
            except FileNotFoundError:  # no IPv6 here
                texts.append(b"")
        return b"\0".join(texts)

    texts = scope.look_in_network(netns, look).decode("ascii", "replace").split("\0")
    known = {
        name: [line.split() for line in text.splitlines()] for name, text in zip(_TABLES, texts, strict=True)
    }
    scope.peers()["groups", netns] = known
    return known


def _groups(tables: dict[str, list[list[str]]], family: int) -> Iterator[tuple[int, bytes]]:
    """(interface index, packed group) of every group that somebody in this network has joined."""
    if family == socket.AF_INET:
        interface = 0
        for words in tables["igmp"][1:]:
            if words[0].isdecimal():
                interface = int(words[0])
            else:
                yield interface, int(words[0], 16).to_bytes(4, "little")
        return
    for words in tables["igmp6"]:
        yield int(words[0]), bytes.fromhex(words[2])


def _address(host: bytes, interface: int = 0) -> bytes:
    if len(host) == 4:
        packed = struct.pack("<HH4s", socket.AF_INET, 0, host)
    else:
        packed = struct.pack("<HHI16sI", socket.AF_INET6, 0, 0, host, interface)
    return packed.ljust(_STORAGE_BYTES, b"\0")


def _host(family: int, storage: bytes) -> bytes:
    return storage[4:8] if family == socket.AF_INET else storage[8:24]


def _families(sock: socket.socket) -> Sequence[int]:
    """The protocols under which `sock` can have joined groups: an IPv6 socket may join those of IPv4 too."""
    return (socket.AF_INET,) if sock.family == socket.AF_INET else (socket.AF_INET, socket.AF_INET6)


def _level(family: int) -> int:
    return socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6


def _ask(sock: socket.socket, family: int, interface: int, group: bytes) -> tuple[int, list[bytes]] | None:
    """Mode and sources with which `sock` is a member of a group; None: it is not."""
    slots = 0
    while True:
        question = struct.pack("<I4x128sII", interface, _address(group, interface), 0, slots)
        size = _FILTER_BYTES + slots * _STORAGE_BYTES
        buffer = ctypes.create_string_buffer(question, size)
        length = ctypes.create_string_buffer(struct.pack("<i", size), 4)
        try:
            syscall(NR.getsockopt, sock.fileno(), _level(family), _MSFILTER, buffer, length)
        except OSError as error:
            if error.errno not in _NOT_A_MEMBER:
                raise
            return None
        mode, count = struct.unpack_from("<II", buffer.raw, _FILTER_BYTES - 8)
        if count <= slots:
            found = buffer.raw[_FILTER_BYTES:]
            return mode, [_host(family, found[n * _STORAGE_BYTES :]) for n in range(count)]
        slots = count


def check(view: FdView, sock: socket.socket, netns: Index, scope: CaptureScope) -> Iterator[Blocker]:
    """What sockets of this network hold, and which of them the kernel does not tell."""
    if sock.family != socket.AF_INET6:
        return
    tables = _tables(netns, scope)
    own = [
        ipaddress.IPv6Interface((bytes.fromhex(words[0]), int(words[2], 16))).network.network_address.packed
        for words in tables["if_inet6"]
    ]
    for words in tables["anycast6"]:
        address = bytes.fromhex(words[2])
        if address not in own:  # that of the routers of a network is the kernel's
            yield Blocker(
                view.subject,
                f"a socket of its network has joined anycast address {socket.inet_ntop(socket.AF_INET6, address)}, "
                "and the kernel does not tell which",
                "leave it",
            )
    for words in tables["ip6_flowlabel"][1:]:
        if words[1] != _PROCESS_SHARE or scope.member(int(words[2])):
            yield Blocker(
                view.subject,
                f"a socket of its network has leased IPv6 flow label {words[0]}, and the kernel does not tell which",
                "give it back",
            )


def capture(sock: socket.socket, netns: Index, scope: CaptureScope) -> list[Membership]:
    """The groups that `sock` is a member of."""
    tables = _tables(netns, scope)
    found = []
    for family in _families(sock):
        for interface, group in dict.fromkeys(_groups(tables, family)):
            answer = _ask(sock, family, interface, group)
            if answer is not None:
                mode, sources = answer
                found.append(
                    Membership(interfaces.name_of(sock, interface), group, mode != _EXCLUDE, sources)
                )
    return found


def join(sock: socket.socket, memberships: Sequence[Membership], subject: str) -> None:
    """Join recorded groups.

    Raises:
        RebuildError: a device is not here, or the kernel does not allow it; names the group.
    """
    for one in memberships:
        family = socket.AF_INET if len(one.group) == 4 else socket.AF_INET6
        try:
            index = interfaces.number_of(sock, one.interface)
            request = struct.pack("<I4x", index) + _address(one.group, index)
            if not one.only:
                sock.setsockopt(_level(family), _JOIN_GROUP, request)
            for source in one.sources:
                number = _JOIN_SOURCE_GROUP if one.only else _BLOCK_SOURCE
                sock.setsockopt(_level(family), number, request + _address(source, index))
        except OSError as error:
            shown = one.group.hex() if len(one.group) not in (4, 16) else socket.inet_ntop(family, one.group)
            raise RebuildError(
                f"{subject}: cannot join multicast group {shown} on {os.fsdecode(one.interface)}: {error.strerror}"
            ) from error
