"""What an ipc namespace holds: System V segments, semaphore sets and message queues, POSIX queues; and its limits.

An object is made with the identifier that it had, by somebody with the ids of its creator, and open to everybody at
first: processes of the tree attach segments and take adjustments of semaphores before they are what they were.
`settle` gives every object its owner and permissions when that is done, and removes the segments which
live only as long as somebody has them attached.

Not preserved: times, the pids of who used an object last (of semaphores: sempid; of segments and queues: the
creator's, too), and the key of a removed segment, which only /proc/PID/maps remembers.
`pipeline.resources.namespaces.ipc_view` looks at them.

Sources: sysvipc(7), shmctl(2), semctl(2), msgctl(2), proc_sys_kernel(5) on shm_next_id.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import ImageError
from pipeline.ids import LocalFd
from pipeline.image.schema import I32, I64, U16, U64, Id, Index, Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, prctl, syscall
from pipeline.resources.memory.pages import data_runs
from pipeline.resources.namespaces import posix_queues
from pipeline.resources.support import Support

SUPPORT = Support(
    "ipc",
    carried=(
        "limits",
        "System V segments, semaphore sets with what their users would undo, and message queues, whoever has them",
        "POSIX message queues with their messages",
    ),
    refused=(
        "a POSIX message queue of whose messages somebody is told (mq_notify)",
        "a segment that somebody outside of the tree has attached; segments of huge pages",
    ),
    shown_by=(
        "programs/sysv.py",
        "programs/queues.py",
        "resources/test_ipc_outside.py",
    ),
)

#: what of /proc/sys belongs to an ipc namespace; the *_next_id files are for restorers of objects only
SYSCTLS = (
    *(f"kernel/{name}" for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni")),
    *(
        f"fs/mqueue/{name}"
        for name in ("queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default")
    ),
    "kernel/shm_rmid_forced",
)
#: it ends segments that nobody has attached: set when all are
_LATE_SYSCTLS = {"kernel/shm_rmid_forced"}
IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2
_CREATE = 0o1000 | 0o2000  # IPC_CREAT | IPC_EXCL
_NO_WAIT = 0o4000
_OPEN_TO_ALL = 0o777
_SETALL, _SHM_LOCK = 17, 11
_NO_SETUID_FIXUP = 1 << 2
#: struct ipc64_perm: key, uid, gid, cuid, cgid, mode, sequence number and three unused words
PERM = struct.Struct("<i5IHH4x2Q")

Message = Annotated[bytes, Meta(max_length=1 << 24)]


class Permissions(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who may use an object. `mode`: permission bits."""

    key: I32
    mode: Annotated[int, Meta(ge=0, le=0o777)]
    uid: Id
    gid: Id
    cuid: Id
    cgid: Id


class Segment(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Shared memory; its bytes are in `space`. `removed`: it ends with its last attachment."""

    id: I32
    permissions: Permissions
    size_bytes: U64
    space: Index = 0
    removed: bool = False
    locked: bool = False


class Semaphores(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A set of semaphores with their values."""

    id: I32
    permissions: Permissions
    values: Annotated[list[U16], Meta(max_length=1 << 16)]


class Queue(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message queue; `messages` are (type, text), the oldest first."""

    id: I32
    permissions: Permissions
    limit_bytes: U64
    messages: Annotated[list[tuple[I64, Message]], Meta(max_length=1 << 20)]


class PosixQueue(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A POSIX message queue, which was made by who it belongs to."""

    name: posix_queues.Name
    permissions: Permissions
    room: posix_queues.Room
    messages: posix_queues.Messages = []


class IpcState(Record, frozen=True, kw_only=True):
    """Objects, and sysctls that differ from those of a fresh namespace, by their path below /proc/sys."""

    sysctls: dict[str, bytes] = {}
    segments: Annotated[list[Segment], Meta(max_length=1 << 16)] = []
    semaphores: Annotated[list[Semaphores], Meta(max_length=1 << 16)] = []
    queues: Annotated[list[Queue], Meta(max_length=1 << 16)] = []
    posix: Annotated[list[PosixQueue], Meta(max_length=1 << 16)] = []


class Numbers(msgspec.Struct, frozen=True):
    """The ids of an object as the user namespace of the visitor knows them."""

    uid: int
    gid: int
    cuid: int
    cgid: int


#: says what the ids of an object are called there
Translate = Callable[[Permissions], Numbers]


def check(state: IpcState) -> None:
    """See that an image names only limits of an ipc namespace; raises ImageError."""
    for name in state.sysctls:
        if name not in SYSCTLS:
            raise ImageError(f"{name} is no limit of an ipc namespace")
    for queue in state.posix:
        posix_queues.check_name(queue.name)


def create(state: IpcState, translate: Translate, contents: Mapping[int, LocalFd]) -> bytes:
    """Make everything; for a visitor that is a process, in the namespace and the user namespace that owns it.

    Args:
        contents: the bytes of segments, by space.

    Raises:
        OSError: the kernel refuses something; EEXIST: an identifier is taken.
    """
    for name, value in state.sysctls.items():
        if name not in _LATE_SYSCTLS:
            _set(name, value)
    prctl(PRCTL.SET_SECUREBITS, _NO_SETUID_FIXUP)
    for segment in state.segments:
        key = 0 if segment.removed else segment.permissions.key
        _make("shm", NR.shmget, segment, key, translate, segment.size_bytes)
        _fill(segment, contents[segment.space])
    for semaphores in state.semaphores:
        count = len(semaphores.values)
        _make("sem", NR.semget, semaphores, semaphores.permissions.key, translate, count)
        values = struct.pack(f"<{count}H", *semaphores.values)
        syscall(NR.semctl, semaphores.id, 0, _SETALL, values)
    for queue in state.queues:
        _make("msg", NR.msgget, queue, queue.permissions.key, translate, None)
        _set_queue(queue, translate(queue.permissions), _OPEN_TO_ALL)
        for kind, text in queue.messages:
            message = struct.pack("<q", kind) + text
            syscall(NR.msgsnd, queue.id, message, len(text), _NO_WAIT)
    for posix in state.posix:
        _become(translate(posix.permissions))
        os.close(posix_queues.make(posix.name, posix.room, posix.messages, posix.permissions.mode))
    return b""


def is_settled(state: IpcState) -> bool:
    """Whether `settle` has nothing to do for a namespace: where nobody has made anything in it."""
    return not (state.segments or state.semaphores or state.queues or _LATE_SYSCTLS & state.sysctls.keys())


def settle(state: IpcState, translate: Translate) -> bytes:
    """Give everything its owner and permissions; for a visitor there. Raises as `create` does."""
    for segment in state.segments:
        stat = _perm(segment.permissions, translate) + bytes(64)
        syscall(NR.shmctl, segment.id, IPC_SET, stat)
        if segment.locked:
            syscall(NR.shmctl, segment.id, _SHM_LOCK, 0)
        if segment.removed:
            syscall(NR.shmctl, segment.id, IPC_RMID, 0)
    for semaphores in state.semaphores:
        stat = _perm(semaphores.permissions, translate) + bytes(56)
        syscall(NR.semctl, semaphores.id, 0, IPC_SET, stat)
    for queue in state.queues:
        _set_queue(queue, translate(queue.permissions), queue.permissions.mode)
    for name, value in state.sysctls.items():
        if name in _LATE_SYSCTLS:
            _set(name, value)
    return b""


def _set(name: str, value: bytes) -> None:
    fd = os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _make(
    kind: str,
    number: int,
    wanted: Segment | Semaphores | Queue,
    key: int,
    translate: Translate,
    size: int | None,
) -> None:
    """Make an object with its identifier, as its creator."""
    _become(translate(wanted.permissions))
    _set(f"kernel/{kind}_next_id", b"%d" % wanted.id)
    flags = _CREATE | _OPEN_TO_ALL
    made = syscall(number, key, flags) if size is None else syscall(number, key, size, flags)
    if made != wanted.id:
        raise OSError(errno.EEXIST, f"identifier {wanted.id} is taken")


def _become(ids: Numbers) -> None:
    """Take on the ids of who made an object."""
    os.setresgid(-1, ids.cgid, -1)
    os.setresuid(-1, ids.cuid, -1)


def _fill(segment: Segment, source: LocalFd) -> None:
    address = syscall(NR.shmat, segment.id, 0, 0)
    try:
        memory = memoryview((ctypes.c_char * segment.size_bytes).from_address(address)).cast("B")
        for start, end in data_runs(source, segment.size_bytes):
            position, stop = start, min(end, segment.size_bytes)
            while position < stop:
                position += os.preadv(source, [memory[position:stop]], position)
    finally:
        syscall(NR.shmdt, address)


def _perm(permissions: Permissions, translate: Translate) -> bytes:
    ids = translate(permissions)
    return PERM.pack(permissions.key, ids.uid, ids.gid, ids.cuid, ids.cgid, permissions.mode, 0, 0, 0, 0)


def _set_queue(queue: Queue, ids: Numbers, mode: int) -> None:
    perm = PERM.pack(queue.permissions.key, ids.uid, ids.gid, ids.cuid, ids.cgid, mode, 0, 0, 0, 0)
    stat = perm + struct.pack("<6Q2i2Q", 0, 0, 0, 0, 0, queue.limit_bytes, 0, 0, 0, 0)
    syscall(NR.msgctl, queue.id, IPC_SET, stat)
