"""What tracking costs a program while its memory goes along in rounds, before it stands still.

The program computes all the time, and writes its memory at random. A write to a page that is tracked takes it into
the kernel once a round, and that is the slowdown: how much more of its own processor time is the kernel's than beside
a bare loop that sends the same memory in the same run. What it only waits for a processor does not count, and what
processors lose because they share caches and memory is the bare loop's, too. How much it computes in a second of its
processor time is told beside that: where machines are noisy, it says less.
"""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import bare
from bench.commands import Writer, migrated, serving
from bench.extent import Extent
from bench.matrix import Case, Failed, Sample
from bench.plain import too_large
from tests.harness.hosts import write_secret

#: how long it is looked at without anything beside, and the bare loop is repeated
_LOOK_S = 1.5
_COPIES = 2


def cases(extent: Extent) -> list[Case]:
    """A program that writes at the rate, by its own processor time; see `Extent.slowdown`."""
    return [
        Case(
            "slowdown",
            f"{mib} MiB, {rate} MB/s",
            partial(_measure, mib, rate),
            {"mib": mib, "rate-mb-s": rate},
            too_large(mib, _COPIES),
        )
        for mib, rate in extent.slowdown
    ]


def _measure(mib: int, rate: int, folder: Path) -> Sample:
    secret, events = write_secret(folder / "secret"), folder / "migrate.events"
    with Writer.started(folder, mib, rate, busy=True) as writer, serving(folder, secret) as server:
        begin = time.time()
        time.sleep(_LOOK_S)
        copied = time.time()
        while time.time() < copied + _LOOK_S:
            bare.send_rate(writer.pid)
        after = time.time()
        migrated(writer, server, secret, ("--mode", "precopy", "--events", str(events)))
        alone = _worked(writer.log, begin, copied)
        beside = _worked(writer.log, copied, after)
        tracked = _worked(writer.log, *_rounds(events))
        is_whole = writer.is_whole()
    return Sample(
        {
            "slowdown-percent": tracked.kernel_percent - beside.kernel_percent,
            "kernel-in-rounds-percent": tracked.kernel_percent,
            "kernel-beside-percent": beside.kernel_percent,
            "kernel-alone-percent": alone.kernel_percent,
            "steps-in-rounds": tracked.steps_per_s,
            "steps-beside": beside.steps_per_s,
            "steps-alone": alone.steps_per_s,
        },
        {"its memory is what it was": is_whole},
    )


class _Work(NamedTuple):
    """What a program did: steps in a second of its processor time, and how much of that time was the kernel's."""

    steps_per_s: float
    kernel_percent: float


def _worked(log: Path, begin: float, end: float) -> _Work:
    """What a program has told of its work between two times of day."""
    told = re.findall(r"^did (\d+) in ([\d.]+) kernel ([\d.]+) at ([\d.]+)$", log.read_text(), re.MULTILINE)
    found = [
        (int(steps), float(cpu), float(kernel))
        for steps, cpu, kernel, at in told
        if begin <= float(at) <= end
    ]
    if len(found) < 2 or found[-1][1] == found[0][1]:
        raise Failed(f"the program told too little within {end - begin:.3f} s")
    steps, cpu, kernel = (last - first for first, last in zip(found[0], found[-1], strict=True))
    return _Work(steps / cpu, 100 * kernel / cpu)


def _rounds(events: Path) -> tuple[float, float]:
    """When tracking and the first round began, and the last one ended, in times of day."""
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    origin = datetime.fromisoformat(lines[0]["time"]).timestamp()
    phases = {line["name"]: origin + line["t"] for line in lines if line["event"] == "phase"}
    return phases["draft"], phases["freeze"]
