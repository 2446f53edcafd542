"""Whether a socket has joined multicast groups: the kernel has no call that lists them.

/proc/net/igmp and igmp6 list the groups of the network namespace; for each of them the
socket is asked for its source filter (MCAST_MSFILTER), which only a member has.

Source: ip(7), ipv6(7); net/ipv4/igmp.c (ip_mc_gsfget), net/ipv6/mcast.c.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall

_MCAST_MSFILTER = 48
#: struct group_filter without sources: interface, sockaddr_storage, mode, count
_FILTER_BYTES = 144
_NOT_A_MEMBER = frozenset({errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENODEV, errno.ENOPROTOOPT})


def _groups(family: int) -> Iterator[tuple[int, bytes]]:
    """(interface index, packed group) of every group that somebody in this network namespace has joined."""
    if family == socket.AF_INET:
        interface = 0
        with open("/proc/thread-self/net/igmp", encoding="ascii") as table:
            next(table)
            for line in table:
                words = line.split()
                if words[0].isdecimal():
                    interface = int(words[0])
                else:
                    yield interface, int(words[0], 16).to_bytes(4, "little")
        return
    with suppress(FileNotFoundError), open("/proc/thread-self/net/igmp6", encoding="ascii") as table:
        for line in table:
            words = line.split()
            yield int(words[0]), bytes.fromhex(words[2])


def joined(sock: socket.socket, family: int) -> Iterator[str]:
    """The groups that `sock` is a member of, as text; asks in the caller's network namespace."""
    level = socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6
    for interface, group in _groups(family):
        if family == socket.AF_INET:
            address = struct.pack("<HH4s", family, 0, group)
        else:
            address = struct.pack("<HHI16sI", family, 0, 0, group, interface)
        question = struct.pack("<I4x128sII", interface, address, 0, 0)
        buffer = ctypes.create_string_buffer(question, _FILTER_BYTES)
        length = ctypes.create_string_buffer(struct.pack("<i", _FILTER_BYTES), 4)
        try:
            syscall(NR.getsockopt, sock.fileno(), level, _MCAST_MSFILTER, buffer, length)
        except OSError as error:
            if error.errno not in _NOT_A_MEMBER:
                raise
        else:
            yield socket.inet_ntop(family, group)
