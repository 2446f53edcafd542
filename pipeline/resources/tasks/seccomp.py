"""Seccomp filters of a task, read and given back by its tracer.

A filter judges every later call of its task, also those that we run inside it. Where we
may suspend filters (CAP_SYS_ADMIN in the initial user namespace) they are installed
first, while the puppet has every capability; where we may not, as the very last thing.

Filters that all threads of a process have in common, from the oldest on, are installed once
for all of them (SECCOMP_FILTER_FLAG_TSYNC), so that they stay one chain and a later
synchronization by the program works; what is a thread's own comes behind them. Not
preserved: a chain that only some of the threads have in common becomes one for each.

Refused: strict mode; filters that hand calls to a supervisor (SECCOMP_RET_USER_NOTIF);
filters that we may not read. Sources: seccomp(2), ptrace(2).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError, TargetError
from pipeline.ids import HostPid
from pipeline.image.schema import Process, Seccomp, Thread
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.calls import Call, In
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1
_FLAG_LOG = 2
#: the kernel does not tell it; a thread that lacks it shows its switched off speculation, and is refused for that
_FLAG_SPEC_ALLOW = 4
_STRICT = 1
_BPF_RET_K = 0x06
_RET_ACTION = 0xFFFF_0000
_RET_USER_NOTIF = 0x7FC0_0000
_CAP_SYS_ADMIN = 21

SUPPORT = Support(
    kind="seccomp",
    carried=("filters in their order, per thread, in one chain where threads have them in common; flag LOG",),
    refused=(
        "strict mode; filters with a supervisor (USER_NOTIF); filters of a program that root of the host does not dump",
    ),
    shown_by=("programs/filtered.py", "resources/test_tasks_state.py", "test_tasks_refused.py"),
)


# -- capture ---------------------------------------------------------------------------


def check_seccomp(subject: str, status: procfs.Status) -> Iterator[Blocker]:
    """Modes that are not carried, and filters that we may not read; touches nothing."""
    if status.seccomp == _STRICT:
        yield Blocker(subject, "is in strict seccomp mode, in which it cannot be asked anything")
    elif status.seccomp and not procfs.status(HostPid(os.getpid())).caps[2] >> _CAP_SYS_ADMIN & 1:
        yield Blocker(
            subject,
            "has a seccomp filter, which only root in the initial user namespace may read",
            "run the pipeline as root",
        )


def seccomp(tid: HostPid, status: procfs.Status) -> Seccomp:
    """The filters of a stopped task, in the order of their installation.

    Raises:
        TargetError: a filter cannot be read.
    """
    filters: list[bytes] = []
    log: list[bool] = []
    for index in range(status.seccomp_filters):
        try:
            program = ptrace.seccomp_get_filter(tid, index)
        except OSError as error:
            raise TargetError(f"thread {tid}: seccomp filter {index}: {error.strerror}") from error
        if program is None:
            raise TargetError(f"thread {tid}: seccomp filter {index} is not there")
        filters.append(program)
        log.append(bool(ptrace.seccomp_get_flags(tid, index) & _FLAG_LOG))
    return Seccomp(mode=status.seccomp, filters=filters, log=log)


def check_filters(subject: str, found: Seccomp) -> Iterator[Blocker]:
    """Filters that are not carried, by what they can answer."""
    for index, program in enumerate(found.filters):
        for code, _, _, value in struct.iter_unpack("<HBBI", program):
            if code == _BPF_RET_K and value & _RET_ACTION == _RET_USER_NOTIF:
                yield Blocker(
                    subject, f"seccomp filter {index} hands calls to a supervisor (SECCOMP_RET_USER_NOTIF)"
                )
                break


# -- rebuild ---------------------------------------------------------------------------


def suspend(threads: Sequence[Puppet]) -> bool:
    """Let no filter judge the calls that we run in these puppets; False where we may not (rootless)."""
    try:
        for puppet in threads:
            puppet.suspend_seccomp()
    except PermissionError:
        return False
    return True


def install_filters(process: Process, threads: Sequence[Puppet]) -> None:
    """Install every filter of every thread, oldest first.

    Args:
        process: the record.
        threads: its puppets; they need CAP_SYS_ADMIN in their user namespace, or no_new_privs.

    Raises:
        RebuildError: the kernel refuses a filter.
    """
    running = [
        (process.threads[i], puppet) for i, puppet in enumerate(threads) if process.threads[i].ended is None
    ]
    common = _common([thread for thread, _ in running]) if len(running) > 1 else 0
    first, puppet = running[0]
    _install(process, puppet, _filters(first)[:common], _FLAG_TSYNC)
    for thread, puppet in running:
        _install(process, puppet, _filters(thread)[common:], 0)


def _filters(thread: Thread) -> list[tuple[bytes, bool]]:
    return list(zip(thread.seccomp.filters, thread.seccomp.log, strict=True))


def _common(threads: Sequence[Thread]) -> int:
    """How many filters, from the oldest on, all threads have in common; 0 where synchronizing would change more."""
    if len({thread.credentials.no_new_privs for thread in threads}) > 1:
        return 0
    same = 0
    for filters in zip(*map(_filters, threads), strict=False):
        if any(one != filters[0] for one in filters):
            break
        same += 1
    return same


def _install(process: Process, puppet: Puppet, filters: Sequence[tuple[bytes, bool]], flags: int) -> None:
    for number, (program, log) in enumerate(filters):
        fprog = In([len(program) // 8, In([program])])
        wanted = flags | _FLAG_SPEC_ALLOW | (_FLAG_LOG if log else 0)
        call = Call(NR.seccomp, (_SET_MODE_FILTER, wanted, fprog))
        puppet.run([call])
        if call.result:
            reason = os.strerror(-call.result) if call.result < 0 else f"thread {call.result} has others"
            raise RebuildError(f"pid {process.pids[0]}: seccomp filter {number} is refused: {reason}")
