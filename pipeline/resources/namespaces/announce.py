"""Telling the neighbourhood where addresses are now: a gratuitous ARP request or an unsolicited advertisement each.

Switches learn from them which port leads to the MAC, and neighbours which MAC has the address. They are sent once,
as packets, by a visitor in the network; who misses them finds out when an entry of its own has aged.

Sources: packet(7), net/packet/af_packet.c (packet_release); RFC 826, RFC 5227 section 3 (ARP announcement); RFC 4861
section 4.4 (neighbour advertisement).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from pipeline.kernel.rtnetlink import attributes
from pipeline.resources.namespaces.links import Link

_UP, _NOARP = 0x1, 0x80
_ARP, _IPV6 = 0x0806, 0x86DD
_BROADCAST = b"\xff" * 6
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_ICMPV6, _ADVERTISEMENT, _OVERRIDE = 58, 136, 0x2000_0000
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MAC_BYTES = 6

#: index of the device, and a whole frame
Packet = tuple[int, bytes]


def packets(links: Iterable[Link], addresses: Sequence[bytes]) -> Iterator[Packet]:
    """An announcement for every address of these devices, as far as they are up and have neighbours.

    Args:
        links: the devices.
        addresses: payloads of RTM_NEWADDR.
    """
    for link in links:
        if not link.flags & _UP or link.flags & _NOARP or len(link.address) != _MAC_BYTES:
            continue
        for content in addresses:
            family, index = content[0], struct.unpack_from("<I", content, 4)[0]
            told = attributes(content[8:])
            address = told.get(_IFA_LOCAL, told.get(_IFA_ADDRESS, b""))
            if index != link.index:
                continue
            if family == socket.AF_INET and len(address) == 4:
                yield index, gratuitous_arp(link.address, address)
            elif family == socket.AF_INET6 and len(address) == 16:
                yield index, unsolicited_advertisement(link.address, address)


def gratuitous_arp(mac: bytes, address: bytes) -> bytes:
    """The frame that says that `address`, 4 bytes, is at `mac`."""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    return _BROADCAST + mac + struct.pack(">H", _ARP) + head + mac + address + bytes(6) + address


def unsolicited_advertisement(mac: bytes, address: bytes) -> bytes:
    """The frame that says that `address`, 16 bytes, is at `mac`."""
    body = struct.pack(">I", _OVERRIDE) + address + bytes([2, 1]) + mac
    pseudo = address + _ALL_NODES + struct.pack(">II", 4 + len(body), _ICMPV6)
    message = struct.pack(">BBH", _ADVERTISEMENT, 0, 0) + body
    checksum = _checksum(pseudo + message)
    message = struct.pack(">BBH", _ADVERTISEMENT, 0, checksum) + body
    head = struct.pack(">IHBB", 6 << 28, len(message), _ICMPV6, 255) + address + _ALL_NODES
    return _ALL_NODES_MAC + mac + struct.pack(">H", _IPV6) + head + message


def _checksum(content: bytes) -> int:
    total = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def send(found: Iterable[Packet]) -> int:
    """Send frames in the network of the caller; a device that does not take one has nobody to tell.

    Returns: the socket that they went through, which is the caller's: the kernel takes some 10 ms to close it, in which
        it waits until no processor looks at packets for it any more.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    for index, frame in found:
        with suppress(OSError):
            sock.bind((socket.if_indextoname(index), 0))
            sock.send(frame)
    return sock.detach()
