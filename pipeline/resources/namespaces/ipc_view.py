"""Looking at an ipc namespace: a visitor lists its System V objects, and copies what they hold without changing it.

Messages are read with MSG_COPY, which leaves them in their queue; segments through a mapping of the visitor's own,
or, by root, through a descriptor of that mapping, so that they are not copied at all. Those of POSIX queues are taken
and put back, see `pipeline.resources.namespaces.posix_queues`.

Refused by name: ids that have no number where the visitor is (a plain user's has to be in the owning user namespace),
and segments of huge pages.

Sources: sysvipc(7), shmctl(2), semctl(2), msgrcv(2) on MSG_COPY, mq_overview(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import Id
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.kernel.syscalls import CLONE, syscall, unshare
from pipeline.resources.memory.classify import kernel_shmem_device
from pipeline.resources.namespaces import posix_view
from pipeline.resources.namespaces.ipc import (
    IPC_STAT,
    PERM,
    SYSCTLS,
    IpcState,
    Permissions,
    PosixQueue,
    Queue,
    Segment,
    Semaphores,
)
from pipeline.resources.paths import closed_on_error
from pipeline.userns.forest import OVERFLOW_ID, IdKind
from pipeline.userns.visit import Way, fetch, read_file, visit

T = TypeVar("T")
_GETALL = 13
_COPY = 0o40000 | 0o4000  # MSG_COPY | IPC_NOWAIT
_RDONLY = 0o10000
_DEST, _LOCKED = 0o1000, 0o2000
_CHUNK_BYTES = 1 << 20


class _Found(Struct, array_like=True):
    """What a visitor says: sysctls, objects, how many attachments each segment has, POSIX queues that tell somebody."""

    sysctls: dict[str, bytes]
    segments: list[Segment]
    semaphores: list[Semaphores]
    queues: list[Queue]
    attachments: dict[int, int]
    posix: list[PosixQueue]
    telling: list[bytes]


class IpcView(msgspec.Struct, frozen=True):
    """An ipc namespace. `attachments`: how many mappings of it each segment has, by identifier."""

    state: IpcState
    attachments: dict[int, int]
    blockers: list[Blocker]


def look(subject: str, way: Way, userns: int, mapped: tuple[bool, bool]) -> IpcView:
    """What an ipc namespace holds, without the bytes of segments.

    Args:
        way: into it, as its owner.
        userns: the index of the visitor's user namespace, which ids get; `mapped`: whether it maps the overflow uid and
            gid.

    Raises:
        OSError: it cannot be joined.
    """
    found = msgspec.msgpack.decode(visit(way, lambda: msgspec.msgpack.encode(_look(userns))), type=_Found)
    kinds = (
        ("shared memory segment", found.segments),
        ("semaphore set", found.semaphores),
        ("message queue", found.queues),
    )
    unmapped = [one.name for one in found.posix if not _has_numbers(one.permissions, mapped)]
    blockers = list(posix_view.blockers(subject, found.telling, unmapped))
    blockers += [
        Blocker(
            subject,
            f"its ipc namespace holds {kind} {one.id} of an id that its user namespace does not map",
            "remove it (ipcrm)",
        )
        for kind, objects in kinds
        for one in objects
        if not _has_numbers(one.permissions, mapped)
    ]
    state = IpcState(
        sysctls=found.sysctls,
        segments=found.segments,
        semaphores=found.semaphores,
        queues=found.queues,
        posix=found.posix,
    )
    return IpcView(state, found.attachments, blockers)


def _has_numbers(permissions: Permissions, mapped: tuple[bool, bool]) -> bool:
    uids, gids = (permissions.uid, permissions.cuid), (permissions.gid, permissions.cgid)
    return all(
        has or all(one.id != OVERFLOW_ID for one in ids)
        for has, ids in zip(mapped, (uids, gids), strict=True)
    )


def moved(state: IpcState, move: Callable[[Id, IdKind], Id]) -> IpcState:
    """A state in which ids are said in other namespaces."""

    def of(found: Permissions) -> Permissions:
        return Permissions(
            found.key,
            found.mode,
            move(found.uid, "uid"),
            move(found.gid, "gid"),
            move(found.cuid, "uid"),
            move(found.cgid, "gid"),
        )

    return replace(
        state,
        segments=[replace(one, permissions=of(one.permissions)) for one in state.segments],
        semaphores=[replace(one, permissions=of(one.permissions)) for one in state.semaphores],
        queues=[replace(one, permissions=of(one.permissions)) for one in state.queues],
        posix=[replace(one, permissions=of(one.permissions)) for one in state.posix],
    )


def copy(way: Way, segment: Segment) -> LocalFd:
    """A descriptor of the bytes of a segment; the caller owns it.

    Raises:
        OSError: it cannot be attached.
    """
    return fetch(way, lambda: _opened(segment))


# -- in the visitor ------------------------------------------------------------------------


def _look(userns: int) -> _Found:
    segments = list(_each("shm", lambda number: _segment(number, userns)))
    semaphores = list(_each("sem", lambda number: _semaphores(number, userns)))
    queues = list(_each("msg", lambda number: _queue(number, userns)))
    posix = list(posix_view.look(userns))
    here = _sysctls()
    unshare(CLONE.NEWIPC)
    fresh = _sysctls()
    return _Found(
        sysctls={name: value for name, value in here.items() if value != fresh[name]},
        segments=[segment for segment, _ in segments],
        semaphores=semaphores,
        queues=queues,
        attachments={segment.id: count for segment, count in segments},
        posix=[queue for queue, _ in posix],
        telling=[queue.name for queue, told in posix if told],
    )


def _each(kind: str, read: Callable[[int], T]) -> Iterator[T]:
    """Every object of a kind, without those that go while they are looked at."""
    for number in _identifiers(kind):
        try:
            yield read(number)
        except OSError:
            if number in _identifiers(kind):
                raise


def _segment(number: int, userns: int) -> tuple[Segment, int]:
    """A segment, and how often it is attached."""
    buffer = ctypes.create_string_buffer(112)
    syscall(NR.shmctl, number, IPC_STAT, buffer)
    permissions, mode = _permissions(buffer.raw, userns)
    size, *_, count = struct.unpack_from("<Q3q2iQ", buffer.raw, PERM.size)
    removed, locked = bool(mode & _DEST), bool(mode & _LOCKED)
    return Segment(number, permissions, size, removed=removed, locked=locked), count


def _semaphores(number: int, userns: int) -> Semaphores:
    buffer = ctypes.create_string_buffer(104)
    syscall(NR.semctl, number, 0, IPC_STAT, buffer)
    (count,) = struct.unpack_from("<Q", buffer.raw, PERM.size + 32)
    values = ctypes.create_string_buffer(2 * count)
    syscall(NR.semctl, number, 0, _GETALL, values)
    permissions, _ = _permissions(buffer.raw, userns)
    return Semaphores(number, permissions, list(struct.unpack(f"<{count}H", values.raw)))


def _queue(number: int, userns: int) -> Queue:
    buffer = ctypes.create_string_buffer(120)
    syscall(NR.msgctl, number, IPC_STAT, buffer)
    permissions, _ = _permissions(buffer.raw, userns)
    held, _, limit = struct.unpack_from("<3Q", buffer.raw, PERM.size + 24)
    return Queue(number, permissions, limit, list(_messages(number, max(held, limit))))


def _identifiers(kind: str) -> list[int]:
    lines = read_file(f"/proc/sysvipc/{kind}").splitlines()[1:]
    return [int(line.split()[1]) for line in lines]


def _permissions(stat: bytes, userns: int) -> tuple[Permissions, int]:
    key, uid, gid, cuid, cgid, mode, *_ = PERM.unpack_from(stat)
    ids = (Id(userns, number) for number in (uid, gid, cuid, cgid))
    return Permissions(key, mode & 0o777, *ids), mode


def _messages(number: int, longest_bytes: int) -> Iterator[tuple[int, bytes]]:
    buffer = ctypes.create_string_buffer(8 + longest_bytes)
    index = 0
    while True:
        try:
            size = syscall(NR.msgrcv, number, buffer, longest_bytes, index, _COPY)
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return
            raise
        yield struct.unpack_from("<q", buffer.raw)[0], buffer.raw[8 : 8 + size]
        index += 1


def _sysctls() -> dict[str, bytes]:
    return {
        name: read_file(f"/proc/sys/{name}").strip()
        for name in SYSCTLS
        if os.path.exists(f"/proc/sys/{name}")
    }


def _opened(segment: Segment) -> int:
    end = segment.size_bytes + -segment.size_bytes % PAGE_BYTES
    address = syscall(NR.shmat, segment.id, 0, _RDONLY)
    try:
        _check_pages(segment, address)
        where = f"/proc/self/map_files/{address:x}-{address + end:x}"
        return os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return _copied(address, segment.size_bytes)
    finally:
        syscall(NR.shmdt, address)


def _check_pages(segment: Segment, address: int) -> None:
    """A segment of huge pages lies on another file system than all others; its pages may not be there to be read."""
    device = kernel_shmem_device()
    number = f"{os.major(device):02x}:{os.minor(device):02x}"
    for line in read_file("/proc/self/maps").rstrip().split(b"\n"):
        where, _, _, found, _ = line.decode(errors="replace").split(maxsplit=5)[:5]
        if where.startswith(f"{address:x}-") and found != number:
            raise OSError(errno.EOPNOTSUPP, f"segment {segment.id} consists of huge pages")


def _copied(address: int, size_bytes: int) -> int:
    """A memfd with the bytes at an address of our own; what is zero stays a hole."""
    memory: Any = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")
    with closed_on_error(LocalFd(os.memfd_create("segment", os.MFD_CLOEXEC))) as made:
        os.ftruncate(made, size_bytes)
        for start in range(0, size_bytes, _CHUNK_BYTES):
            piece = bytes(memory[start : start + _CHUNK_BYTES])
            if piece.count(0) != len(piece):
                os.pwrite(made, piece, start)
    return made


#: registers bytes: a descriptor, which stays the caller's, and their number; returns the space
Register = Callable[[LocalFd, int], int]


def with_contents(state: IpcState, way: Way, content: Register) -> IpcState:
    """The state of a frozen tree's namespace, its segments' bytes registered.

    Args:
        way: into the namespace, as somebody who may use everything in it.

    Raises:
        OSError: a segment cannot be attached; EOPNOTSUPP: it consists of huge pages.
    """
    segments = []
    for segment in state.segments:
        fd = copy(way, segment)
        try:
            segments.append(replace(segment, space=content(fd, segment.size_bytes)))
        finally:
            os.close(fd)
    return replace(state, segments=segments, posix=posix_view.with_messages(state.posix, way))
