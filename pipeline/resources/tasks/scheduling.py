"""How a task is scheduled: policy, priorities, processors, I/O priority.

Better priorities than the default take CAP_SYS_NICE in the *initial* user namespace,
which no puppet in a nested one has, so the restorer sets them from outside where it
may, and lets the puppet set what it may itself where it may not.

A task that may run on every online processor is recorded as bound to none (an empty
list), so that it may use all of them on a host with more or fewer. A task that is bound
stays bound to processors of the same numbers, or is refused where they are not there.

Not preserved: the position in the run queue, used-up runtime of a deadline task.
Refused: utilization clamps, core scheduling cookies.

Sources: sched_setattr(2), sched_setaffinity(2), ioprio_set(2); kernel/sched/syscalls.c.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
import time
from collections.abc import Callable, Iterator

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Process, Scheduling, Thread
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, syscall
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

_IOPRIO_WHO_PROCESS = 1
#: size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max
_ATTR = struct.Struct("<IIQiIQQQII")
_FAIR = (0, 3, 5)  # SCHED_OTHER, BATCH, IDLE
_NO_CLAMP = ((0, 0), (0, 1024))
_ONLINE = "/sys/devices/system/cpu/online"
_MASK_BYTES = 1024
_PR_SCHED_CORE_GET = 0

SUPPORT = Support(
    kind="scheduling",
    carried=(
        "policy, nice, priority, deadline parameters, slice, flags, bound processors, I/O priority; per thread",
    ),
    refused=(
        "utilization clamps; core scheduling cookies; at the destination: processors that are not there",
    ),
    shown_by=("programs/attributes.py", "resources/test_tasks_state.py"),
)


# -- capture ---------------------------------------------------------------------------


def _attributes(tid: int) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(_ATTR.size)
    syscall(NR.sched_getattr, tid, buffer, _ATTR.size, 0)
    return _ATTR.unpack(buffer.raw)


def online_processors() -> frozenset[int]:
    """The numbers of the processors that run, or did within this second: every thread is compared with them."""
    return _online_in(int(time.monotonic()))


@functools.lru_cache(1)
def _online_in(second: int) -> frozenset[int]:
    del second
    with open(_ONLINE, "rb", buffering=0) as file:
        pairs = [part.split(b"-") for part in file.read().strip().split(b",")]
    return frozenset(number for pair in pairs for number in range(int(pair[0]), int(pair[-1]) + 1))


def scheduling(tid: HostPid) -> Scheduling:
    """How `tid` is scheduled."""
    _, policy, flags, _, priority, runtime, deadline, period, *_ = _attributes(tid)
    if policy in _FAIR and runtime == _attributes(0)[5]:
        runtime = 0  # the kernel's own slice, not one that was asked for
    affinity = os.sched_getaffinity(tid)
    return Scheduling(
        policy=policy,
        flags=flags,
        nice=os.getpriority(os.PRIO_PROCESS, tid),  # sched_getattr hides that of real-time tasks
        priority=priority,
        runtime_ns=runtime,
        deadline_ns=deadline,
        period_ns=period,
        affinity=[] if affinity >= online_processors() else sorted(affinity),
        ioprio=syscall(NR.ioprio_get, _IOPRIO_WHO_PROCESS, tid),
    )


def check_scheduling(subject: str, tid: HostPid) -> Iterator[Blocker]:
    """Scheduling states of a running or stopped task that are not carried."""
    _, policy, *_, util_min, util_max = _attributes(tid)
    if policy in _FAIR and (util_min, util_max) not in _NO_CLAMP:
        yield Blocker(subject, f"its utilization is clamped to {util_min}..{util_max}")
    cookie = ctypes.create_string_buffer(8)
    try:
        syscall(NR.prctl, PRCTL.SCHED_CORE, _PR_SCHED_CORE_GET, tid, 0, cookie)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENODEV, errno.EPERM, errno.EACCES):
            raise
        return  # the kernel or the processor knows no such thing, or it may not be asked
    if any(cookie.raw):
        yield Blocker(subject, "shares its core with chosen tasks only (PR_SCHED_CORE)")


# -- rebuild ---------------------------------------------------------------------------


def check_processors(process: Process) -> Iterator[Blocker]:
    """Processors that threads are bound to and that this host does not have."""
    here = online_processors()
    for thread in process.threads:
        missing = sorted(set(thread.scheduling.affinity) - here)
        if missing:
            yield Blocker(
                f"pid {process.pids[0]} thread {thread.pids[0]}",
                f"is bound to processors {missing}, which this host does not have",
                "widen its affinity with taskset -p before the dump",
            )


def scheduling_calls(thread: Thread, puppet: Puppet) -> Iterator[Call]:
    """Set from outside what may be set so; yields the calls for the rest, to be run by the puppet."""
    wanted, now = thread.scheduling, scheduling(puppet.tid)
    if now.affinity != wanted.affinity:
        bits = sum(1 << number for number in wanted.affinity) or (1 << 8 * _MASK_BYTES) - 1
        mask = bits.to_bytes(_MASK_BYTES, "little")
        yield from _outside(
            lambda who: (NR.sched_setaffinity, (who, _MASK_BYTES, mask)),
            puppet.tid,
            f"affinity to processors {wanted.affinity or 'all'}",
        )
    if now.nice != wanted.nice:
        # sched_setattr passes over it for some policies
        yield from _outside(
            lambda who: (NR.setpriority, (os.PRIO_PROCESS, who, wanted.nice)),
            puppet.tid,
            f"nice {wanted.nice}",
        )
    if _comparable(now) != _comparable(wanted):
        raw = _ATTR.pack(
            _ATTR.size - 8, wanted.policy, wanted.flags, wanted.nice, wanted.priority,
            wanted.runtime_ns, wanted.deadline_ns, wanted.period_ns, 0, 0,
        )  # fmt: skip
        yield from _outside(
            lambda who: (NR.sched_setattr, (who, raw, 0)),
            puppet.tid,
            f"policy {wanted.policy}, priority {wanted.priority}",
        )
    if now.ioprio != wanted.ioprio:
        yield from _outside(
            lambda who: (NR.ioprio_set, (_IOPRIO_WHO_PROCESS, who, wanted.ioprio)),
            puppet.tid,
            f"I/O priority {wanted.ioprio:#x}",
        )


def _comparable(value: Scheduling) -> tuple[int, ...]:
    return (
        value.policy,
        value.flags,
        value.priority,
        value.runtime_ns,
        value.deadline_ns,
        value.period_ns,
    )


def _outside(
    call: Callable[[int], tuple[int, tuple[int | bytes, ...]]], tid: HostPid, name: str
) -> Iterator[Call]:
    number, arguments = call(tid)
    try:
        syscall(number, *arguments)
    except PermissionError:
        number, arguments = call(0)
        yield Call(number, arguments, name=name)
