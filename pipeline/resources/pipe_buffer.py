"""What anonymous pipes and FIFOs have in common: one buffer between ends.

The kernel keeps one buffer per pipe inode: slots of a page each, whose number is the
capacity. What is in it is read without consuming: tee(2) duplicates the slots into a
pipe of our own, and that one is read. In packet mode (O_DIRECT) every write is a slot
marked as a packet, and one read returns at most one; then the packets are kept apart.
A pipe whose bytes were written partly with and partly without O_DIRECT, both kinds
unread, keeps its bytes and its packet ends, but plain bytes before a packet join it.

Source: pipe(7), tee(2), fs/pipe.c (`pipe_read`, `pipe_poll`, `pipe_set_size`).
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError, TargetError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, Index, OpenFile, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.paths import describe

_SPLICE_F_NONBLOCK = 2
#: most unread bytes of one pipe that travel in its record
MAX_UNREAD_BYTES = 16 << 20
_MAX_PACKETS = 1 << 16

#: every open end of one pipe: (index of the open file, a view of it)
Ends = Sequence[tuple[Index, FdView]]


class Buffer(Record, frozen=True, kw_only=True):
    """A pipe's buffer: number of bytes it holds at most, and what is unread.

    `unread` is one run of bytes, or where `packets` the packets in order.
    """

    capacity_bytes: U32
    packets: bool = False
    unread: Annotated[
        list[Annotated[bytes, Meta(max_length=MAX_UNREAD_BYTES)]], Meta(max_length=_MAX_PACKETS)
    ] = []


def reads(view: FdView) -> bool:
    """Whether `view` is an end to read from."""
    return view.flags & os.O_ACCMODE != os.O_WRONLY


def writes(view: FdView) -> bool:
    """Whether `view` is an end to write to."""
    return view.flags & os.O_ACCMODE != os.O_RDONLY


def unread_bytes(fd: int) -> int:
    """FIONREAD of a pipe."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, "little")


def ends(view: FdView, scope: CaptureScope) -> Ends:
    """Every open end in the tree of the pipe behind `view`, lowest index first; sorted out once a capture."""
    table: dict[tuple[int, int], list[tuple[Index, FdView]]] | None = scope.peers().get("pipes")
    if table is None:
        table = {}
        for index, end in sorted(scope.files(), key=lambda item: item[0]):
            if stat.S_ISFIFO(end.stat.st_mode) and not end.flags & os.O_PATH:
                table.setdefault((end.stat.st_dev, end.stat.st_ino), []).append((index, end))
        scope.peers()["pipes"] = table
    return table[view.stat.st_dev, view.stat.st_ino]


def has_writers(reader: FdView) -> bool:
    """Whether anybody could still write, as poll(2) on a reading end says (for FIFOs: or nobody ever did)."""
    return not _poll(reader) & select.POLLHUP


def has_readers(writer: FdView) -> bool:
    """Whether anybody could still read, as poll(2) on a writing end says."""
    return not _poll(writer) & select.POLLERR


def _poll(view: FdView) -> int:
    poll = select.poll()
    poll.register(view.local, 0)
    return sum(event for _, event in poll.poll(0))


def outside_ends(view: FdView, scope: CaptureScope, one_sided: bool) -> Iterator[Blocker]:
    """What says that the pipe has an end outside the tree.

    Args:
        one_sided: whether an end that poll reports but the tree lacks must be outside the tree.
    """
    others = outside.same_link(view, scope)
    remedy = (
        f"redirect it, include its holder, or let the destination give it: --external-fd '{name_of(view)}'"
    )
    yield from outside.blockers(view, others, "an end of the pipe is held by", remedy)
    group = ends(view, scope)
    if one_sided and not others and not scope.unseen:
        who = "outside the tree: in a process not visible here or that dumps, or in flight in a socket"
        if not any(writes(end) for _, end in group) and has_writers(view):
            yield Blocker(view.subject, f"the writing end of the pipe is open {who}", remedy)
        if not any(reads(end) for _, end in group) and has_readers(view):
            yield Blocker(view.subject, f"the reading end of the pipe is open {who}", remedy)


def name_of(view: FdView) -> str:
    """By which a person names a pipe or FIFO: ``pipe:[123]``, ``fifo:/path``."""
    return ("fifo:" if view.link.startswith(b"/") else "") + os.fsdecode(view.link)


def check(view: FdView) -> Iterator[Blocker]:
    """What stops the buffer of a pipe from being made again."""
    size = unread_bytes(view.local)
    if size > MAX_UNREAD_BYTES:
        yield Blocker(
            view.subject, f"{size} unread bytes in a pipe, more than {MAX_UNREAD_BYTES}", "read them", True
        )
    capacity = fcntl.fcntl(view.local, fcntl.F_GETPIPE_SZ)
    copy = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(copy[1], fcntl.F_SETPIPE_SZ, capacity)
    except OSError as error:
        why = f"a pipe with a capacity of {capacity} bytes cannot be made here: {error.strerror}"
        yield Blocker(view.subject, why, "raise /proc/sys/fs/pipe-max-size or pipe-user-pages-soft")
    finally:
        _close_all(copy)


def capture(group: Ends) -> Buffer:
    """Capacity and unread bytes of a pipe; nothing is consumed.

    Raises:
        TargetError: the pipe changed meanwhile.
    """
    capacity = fcntl.fcntl(group[0][1].local, fcntl.F_GETPIPE_SZ)
    reader = next((end for _, end in group if reads(end)), None)
    if reader is None:  # nobody can ever read what is in it
        return Buffer(capacity_bytes=capacity)
    size = unread_bytes(reader.local)
    if not size:
        return Buffer(capacity_bytes=capacity)
    copy = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(copy[1], fcntl.F_SETPIPE_SZ, capacity)
        copied = syscall(NR.tee, reader.local, copy[1], MAX_UNREAD_BYTES, _SPLICE_F_NONBLOCK)
        if copied != size:
            raise TargetError(
                f"{reader.subject}: {copied} of {size} bytes of the pipe were read; somebody uses it"
            )
        pieces: list[bytes] = []
        while size:
            pieces.append(os.read(copy[0], size))
            size -= len(pieces[-1])
    finally:
        _close_all(copy)
    packets = len(pieces) > 1 or any(end.flags & os.O_DIRECT for _, end in group if writes(end))
    return Buffer(capacity_bytes=capacity, packets=packets, unread=pieces)


def refill(file: OpenFile, record: Buffer, writer: LocalFd) -> None:
    """Give a new pipe the capacity and the unread bytes of the old one.

    Args:
        writer: an end to write to; its status flags are as before afterwards.

    Raises:
        RebuildError: the capacity is not granted here, or the bytes do not fit.
    """
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    try:
        if fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) != record.capacity_bytes:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, record.capacity_bytes)
        fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK | (os.O_DIRECT if record.packets else 0))
        for piece in record.unread:
            if os.write(writer, piece) != len(piece):
                raise RebuildError(
                    f"{describe(file)}: {len(piece)} unread bytes do not fit into the new pipe"
                )
    except OSError as error:
        sizes = f"{record.capacity_bytes} bytes of capacity, {sum(map(len, record.unread))} unread"
        raise RebuildError(f"{describe(file)} ({sizes}) cannot be filled again: {error.strerror}") from error
    finally:
        fcntl.fcntl(writer, fcntl.F_SETFL, flags)


def _close_all(pair: tuple[int, int]) -> None:
    for fd in pair:
        os.close(fd)
