"""Processes that are stopped by job control, and what their parents have not heard of it yet.

The kernel holds for a process: whether it is stopped, by which signal, and whether its parent has collected that by
waitid(2) (WSTOPPED), or that it was continued (WCONTINUED). A parent is asked with WNOWAIT, which takes nothing.

Puppets are stopped as a whole while they are puppets: calls can be run in them all the same, and they stand still
when they are set free. The parent, a puppet, too, then takes back what it had collected at the source, and the
SIGCHLD that came with it: its own queue is put on later.

Not preserved: the signal of a stop in a process group that is orphaned by now; it becomes SIGSTOP.

Sources: waitid(2), ptrace(2) on group-stop; kernel/signal.c do_signal_stop, kernel/exit.c wait_task_stopped.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Iterable, Sequence
from typing import Literal

from pipeline.errors import RebuildError
from pipeline.image.schema import Process
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.ptrace import WALL
from pipeline.remote.calls import Call, Out, Remote
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

_P_ALL, _P_PID = 0, 1
_WNOHANG, _WSTOPPED, _WCONTINUED, _WNOWAIT = 1, 2, 8, 0x0100_0000
_CLD_STOPPED, _CLD_CONTINUED = 5, 6
_INFO_BYTES = 128

Notice = Literal["", "stopped", "continued"]

SUPPORT = Support(
    kind="job control",
    carried=(
        "processes stopped by SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, with all threads",
        "whether the parent has collected a stop or a continuation",
    ),
    refused=(),
    shown_by=("programs/stopped.py", "programs/signals.py"),
)


def notices(parent: Remote, children: Iterable[int]) -> dict[int, Notice]:
    """What a process could collect about its children, as the kernel holds it; nothing is taken.

    Args:
        parent: stopped; runs the calls.
        children: pids as the parent sees them.
    """
    if not any(_ask(parent, _P_ALL, [0])):
        return {}
    pids = list(children)
    found = zip(pids, _ask(parent, _P_PID, pids), strict=True)
    return {pid: notice for pid, notice in found if notice}


def _ask(parent: Remote, kind: int, pids: Sequence[int]) -> list[Notice]:
    options = _WSTOPPED | _WCONTINUED | _WNOHANG | _WNOWAIT | WALL
    answers = [Out(_INFO_BYTES) for _ in pids]
    calls = [
        Call(NR.waitid, (kind, pid, info, options, 0), may_fail=True)
        for pid, info in zip(pids, answers, strict=True)
    ]
    parent.run(calls)
    for call in calls:
        if call.result < 0 and call.result != -errno.ECHILD:
            raise OSError(-call.result, f"waitid: {os.strerror(-call.result)}")
    notice: dict[int, Notice] = {_CLD_STOPPED: "stopped", _CLD_CONTINUED: "continued"}
    # of a call that fails nothing is written: it stays 0
    return [notice.get(struct.unpack_from("<i", info.data, 8)[0], "") for info in answers]


def stop(process: Process, puppets: Sequence[Puppet], parent: tuple[Process, Puppet] | None) -> None:
    """Stop a process that shall be stopped, and leave to its parent what that has not collected.

    Args:
        process: the record.
        puppets: one a thread, the leader's first.
        parent: None where that is outside the tree.

    Raises:
        RebuildError: it cannot be stopped.
    """
    if process.state != "stopped" and process.notice != "continued":
        return
    leader, *others = puppets
    number = process.stop_signal or signal.SIGSTOP
    if not leader.stop_group(others, number) and not leader.stop_group(others, signal.SIGSTOP):
        raise RebuildError(f"pid {process.pids[0]} cannot be stopped")
    if process.state != "stopped":
        os.kill(leader.pid, signal.SIGCONT)
        leader.forget_child_signals(signal.SIGCONT)
    if parent is None:
        return
    collector, puppet = parent
    if process.notice == "":
        seen_as = process.pids[len(collector.pids) - 1]
        puppet.syscall(NR.waitid, _P_PID, seen_as, 0, _WSTOPPED | _WNOHANG | WALL, 0)
    puppet.forget_child_signals()
