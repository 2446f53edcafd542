"""How long a small tree stands still until everything is known of it, without its pages and the disk behind them.

Again and again in one process, so that the start of the interpreter does not count. Where other work takes the machine
away, the least time says more than the median.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import trio

from bench.commands import TOOL, kill, wait_for
from bench.extent import Extent
from bench.matrix import Case, Sample
from pipeline.remote.tracer import tracer_thread
from pipeline.stages.beforehand import Beforehand
from pipeline.standstill import refuse_early, standstill

_THREADED = (
    "import sys, threading, time\n"
    "for _ in range(int(sys.argv[1])): threading.Thread(target=time.sleep, args=(1e6,)).start()\n"
    "print('ready', flush=True); time.sleep(1e6)"
)
_TIMES = 15


def cases(extent: Extent) -> list[Case]:
    """One for each number of threads."""
    return [
        Case("standstill", f"{count} threads", partial(_measure, count), {"threads": count})
        for count in extent.threads
    ]


async def _stand_still(pid: int) -> tuple[list[float], set[int]]:
    """Milliseconds from the freeze to the last record, each time; how many threads were found."""
    found = []
    threads = set()
    async with tracer_thread() as tracer:
        for _ in range(_TIMES):
            with Beforehand() as known:
                await refuse_early(pid, known=known)
                async with standstill(tracer, pid, known=known) as still:
                    found.append(1e3 * (still.captured_s - still.begun_s))
                    threads.add(sum(len(process.tasks) for process in still.tree.processes.values()))
    return found, threads


def _measure(count: int, folder: Path) -> Sample:
    log, pidfile = folder / "log", folder / "pid"
    with log.open("w") as out:
        command = [*TOOL, "run", "--userns", "--detach", "--pidfile", str(pidfile), "--"]
        program = [sys.executable, "-c", _THREADED, str(count - 1)]
        subprocess.run([*command, *program], check=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    pid = int(pidfile.read_text())
    try:
        wait_for(pid, lambda: "ready" in log.read_text(), log)
        found, threads = trio.run(partial(_stand_still, pid))
    finally:
        kill(pid)
    found.sort()
    return Sample(
        {"captured-ms": found[len(found) // 2], "captured-least-ms": found[0]},
        {"every thread was captured": threads == {count}},
    )
