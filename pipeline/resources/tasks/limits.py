"""Resource limits of a process: sixteen pairs of a soft and a hard limit.

Raising a hard limit takes CAP_SYS_RESOURCE in the *initial* user namespace, which no
puppet in a nested one has, so the restorer sets limits from the outside where it may,
and lets the puppet set what it may itself where it may not.

Limits come after everything that they would bound: descriptors, locked memory, queued
signals, timers, changes of ids.

Not preserved: what was used up of a limit on processor time; it counts anew.
Sources: getrlimit(2), prlimit(2); kernel/sys.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Process
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

# fmt: off
_NAMES = [
    "cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as", "locks", "sigpending",
    "msgqueue", "nice", "rtprio", "rttime",
]
# fmt: on
SUPPORT = Support(
    kind="limits",
    carried=("all sixteen resource limits, soft and hard",),
    refused=("at the destination: a hard limit above the restorer's, without CAP_SYS_RESOURCE",),
    shown_by=("programs/attributes.py", "resources/test_tasks_state.py"),
)

_CAP_SYS_RESOURCE = 24


def check_limits(processes: Sequence[Process]) -> Iterator[Blocker]:
    """Hard limits that this restorer cannot give; asked before anything is built.

    A nested restorer may have the capability only in its own user namespace: then the kernel refuses
    the step itself, and the error names the limit.
    """
    me = HostPid(os.getpid())
    if procfs.status(me).caps[2] >> _CAP_SYS_RESOURCE & 1:
        return
    mine = procfs.limits(me)
    for process in processes:
        for name, have, wanted in zip(_NAMES, mine, process.limits, strict=False):
            if wanted[1] > have[1]:
                yield Blocker(
                    f"pid {process.pids[0]}",
                    f"its hard limit {name} is {_text(wanted[1])}, and the restorer has {_text(have[1])}",
                    "raise the limit of the restorer, or give it CAP_SYS_RESOURCE",
                )


def _text(value: int) -> str:
    return "unlimited" if value == procfs.RLIM_INFINITY else str(value)


def limit_calls(process: Process, puppet: Puppet) -> Iterator[Call]:
    """Set from outside what may be set so; yields the calls for the rest, to be run by the puppet."""
    have = procfs.limits(puppet.pid)
    for resource, (now, wanted) in enumerate(zip(have, process.limits, strict=False)):
        if now == tuple(wanted):
            continue
        raw = struct.pack("<2Q", *wanted)
        try:
            syscall(NR.prlimit64, puppet.pid, resource, raw, 0)
        except PermissionError:
            change = f"{_text(wanted[0])}:{_text(wanted[1])}, hard limit now {_text(now[1])}"
            yield Call(NR.prlimit64, (0, resource, raw, 0), name=f"limit {_NAMES[resource]} ({change})")
