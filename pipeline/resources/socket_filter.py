"""Classic packet filters of sockets (SO_ATTACH_FILTER): read as the program gave them, and attached again.

The kernel keeps the original instructions of a classic filter beside what it made of them. Those of
an extended one (SO_ATTACH_BPF) it does not give back: refused. Refused too: filters of unix sockets, whose
queues are filled by sending, which a filter would judge a second time.

Source: socket(7); Documentation/networking/filter.rst; net/core/filter.c (sk_get_filter).
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterator

from pipeline.errors import Blocker
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.socket_identity import Identity

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
#: struct sock_filter; a filter has 4096 of them at most
_INSTRUCTION_BYTES = 8
LONGEST_BYTES = 4096 * _INSTRUCTION_BYTES


def check(sock: socket.socket, who: Identity, subject: str) -> Iterator[Blocker]:
    """What stops the filter of a socket from being carried."""
    try:
        length = _ask(sock, None, 0)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        yield Blocker(
            subject,
            "an extended packet filter (SO_ATTACH_BPF) is attached, which nobody can read",
            "detach it",
        )
        return
    if length and who.family == socket.AF_UNIX:
        yield Blocker(subject, "a packet filter (SO_ATTACH_FILTER) is attached to a unix socket", "detach it")


def read(sock: socket.socket) -> bytes:
    """The instructions of the classic filter; empty if there is none.

    Raises:
        OSError: EACCES: it is an extended one.
    """
    length = _ask(sock, None, 0)
    if not length:
        return b""
    buffer = ctypes.create_string_buffer(length * _INSTRUCTION_BYTES)
    count = _ask(sock, buffer, length)
    return buffer.raw[: count * _INSTRUCTION_BYTES]


def _ask(sock: socket.socket, buffer: ctypes.Array[ctypes.c_char] | None, length: int) -> int:
    """getsockopt counts in instructions; asked for none it only says how many there are."""
    counted = ctypes.create_string_buffer(struct.pack("<i", length), 4)
    syscall(
        NR.getsockopt,
        sock.fileno(),
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        0 if buffer is None else buffer,
        counted,
    )
    return int(struct.unpack("<i", counted.raw)[0])


def attach(sock: socket.socket, instructions: bytes) -> None:
    """Attach a classic filter; none: detach it.

    Raises:
        OSError: EINVAL: the kernel does not take these instructions.
    """
    if not instructions:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        return
    count, rest = divmod(len(instructions), _INSTRUCTION_BYTES)
    if rest:
        raise OSError(errno.EINVAL, "these are no instructions of a packet filter")
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("<H6xQ", count, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
