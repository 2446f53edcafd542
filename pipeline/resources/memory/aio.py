"""Contexts of asynchronous I/O (io_setup(2)), each of which shows itself as a mapping, ``/[aio]``.

The kernel holds: a ring of completion events in pages that the program has mapped; the *address of that mapping
is the identifier* of the context. The ring begins with a header (its number in the kernel's table, events it has room
for, head, tail, a magic number); the kernel keeps a tail of its own, and takes the head from the ring. How many
requests are in flight is told nowhere.

A context is made with a ring of the same size, and moved (mremap(2)) to where it was, which the kernel takes as its
new identifier. The kernel's tail is brought to its place by as many requests that end at once (reads of an empty
file); those before the head are collected, so that as many slots are taken as were. Then the unread events are put
into their slots.

In flight: requests of a frozen program come to their end by themselves, and their events arrive in its ring. So
rings are looked at again while the program stands still, until none has changed for `QUIET_S`. Each disk of files that
the tree has open with O_DIRECT, of which requests are really in flight, has to be seen idle before that, as no earlier
request can be left then; one that never is, is waited for as long as `BUSY_S`.
A request that waits for a file to become ready (IOCB_CMD_POLL) may wait for ever. Events that a ring still holds,
read ones too, lead to the requests they were of: if one was such a poll, the program is refused.

Not preserved: the number of a ring in the kernel's table; how much of aio-max-nr a context is counted as, which may
be less than what io_setup was asked for; events that were read already. Not seen: a request that takes longer than
that on something that is no disk, and the first poll of a context, while it waits.
A child of fork(2) has the mapping but not the context: it keeps what it sees, as memory.

Sources: io_setup(2), io_submit(2), io_getevents(2); fs/aio.c: aio_setup_ring, aio_ring_mremap, aio_complete,
refill_reqs_available, lookup_ioctx, aio_poll.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipeline.errors import Blocker, ImageError, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import AddressSpace, AioRing, Vma
from pipeline.kernel import smaps
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.inside import open_file
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call, In, Out
from pipeline.remote.puppet import Puppet
from pipeline.resources.kinds import FdView
from pipeline.resources.memory.classify import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE
from pipeline.resources.memory.scope import CannotCarry
from pipeline.resources.support import Support

NAME = b"/[aio] (deleted)"
#: how long rings have to be unchanged
QUIET_S = 0.05
#: how long a disk may be busy
BUSY_S = 1.0
#: how long events may go on to arrive
SETTLE_S = 4.0
_LOOK_S = 0.001

_PART, _WHOLE = "is a part of a ring of asynchronous I/O", "leave the ring whole"
_MAGIC = 0xA10A10A1
#: id, room, head, tail, magic, compatible and incompatible features, bytes of the header
_HEADER = struct.Struct("<8I")
#: data, address of the struct iocb, two results
_EVENT = struct.Struct("<2Q2q")
#: struct iocb: data, key, rw_flags, opcode, priority, descriptor, buffer, bytes, offset, reserved, flags, resfd
_REQUEST = struct.Struct("<Q2IHhI2QqQ2I")
_IOCB_CMD_PREAD, _IOCB_CMD_POLL = 0, 5
_MREMAP_MAYMOVE_FIXED = 1 | 2
_EVENTS_PER_PAGE = PAGE_BYTES // _EVENT.size
#: requests that are given to the kernel at once
_BATCH = 64


SUPPORT = Support(
    kind="asynchronous I/O",
    carried=("contexts under their numbers, with rings, head, tail and unread events",),
    refused=("polls (IOCB_CMD_POLL) that may be in flight; a ring that is not whole",),
    shown_by=("programs/rings.py", "resources/test_aio.py"),
)


def room(pages: int) -> int:
    """How many slots a ring of this size has; one of them is always free."""
    return pages * _EVENTS_PER_PAGE - 1


def slots(ring: AioRing) -> list[int]:
    """The slots of its unread events, the oldest first."""
    size = room(ring.pages)
    return [(ring.head + n) % size for n in range((ring.tail - ring.head) % size)]


# -- capturing ---------------------------------------------------------------------------------


def question(mapping: smaps.Mapping) -> Call:
    """Asks a task whether a mapping is a context of its process (0), or only left of one: reads no event."""
    return Call(NR.io_getevents, (mapping.start, 0, 0, 0, 0), may_fail=True)


def capture(pid: HostPid, mapping: smaps.Mapping) -> AioRing:
    """The ring that `mapping` shows.

    Raises:
        CannotCarry: it is not whole, or a request may wait for ever.
        OSError: it may not be read.
    """
    if mapping.offset:
        raise CannotCarry(_PART, _WHOLE)
    return _look(pid, mapping.start, (mapping.end - mapping.start) // PAGE_BYTES)


def _look(pid: HostPid, start: int, pages: int) -> AioRing:
    memory = open_file(pid, "mem", os.O_RDONLY)
    try:
        content = os.pread(memory, pages * PAGE_BYTES, start)
        _, count, head, tail, magic, *_ = _HEADER.unpack_from(content)
        if len(content) != pages * PAGE_BYTES or count != room(pages) or magic != _MAGIC:
            raise CannotCarry(_PART, _WHOLE)
        head, tail = head % count, tail % count
        if any(_polled(memory, content)):
            raise CannotCarry(
                "is a ring of asynchronous I/O that is used to poll (IOCB_CMD_POLL): what waits in it cannot be seen",
                "let the program use epoll (Seastar: --reactor-backend=epoll)",
            )
    finally:
        os.close(memory)
    ring = AioRing(start, pages, head, tail)
    events = (content[at : at + _EVENT.size] for at in map(_place, slots(ring)))
    return AioRing(start, pages, head, tail, b"".join(events))


def _place(slot: int) -> int:
    return _HEADER.size + slot * _EVENT.size


def _polled(memory: int, content: bytes) -> Iterator[bool]:
    """Of the request behind each event in a ring: whether it was a poll, as far as its memory still says so."""
    requests = {request for _, request, _, _ in _EVENT.iter_unpack(content[_HEADER.size :]) if request}
    for address in requests:
        try:
            request = os.pread(memory, _REQUEST.size, address)
        except (OSError, OverflowError):  # freed since then
            continue
        if len(request) == _REQUEST.size:
            _, key, how, opcode, _, _, events, size, offset, reserved, _, _ = _REQUEST.unpack(request)
            rest = key | how | size | offset | reserved | events >> 16
            yield opcode == _IOCB_CMD_POLL and not rest


def settle(
    rings: Mapping[int, tuple[HostPid, Sequence[AioRing]]], views: Iterable[FdView]
) -> tuple[dict[int, list[AioRing]], list[Blocker]]:
    """Wait until no event arrives any more in the rings of a frozen tree.

    Args:
        rings: of each space, with its process, as they were.
        views: the open files of the tree.

    Returns:
        The rings of each space as they are now; and those in which events never ceased to arrive.
    """
    disks = {view.stat.st_dev for view in views if view.flags & os.O_DIRECT} if rings else set()
    now = {space: list(found) for space, (_, found) in rings.items()}
    deadline = time.monotonic() + SETTLE_S
    while rings:
        for device in disks:
            _await_idle(device)
        time.sleep(QUIET_S)
        before, now = now, {}
        for space, (pid, found) in rings.items():
            try:
                now[space] = [_look(pid, one.start, one.pages) for one in found]
            except CannotCarry as refusal:  # a poll has ended meanwhile
                return before, [refusal.blocker(f"pid {pid} mapping {found[0].start:x}")]
        if now == before:
            break
        if time.monotonic() > deadline:
            why = "asynchronous I/O is in flight: its events arrive although the program stands still"
            moving = (space for space in now if now[space] != before[space])
            return now, [
                Blocker(f"pid {rings[space][0]}", why, "try again", transient=True) for space in moving
            ]
    return now, []


def _await_idle(device: int) -> None:
    """Wait until a disk has nothing in flight; does nothing for what is no disk, or not told."""
    deadline = time.monotonic() + BUSY_S
    while time.monotonic() < deadline:
        try:
            with open(
                f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/inflight", encoding="ascii"
            ) as file:
                if not any(map(int, file.read().split())):
                    return
        except OSError:
            return
        time.sleep(_LOOK_S)


# -- rebuilding ------------------------------------------------------------------------------------


def check(space: AddressSpace) -> None:
    """See that the rings of an image are possible, and that each is the ring of a mapping.

    Raises:
        ImageError: says which is not.
    """
    mapped = {vma.start: vma for vma in space.vmas if vma.kind == "aio"}
    if sorted(mapped) != sorted(ring.start for ring in space.rings):
        raise ImageError(f"space {space.space}: rings of asynchronous I/O without a mapping, or the reverse")
    for ring in space.rings:
        vma, size = mapped[ring.start], room(ring.pages)
        fits = vma.end - vma.start == ring.pages * PAGE_BYTES and max(ring.head, ring.tail) < size
        if not fits or len(ring.events) != len(slots(ring)) * _EVENT.size:
            raise ImageError(f"space {space.space}: the ring at {ring.start:x} does not fit together")


def rebuild(space: AddressSpace, puppet: Puppet) -> None:
    """Make all contexts of a process. It has its descriptors, and all its children are born.

    Raises:
        RebuildError: the kernel refuses a ring of this size.
        ImageError: see `check`.
    """
    if not space.rings:
        return
    check(space)
    mapped = {vma.start: vma for vma in space.vmas if vma.kind == "aio"}
    empty = LocalFd(os.memfd_create("nothing", os.MFD_CLOEXEC))
    LEDGER.take("owned descriptor", empty)
    try:
        (number,) = puppet.send_fds([empty])
    finally:
        os.close(empty)
        LEDGER.give_back("owned descriptor", empty)
    for ring in space.rings:
        try:
            _make(ring, mapped[ring.start], puppet, number)
        except OSError as error:
            raise RebuildError(
                f"the ring of asynchronous I/O at {ring.start:x} cannot be made: {error.strerror} "
                "(see /proc/sys/fs/aio-max-nr)"
            ) from error
    puppet.syscall(NR.close, number)


def _make(ring: AioRing, vma: Vma, puppet: Puppet, empty: int) -> None:
    size = ring.pages * PAGE_BYTES
    # taken, so that the ring is made elsewhere: a mapping cannot be moved to where it overlaps itself
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    puppet.syscall(NR.mmap, ring.start, size, 0, flags, -1, 0)
    made = Out(8)
    # the smallest number that gives a ring of so many pages: twice as many events, and two
    puppet.syscall(NR.io_setup, max(1, (ring.pages - 1) * _EVENTS_PER_PAGE // 2), made)
    at = int.from_bytes(made.data, "little")
    header = os.pread(puppet.memory, _HEADER.size, at)
    found = _HEADER.unpack(header)[1]
    if found != room(ring.pages):
        raise RebuildError(
            f"the ring of asynchronous I/O at {ring.start:x} has room for {room(ring.pages)} events; this host, with "
            f"another number of processors, makes one of {found}"
        )
    puppet.syscall(NR.mremap, at, size, size, _MREMAP_MAYMOVE_FIXED, ring.start)
    _advance(ring, ring.head, puppet, empty, collected=True)
    _advance(ring, len(slots(ring)), puppet, empty, collected=False)
    for n, slot in enumerate(slots(ring)):
        event = ring.events[n * _EVENT.size : (n + 1) * _EVENT.size]
        os.pwrite(puppet.memory, event, ring.start + _place(slot))
    header = os.pread(puppet.memory, _HEADER.size, ring.start)
    if _HEADER.unpack(header)[2:4] != (ring.head, ring.tail):
        raise RebuildError(f"the ring of asynchronous I/O at {ring.start:x} does not take its place")
    puppet.syscall(NR.mprotect, ring.start, size, vma.prot)


def _advance(ring: AioRing, count: int, puppet: Puppet, empty: int, *, collected: bool) -> None:
    """Let `count` requests end at once, and collect their events unless they stand for unread ones."""
    request = In([_REQUEST.pack(0, 0, 0, _IOCB_CMD_PREAD, 0, empty, 0, 0, 0, 0, 0, 0)])
    calls: list[Call] = []
    for start in range(0, count, _BATCH):
        wanted = min(_BATCH, count - start)
        pointers: Sequence[In] = [request] * wanted
        calls.append(Call(NR.io_submit, (ring.start, wanted, In(pointers)), name="io_submit"))
        if collected:
            calls.append(
                Call(
                    NR.io_getevents,
                    (ring.start, wanted, wanted, Out(wanted * _EVENT.size), 0),
                    name="collect",
                )
            )
    puppet.run_checked(calls)
    ended = sum(call.result for call in calls if call.number == NR.io_submit)
    if ended != count:
        raise RebuildError(
            f"the ring of asynchronous I/O at {ring.start:x} takes {ended} of {count} requests"
        )
