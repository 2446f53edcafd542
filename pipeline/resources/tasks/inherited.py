"""What every process that a restorer makes has from the restorer, although the tree does not have it.

Most of that is set anew by what restores it (`reinstate`). Here is what needs more: settings of an address space that
count for whatever is mapped afterwards are taken back before anything is; and what nobody can take back is refused.
A service manager sets such things for a `serve`: NoNewPrivileges=, MemoryDenyWriteExecute=, MemoryKSM=.

Not taken back, and not refused: seccomp filters of the restorer, which are told of; Landlock domains, and speculation
that it has switched off. Sources: prctl(2), PR_SET_NO_NEW_PRIVS(2const), PR_SET_MDWE(2const);
include/linux/mm_types.h on what of an address space fork and execve hand on (MMF_INIT_MASK).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Process
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, prctl
from pipeline.remote.calls import Call

_RESTORER = "the restorer"


def taken_back() -> Iterator[Call]:
    """For a puppet that was just executed, and in which nothing is mapped yet; a kernel may not know them."""
    yield Call(NR.prctl, (PRCTL.SET_THP_DISABLE, 0, 0, 0, 0), may_fail=True)
    yield Call(NR.prctl, (PRCTL.SET_MEMORY_MERGE, 0, 0, 0, 0), may_fail=True)


def check_inherited(processes: Sequence[Process]) -> Iterator[Blocker]:
    """What this restorer hands on and nobody can take back; asked before anything is built."""
    if _denies_executable_memory():
        yield Blocker(
            _RESTORER,
            "may not make memory executable (PR_SET_MDWE), and hands that on to all that it makes",
            "start it without, as by MemoryDenyWriteExecute=no of systemd",
        )
    if procfs.status(HostPid(os.getpid())).no_new_privs:
        without = [
            p for p in processes if not all(t.credentials.no_new_privs for t in p.threads if t.ended is None)
        ]
        for process in without:
            yield Blocker(
                f"pid {process.pids[0]}",
                "may gain privileges by execve, and the restorer may not (no_new_privs), and hands that on",
                "start the restorer without, as by NoNewPrivileges=no of systemd",
            )


def notes() -> Iterator[str]:
    """What this restorer hands on that may stay unnoticed."""
    if filters := procfs.status(HostPid(os.getpid())).seccomp_filters:
        yield f"it is under {filters} seccomp filter{'s' * (filters > 1)} of the restorer, too"


def _denies_executable_memory() -> bool:
    try:
        return bool(prctl(PRCTL.GET_MDWE))
    except OSError:
        return False  # before Linux 6.3
