"""How long a small tree stands still until everything is known of it: `python -m bench --frozen`.

Again and again in one process, so that the start of the interpreter, and the pages and the disk behind them, do not
count. Where other work takes the machine away, the least time says more than the median.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import trio

from bench.__main__ import kill, start
from pipeline.remote.tracer import tracer_thread
from pipeline.standstill import refuse_early, standstill

_THREADED = (
    "import sys, threading, time\n"
    "for _ in range(int(sys.argv[1])): threading.Thread(target=time.sleep, args=(1e6,)).start()\n"
    "print('ready', flush=True); time.sleep(1e6)"
)
_TIMES = 15


async def _stand_still(pid: int) -> list[float]:
    """Milliseconds from the freeze to the last record, each time."""
    found = []
    async with tracer_thread() as tracer:
        for _ in range(_TIMES):
            await refuse_early(pid)
            async with standstill(tracer, pid) as still:
                found.append(1e3 * (still.captured_s - still.begun_s))
    return found


def main(folder: Path) -> None:
    """Measure and print."""
    print(f"ms from the freeze to the last record; of {_TIMES}")
    for threads in (0, 10, 100):
        pid = start(folder, _THREADED, str(threads))
        try:
            found = trio.run(partial(_stand_still, pid))
        finally:
            kill(pid)
        print(
            f"{threads + 1:>4} threads: median {statistics.median(found):6.1f}, least {min(found):6.1f}",
            flush=True,
        )
