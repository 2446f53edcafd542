"""Signals of a task: queued ones with their siginfo, actions, the alternate stack.

The kernel keeps the sender of a queued signal as the *receiver* sees it: the pid in the
receiver's pid namespace, the uid in its user namespace. Pids stay what they are in
every pid namespace of a tree, so a pid is only touched where the receiver is at level 0
and the sender is outside the tree: it becomes 0, as the kernel says "somebody you
cannot see". A uid is recorded as an `Id` and put back as the receiver then sees it.

Not preserved: a standard signal that the kernel dropped the siginfo of (its queue was
full) comes back with an empty one, as it would be taken. Queued SIGKILL does not exist
in a stopped tree; a queued SIGSTOP stops the process when it is set free.

Sources: rt_sigqueueinfo(2), sigaction(2), sigaltstack(2); kernel/signal.c.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import Id, PendingSignal, Process, SignalAction, Thread
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.calls import Call
from pipeline.resources.support import Support
from pipeline.userns.forest import OVERFLOW_ID

SIGNALS = range(1, 65)
#: si_code of signals that name who sent them: kill, sigqueue, message queues, tgkill
_SENT_BY_SOMEBODY = {0, -1, -3, -6}
_SS_ONSTACK = 1
_SS_DISABLE = 2
_INFO_BYTES = 128
_CANNOT_BE_QUEUED = (signal.SIGKILL, signal.SIGSTOP)
_DEFAULT = SignalAction(0, 0, 0, 0)
_STOPS_WITH = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT, signal.SIGIO)

SUPPORT = Support(
    kind="signals",
    carried=(
        "actions, masks, alternate stacks",
        "queued signals of threads and processes with their siginfo and sender, in order",
    ),
    refused=(),
    shown_by=("programs/signals.py", "programs/stack.c", "resources/test_tasks_state.py"),
)

#: what an `Id` is called in a user namespace of the image; None where it has no mapping
Number = Callable[[Id, int], int | None]


# -- capture ---------------------------------------------------------------------------


def pending(
    tid: HostPid, shared: bool, member: Callable[[int], int], status: procfs.Status | None = None
) -> list[PendingSignal]:
    """The queue of a stopped thread, or of its process, oldest first.

    Args:
        tid: a tracee of the calling thread.
        shared: the queue of the process.
        member: level-0 pid of a process or thread of the tree, 0 for others.
        status: of the thread, where it is known already.

    Ids are as the pipeline sees them (`Id(0, …)`).
    """
    status = status or procfs.status(tid)
    infos = ptrace.peek_siginfo(tid, shared)
    uids = _user_map(tid) if infos else []
    found = [_record(info, len(status.ns_pid) == 1, uids, member) for info in infos]
    queued = {_number(info) for info in infos}
    without_info = status.shared_pending if shared else status.pending
    found += [
        PendingSignal(struct.pack("<i", number).ljust(_INFO_BYTES, b"\0"))
        for number in SIGNALS
        if without_info >> (number - 1) & 1 and number not in queued
    ]
    return found


def _record(
    info: bytes, at_level_0: bool, uids: Sequence[tuple[int, int, int]], member: Callable[[int], int]
) -> PendingSignal:
    number, _, code, pid, uid = struct.unpack_from("<iii4xiI", info)
    of_child = number == signal.SIGCHLD and code > 0
    if code not in _SENT_BY_SOMEBODY and not of_child:
        return PendingSignal(info)
    here = next((lower + uid - inner for inner, lower, count in uids if 0 <= uid - inner < count), None)
    return PendingSignal(
        info,
        Id(0, here) if here is not None else None,
        # a dead child's pid is still what the parent knows it by
        member(pid) if at_level_0 and pid and not of_child else None,
    )


def _user_map(tid: HostPid) -> list[tuple[int, int, int]]:
    """(inner, as the pipeline sees it, count) of the task's user namespace."""
    lines = procfs.read_file(tid, "uid_map").splitlines()
    return [(int(inner), int(lower), int(count)) for inner, lower, count in map(bytes.split, lines)]


def _number(info: bytes) -> int:
    number: int = struct.unpack_from("<i", info)[0]
    return number


# -- rebuild ---------------------------------------------------------------------------


def stop_signal(process: Process) -> int:
    """A signal for the puppet to stop with that no queue holds and no timer sends."""
    taken = {_number(p.info) for p in process.pending}
    taken |= {_number(p.info) for thread in process.threads for p in thread.pending}
    taken |= {timer.signal for timer in process.timers}
    for candidate in _STOPS_WITH:
        if candidate not in taken:
            return candidate
    raise RebuildError(f"pid {process.pids[0]}: every signal that a puppet could stop with is in use")


def stops_when_free(process: Process) -> bool:
    """Whether a SIGSTOP is queued: it is sent anew when the process is set free."""
    queues = [process.pending, *(thread.pending for thread in process.threads)]
    return any(_number(p.info) == signal.SIGSTOP for queue in queues for p in queue)


def action_calls(process: Process) -> Iterator[Call]:
    """The action of every signal; before anything is queued, since ignoring a signal empties its queue.

    A puppet comes with the default for all of them (`pipeline.remote.puppet.spawn_launcher`).
    """
    for number, a in enumerate(process.actions, 1):
        if number not in _CANNOT_BE_QUEUED and a != _DEFAULT:
            raw = struct.pack("<4Q", a.handler, a.flags, a.restorer, a.mask)
            yield Call(NR.rt_sigaction, (number, raw, 0, 8), name=f"action of signal {number}")


def altstack_calls(thread: Thread) -> Iterator[Call]:
    """The alternate stack, where there is one."""
    address, flags, size = thread.altstack
    if not flags & _SS_DISABLE:
        stack = struct.pack("<QI4xQ", address, flags & ~_SS_ONSTACK, size)
        yield Call(NR.sigaltstack, (stack, 0), name="alternate stack")


def queue_calls(process: Process, index: int, uid: Number) -> Iterator[Call]:
    """Queue the pending signals of thread `index`, run by it; the leader's calls also queue the process's.

    Only the receiver itself may queue a siginfo that the kernel or somebody else seems to have sent.
    """
    thread = process.threads[index]
    tgid, tid = process.pids[-1], thread.pids[-1]
    userns = process.namespaces.user
    for p in thread.pending:
        number = _number(p.info)
        if number not in _CANNOT_BE_QUEUED:
            info = _with_sender(p, userns, uid)
            yield Call(NR.rt_tgsigqueueinfo, (tgid, tid, number, info), name=f"queue signal {number}")
    for p in process.pending if index == 0 else ():
        number = _number(p.info)
        if number not in _CANNOT_BE_QUEUED:
            info = _with_sender(p, userns, uid)
            yield Call(NR.rt_sigqueueinfo, (tgid, number, info), name=f"queue signal {number}")


def _with_sender(pending: PendingSignal, userns: int, uid: Number) -> bytes:
    info = bytearray(pending.info)
    if pending.pid is not None:
        struct.pack_into("<i", info, 16, pending.pid)
    if pending.uid is not None:
        number = uid(pending.uid, userns)
        struct.pack_into("<I", info, 20, OVERFLOW_ID if number is None else number)
    return bytes(info)
