"""System calls in a process that has been made again, whole, and waits to be let run.

It is no puppet any more: its memory is full and its registers are those of the image. So it is treated as a live
target is.
"""

from __future__ import annotations

import os

from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace, smaps
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.inside import open_file
from pipeline.remote.calls import Argument
from pipeline.remote.live import LiveTask, find_places


def syscall(tid: HostPid, number: int, *args: Argument) -> int:
    """Run one call in a stopped thread of ours; all other threads of its process are stopped, too.

    Raises:
        OSError: with its errno if the call fails.
        TargetError: there is no room in the process.
    """
    memory = open_file(tid, "mem", os.O_RDWR)
    try:
        places = find_places(tid, smaps.maps(tid), [arch.Registers(ptrace.get_regs(tid))["rsp"]], memory)
        return LiveTask(tid, places, memory, ~procfs.status(tid).caught).syscall(number, *args)
    finally:
        os.close(memory)
