"""Unread messages of unix sockets: looked at without taking them, with the files in flight in them.

SO_PEEK_OFF makes MSG_PEEK walk through the queue, SO_PASSCRED makes it tell who sent a message, also one that came
before the program asked for that; who walks has to give both back (`pipeline.resources.unix_look`). Each
look at a message that carries descriptors (SCM_RIGHTS) gives duplicates of the files, which
are the caller's. A stream glues bytes to the message behind them, up to the end of one with
descriptors; where that one begins is found by looking at fewer and fewer bytes, because whoever reads
its first byte gets the descriptors.

An out-of-band byte is found where a look stops for no other reason: there is the mark. A mark stays when
the byte was taken by MSG_OOB; one behind the last unread byte is seen by nobody until those are read.

A message of length zero is found by the first walk only. One that was looked at before (by the program, or for a dump
that came to nothing) is refused where it comes first, and seen by nobody where it comes behind others.

Source: unix(7), socket(7); net/unix/af_unix.c (unix_stream_read_generic, manage_oob), net/core/datagram.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import termios
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker, Refused
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.unix_state import raw_name

SO_PEEK_OFF = 42
_SCM_RIGHTS = 1
_SCM_CREDENTIALS = 2
_SCM_PIDFD = 4
_SIOCATMARK = 0x8905
_CONTROL_BYTES = 8192
_UCRED = struct.Struct("<iII")
_LOOK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

#: `urgent`: an out-of-band byte; `passed`: the mark of one that was taken already
Mark = Literal["", "urgent", "passed"]


class Unread(msgspec.Struct, frozen=True):
    """One unread message, or unread bytes of a stream; all ids as they are seen here.

    Args:
        data: its bytes.
        sender: name of the socket it came from (datagrams).
        who: pid, uid and gid of who sent it, where the message tells; pid 0 for a process that is not seen here.
        files: what is in flight with it: duplicates, or the indexes of the open files once they are known.
        mark: see `Mark`.
    """

    data: bytes
    sender: bytes = b""
    who: tuple[int, int, int] | None = None
    files: tuple[int, ...] = ()
    mark: Mark = ""


class TooSmall(Exception):
    """A message did not fit into the buffer."""


def bytes_to_read(sock: socket.socket) -> int:
    """Unread bytes of a stream or seqpacket socket; of a datagram socket the length of the first message."""
    (count,) = struct.unpack("<i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    return int(count)


def too_many(subject: str) -> Refused:
    """Descriptors did not arrive."""
    why = "what is in flight in its queue cannot be held here: too many descriptors (RLIMIT_NOFILE)"
    return Refused([Blocker(subject, why, "raise the limit of the pipeline (ulimit -n)")])


class Walk:
    """One walk through a queue."""

    def __init__(self, sock: socket.socket, size: int, subject: str, with_files: bool) -> None:
        self.found: list[Unread] = []
        self._sock, self._subject, self._with_files = sock, subject, with_files
        self._buffer = bytearray(size)
        self._stream = sock.type == socket.SOCK_STREAM
        self._nobody = _nobody()
        self._urgent = self._stream and bool(_polled(sock) & select.POLLPRI)

    def close(self) -> None:
        """Give back every descriptor that was found."""
        while self.found:
            give_back(self.found.pop().files)

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """SO_PEEK_OFF and SO_PASSCRED are ours meanwhile."""
        before = self._sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        asked = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._seek(0)
            yield
        finally:
            self._seek(before)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, asked)

    def _seek(self, offset: int) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)

    def run(self) -> None:
        """Walk."""
        if self._stream:
            self._run_stream()
            return
        while (unread := self.next(len(self._buffer))) is not None:
            self.found.append(unread)
        if self.found and not self.found[0].data:
            return
        self._seek(-1)
        first = self.next(len(self._buffer))
        if first is not None:
            give_back(first.files)
            if not first.data:
                why = "an empty message that was looked at before (MSG_PEEK) waits to be read, and perhaps others do"
                raise Refused([Blocker(self._subject, why, "wait until it is read", transient=True)])

    def _run_stream(self) -> None:
        left, seen = bytes_to_read(self._sock), 0
        placed = not self._urgent
        cut = False  # the next byte is the urgent one
        if at_mark(self._sock):
            cut = self._urgent and bool(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE))
            if not self._urgent:
                self.found.append(Unread(b"", mark="passed"))
            elif not cut:  # looks at the head leave it out
                byte = self._sock.recv(1, socket.MSG_OOB | socket.MSG_PEEK | socket.MSG_DONTWAIT)
                self.found.append(Unread(byte, mark="urgent"))
                left, placed = left - 1, True
        before: Unread | None = None
        while seen < left:
            self._seek(seen)
            # behind an urgent byte stops what cannot be copied: else its look would find descriptors further behind
            unread = self.next(1, stop=True) if cut else self.next(left - seen)
            if unread is None or not unread.data:
                break  # an error may be pending behind the bytes
            if not cut and before is not None and _stoppedat_mark(before, unread):
                if not placed:
                    give_back(unread.files)
                    cut = True
                    continue
                if not self._urgent:
                    self.found.append(Unread(b"", mark="passed"))
            if cut:
                cut, placed = False, True
                unread = replace(unread, mark="urgent")
            self.found.append(unread)  # given back from now on if anything fails
            if unread.files and not unread.mark:
                self._separate(seen, unread)
            seen += len(unread.data)
            before = unread
        if not placed:
            why = "out-of-band data waits to be read, and where it is in the queue cannot be told"
            raise Refused([Blocker(self._subject, why, "wait until it is read", transient=True)])

    def _separate(self, start: int, last: Unread) -> None:
        """Bytes before those that the descriptors of the last message were sent with are a message of their own.

        However few bytes are asked for, descriptors come. But the kernel copies one message at a time, and stops
        at one that cannot be copied whole, because its last byte may not be written: then they do not come.
        """
        self._seek(start)
        fits = memoryview(self._buffer)[: len(last.data) - 1]
        try:
            before, control, _, _ = self._sock.recvmsg_into([fits, _unwritable()], _CONTROL_BYTES, _LOOK)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return  # it is the only one
        give_back(_interpret(b"", control, self._nobody).files)
        self.found[-1:] = [
            replace(last, data=last.data[:before], files=()),
            replace(last, data=last.data[before:]),
        ]

    def next(self, size: int, stop: bool = False) -> Unread | None:
        """The message at the current offset, as far as `size` bytes of it; None at the end."""
        buffers = [memoryview(self._buffer)[:size], *([_unwritable()] if stop else [])]
        try:
            length, control, flags, sender = self._sock.recvmsg_into(buffers, _CONTROL_BYTES, _LOOK)
        except BlockingIOError:
            return None
        if not length and not control:
            return None  # the end: a message, however empty, comes with what SO_PASSCRED asks for
        unread = _interpret(bytes(self._buffer[:length]), control, self._nobody)
        if not self._stream:
            unread = replace(unread, sender=raw_name(sender))
        if flags & socket.MSG_CTRUNC or (unread.files and not self._with_files):
            give_back(unread.files)
            raise too_many(self._subject)
        if flags & socket.MSG_TRUNC:
            give_back(unread.files)
            raise TooSmall
        return unread


@cache
def _unwritable() -> memoryview:
    """A buffer of one byte, which the kernel fails to write to (EFAULT)."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    syscall(NR.mprotect, ctypes.addressof(ctypes.c_char.from_buffer(page)), mmap.PAGESIZE, 0)
    return memoryview(page)[:1]


def _interpret(data: bytes, control: list[tuple[int, int, bytes]], nobody: tuple[int, int]) -> Unread:
    """A message and what came with it; pidfds of senders are closed once they have told who it was."""
    files: tuple[int, ...] = ()
    who: tuple[int, int, int] | None = None
    has_ended = False
    for level, kind, value in control:
        if level != socket.SOL_SOCKET:
            continue
        if kind == _SCM_RIGHTS:
            files += struct.unpack(f"<{len(value) // 4}i", value[: len(value) & ~3])
        elif kind == _SCM_PIDFD and len(value) == 4:
            (fd,) = struct.unpack("<i", value)
            if fd >= 0:  # the kernel says an error here where it has none to give
                with os.fdopen(fd):
                    told = int(procfs.fdinfo(HostPid(os.getpid()), fd).get("Pid", ["-1"])[0])
                has_ended = told <= 0  # and its pid may be somebody else's by now
        elif kind == _SCM_CREDENTIALS:
            pid, uid, gid = _UCRED.unpack(value[: _UCRED.size])
            if pid or (uid, gid) != nobody:
                who = pid, uid, gid
    if who is not None and has_ended:
        who = 0, *who[1:]
    return Unread(data, who=who, files=files)


def _nobody() -> tuple[int, int]:
    """What the kernel answers for ids that nobody has told."""
    found = []
    for name in ("overflowuid", "overflowgid"):
        with open(f"/proc/sys/kernel/{name}", "rb") as file:
            found.append(int(file.read()))
    return found[0], found[1]


def give_back(duplicates: Iterable[int]) -> None:
    """Close what came with a message."""
    for fd in duplicates:
        os.close(fd)


def _stoppedat_mark(before: Unread, after: Unread) -> bool:
    """Whether nothing but a mark can have been why two pieces of a stream were not given at once."""
    unseen = before.who is not None and not before.who[0]  # one of several, perhaps
    return not (before.files or before.mark or unseen or before.who != after.who)


def _polled(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLPRI | select.POLLRDHUP)
    return sum(found for _, found in poll.poll(0))


def at_mark(sock: socket.socket) -> bool:
    """Whether an out-of-band byte, or the mark of one, comes next."""
    try:
        (answer,) = struct.unpack("<i", fcntl.ioctl(sock, _SIOCATMARK, bytes(4)))
    except OSError:  # a kernel without out-of-band data for unix sockets
        return False
    return bool(answer)
