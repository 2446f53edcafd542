"""How the cost of a dump and a restore grows: `python -m bench --scale`.

One program (tests/programs/large.py) that has much of one thing, in a user namespace, at growing numbers. Beside each
figure stands a bare loop of the same run over the same program: what it takes to only read what /proc has of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.__main__ import TOOL, idle_bytes, kill, measured, wait_for

PROGRAM = Path(__file__).parents[1] / "tests" / "programs" / "large.py"
#: descriptors, mappings, MiB of a sparse mapping of which 100 pages are used, MiB of random memory
SERIES = {
    "descriptors": [(n, 1, 0, 1) for n in (1000, 3000, 10_000)],
    "mappings": [(10, n, 0, 1) for n in (2000, 6000, 20_000)],
    "MiB sparse": [(10, 1, n, 1) for n in (16, 256, 2048)],
    "MiB random": [(10, 1, 0, n) for n in (64, 256, 1024)],
}


def start(folder: Path, amounts: tuple[int, ...]) -> int:
    """Start the program; its pid when it has all of it."""
    run = folder / "run"
    run.mkdir()
    words = [str(PROGRAM), str(run), *map(str, amounts)]
    command = [*TOOL, "run", "--userns", "--detach", "--pidfile", str(folder / "pid"), "--"]
    with (folder / "log").open("w") as out:
        subprocess.run([*command, sys.executable, "-S", "-E", *words], check=True, stdout=out, stderr=out)
    pid = int((folder / "pid").read_text())
    wait_for(pid, (run / "ready.main").exists, folder / "log")
    return pid


def bare(pid: int) -> float:
    """Milliseconds to read what /proc says of its descriptors and mappings, and nothing else."""
    begin = time.monotonic()
    for number in os.listdir(f"/proc/{pid}/fd"):
        os.readlink(f"/proc/{pid}/fd/{number}")
        Path(f"/proc/{pid}/fdinfo/{number}").read_bytes()
    Path(f"/proc/{pid}/smaps").read_bytes()
    return 1e3 * (time.monotonic() - begin)


def main(folder: Path) -> None:
    """Measure and print a table for each thing."""
    idle = idle_bytes()
    for what, series in SERIES.items():
        position = list(SERIES).index(what)
        print(f"{what:>12} {'bare':>7} {'frozen':>8} {'dump':>8} {'restore':>8}  ms; dumper's memory, image")
        for amounts in series:
            pid = start(folder, amounts)
            try:
                read = bare(pid)
                image = str(folder / "image")
                dumped = measured("dump", "--pid", str(pid), "--to", image)
                kill(pid)
                restored = measured("restore", "--from", image, "--detach")
            finally:
                kill(pid)
                shutil.rmtree(folder / "image", ignore_errors=True)
                shutil.rmtree(folder / "run")
            print(
                f"{amounts[position]:>12} {read:7.0f} {dumped['downtime']:8.0f} {dumped['command-time']:8.0f} "
                f"{restored['command-time']:8.0f}  {(dumped['peak-bytes'] - idle) / 1e6:.0f} MB, "
                f"{dumped['transferred'] / 1e6:.1f} MB",
                flush=True,
            )
