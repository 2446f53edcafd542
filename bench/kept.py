"""Dumps of a program that goes on: at one stop, in rounds, and against an earlier image of which little has changed."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.commands import Writer, kill, longest_gap_ms, measured, restored
from bench.extent import Extent
from bench.matrix import Case, Sample
from bench.plain import too_large

_COPIES = 3
_SETTLE_S = 0.2


def cases(extent: Extent) -> list[Case]:
    """Every program, at rest and at its rate."""
    return [
        Case(
            "kept",
            f"{mib} MiB, {rate} MB/s",
            partial(_kept, mib, rate),
            {"mib": mib, "rate-mb-s": rate},
            too_large(mib, _COPIES),
        )
        for mib, usual in extent.live
        for rate in dict.fromkeys((0, usual))
    ]


def _kept(mib: int, rate: int, folder: Path) -> Sample:
    at_once, first, second = folder / "at-once", folder / "first", folder / "second"
    with Writer.started(folder, mib, rate) as writer:
        stopped, gap_ms = _dumped(writer, at_once, "--mode", "stop")
        shutil.rmtree(at_once)
        rounds, rounds_gap_ms = _dumped(writer, first, "--digests")
        again, again_gap_ms = _dumped(writer, second, "--parent", first)
        kill(writer.pid)
        restored(second)
        is_whole = writer.is_whole()
    shutil.rmtree(first)
    shutil.rmtree(second)
    return Sample(
        {
            "frozen-ms": stopped["downtime"],
            "gap-ms": gap_ms,
            "rounds-frozen-ms": rounds["downtime"],
            "rounds-first-stop-ms": rounds["draft-time"],
            "rounds-gap-ms": rounds_gap_ms,
            "rounds-total-ms": rounds["total-time"],
            "parent-frozen-ms": again["downtime"],
            "parent-gap-ms": again_gap_ms,
            "parent-total-ms": again["total-time"],
            "parent-written-bytes": again["transferred"],
        },
        {"its memory is what it was": is_whole},
    )


def _dumped(writer: Writer, image: Path, *options: str | Path) -> tuple[dict[str, Any], float]:
    """The figures of a dump, and the longest gap that the program felt."""
    since = time.time()
    figures = measured("dump", "--pid", str(writer.pid), "--to", image, "--leave-running", *options)
    time.sleep(_SETTLE_S)
    return figures, longest_gap_ms(writer.log, since)
