"""Adjustments of semaphores that the kernel makes when a process ends (SEM_UNDO).

Nothing shows them. But semop(2) refuses, with ERANGE, an operation that would take one out of range, and an
operation that is refused changes nothing. So a process is asked with lists of operations of which the last one can
never be done: ERANGE says that the ones before had led the adjustment out of range, EAGAIN that they had not, and
the adjustment is found by halving. Before that, kcmp(2) tells who has no adjustments at all.

A list moves the adjustment without the value: plus with SEM_UNDO, minus without. They are given back likewise.

Refused by name: a process that may not change a set of its ipc namespace, since it cannot be asked; threads that do
not share their adjustments (CLONE_SYSVSEM).

Source: semop(2); ipc/sem.c, perform_atomic_semop_slow.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import SemaphoreUndo
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.forking import fork_deaf, pipe
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.remote.calls import Argument
from pipeline.resources.namespaces.ipc import Semaphores
from pipeline.resources.support import Support

_UNDO, _NO_WAIT = 0x1000, 0o4000
#: range of an adjustment, and the highest value of a semaphore
_LOWEST, _HIGHEST, _VALUE_MAX = -32768, 32767, 32767
_OPERATION = struct.Struct("<Hhh")

SUPPORT = Support(
    kind="semaphore adjustments",
    carried=("what the end of a process does to semaphores (SEM_UNDO)",),
    refused=("threads with adjustments of their own; sets that the process may not change",),
    shown_by=("programs/sysv.py",),
)


#: runs a system call in the process; OSError with its errno
Syscall = Callable[..., int]


def has_any(pids: Sequence[HostPid]) -> list[HostPid]:
    """Which of these tasks may have adjustments: a fresh process has none, and is compared with them."""
    with pipe() as (reader, writer):
        fresh = fork_deaf()
        if fresh == 0:
            writer.close()
            reader.read(1)
            os._exit(0)
        try:
            return [pid for pid in pids if kcmp(pid, fresh, KCMP.SYSVSEM) != 0]
        finally:
            writer.close()
            os.waitpid(fresh, 0)


def capture(
    pid: HostPid, tids: Sequence[HostPid], sets: Sequence[Semaphores], syscall: Syscall
) -> tuple[list[SemaphoreUndo], list[Blocker]]:
    """The adjustments of a stopped process.

    Args:
        tids: its tasks, the leader first.
        sets: of its ipc namespace.
        syscall: runs one in the leader.
    """
    if not sets or not has_any(tids):
        return [], []
    subject = f"pid {pid}"
    if any(kcmp(tids[0], tid, KCMP.SYSVSEM) != 0 for tid in tids[1:]):
        return [], [Blocker(subject, "has threads with semaphore adjustments of their own (CLONE_SYSVSEM)")]
    found = []
    for one in sets:
        for number, value in enumerate(one.values):
            try:
                adjustment = _adjustment(syscall, one.id, number, value)
            except OSError as error:
                why = f"cannot be asked for its adjustments of semaphore set {one.id}: {error.strerror}"
                return [], [Blocker(subject, why, "let it end, or remove the set (ipcrm)")]
            if adjustment:
                found.append(SemaphoreUndo(one.id, number, adjustment))
    return found, []


def reinstate(wanted: Sequence[SemaphoreUndo], sets: Sequence[Semaphores], syscall: Syscall) -> None:
    """Give a process its adjustments; the sets of its ipc namespace have their values.

    Raises:
        RebuildError: the image names a semaphore that it does not hold.
        OSError: the set may not be changed.
    """
    values = {(one.id, number): value for one in sets for number, value in enumerate(one.values)}
    for undo in wanted:
        if (undo.set, undo.number) not in values:
            raise RebuildError(f"semaphore {undo.number} of set {undo.set} is not in the image")
        moving = _moving(undo.adjustment, values[undo.set, undo.number])
        _operate(syscall, undo.set, [(undo.number, op, flags) for op, flags in moving])


def _operate(syscall: Syscall, identifier: int, operations: Sequence[tuple[int, int, int]]) -> None:
    packed = b"".join(_OPERATION.pack(*operation) for operation in operations)
    arguments: tuple[Argument, ...] = (identifier, packed, len(operations))
    syscall(NR.semop, *arguments)


def _adjustment(syscall: Syscall, identifier: int, number: int, value: int) -> int:
    if _fits(syscall, identifier, number, value, _LOWEST) and _fits(
        syscall, identifier, number, value, _HIGHEST
    ):
        return 0
    low, high = _LOWEST, _HIGHEST  # the adjustment lies within
    while low < high:
        middle = (low + high + 1) // 2
        # it can be lowered by `middle - _LOWEST` if it is `middle` or more
        if _fits(syscall, identifier, number, value, _LOWEST - middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fits(syscall: Syscall, identifier: int, number: int, value: int, change: int) -> bool:
    """Whether the adjustment, changed by so much, is still in range."""
    operations = [(number, op, flags) for op, flags in _moving(change, value)]
    operations.append((number, -value - 1, _NO_WAIT))
    try:
        _operate(syscall, identifier, operations)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        if error.errno == errno.ERANGE:
            return False
        raise
    raise OSError(errno.EIO, "an operation was done that cannot be done")


def _moving(change: int, value: int) -> Iterator[tuple[int, int]]:
    """Operations that change the adjustment and leave the value as it is."""
    up_first = value <= _VALUE_MAX // 2
    room = _VALUE_MAX - value if up_first else value
    flags = (_UNDO, 0) if change < 0 else (0, _UNDO)  # plus with SEM_UNDO lowers it
    left = abs(change)
    while left:
        size = min(left, room)
        left -= size
        pair = (size, flags[0]), (-size, flags[1])
        yield from pair if up_first else reversed(pair)
