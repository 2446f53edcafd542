"""The machine that was measured on, described: figures say nothing without it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def describe() -> dict[str, Any]:
    """Processor, cores, memory (bytes), kernel, Python, load averages of now, date, and the commit that is measured."""
    return {
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory-bytes": 1024 * int(_field("/proc/meminfo", "MemTotal").split()[0]),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
        "date": time.strftime("%FT%TZ", time.gmtime()),
        "commit": _commit(),
    }


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return 1024 * int(_field("/proc/meminfo", "MemAvailable").split()[0])


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0 (unknown)"


def _commit() -> str:
    """With ``+`` behind it: and what is changed in the work tree."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
