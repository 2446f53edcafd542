"""Dump to tmpfs and restore, by size: rates beside bare loops of the same moment, and the dumper's memory."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from bench import bare
from bench.commands import Writer, idle_bytes, measured, restored
from bench.criu import Criu
from bench.extent import Extent
from bench.machine import available_bytes
from bench.matrix import Case, Sample
from tests.harness.tree import reap

#: of a program's memory, the copies that there are at most at one time
_COPIES = 3


def cases(extent: Extent, criu: Criu) -> list[Case]:
    """One for each size."""
    return [
        Case(
            "plain", f"{mib} MiB", partial(_there_and_back, criu, mib), {"mib": mib}, too_large(mib, _COPIES)
        )
        for mib in extent.sizes
    ]


def too_large(mib: int, copies: int) -> str | None:
    """Why a program of that size cannot be measured here; None: it can."""
    needed, there = copies * mib << 20, available_bytes()
    return f"{needed >> 20} MiB are needed, and {there >> 20} available" if needed > there else None


def _there_and_back(criu: Criu, mib: int, folder: Path) -> Sample:
    image, bytes_only = folder / "image", folder / "bytes"
    with Writer.started(folder, mib) as writer:
        bare_dump = bare.dump_rate(writer.pid, bytes_only)
        bare_restore = bare.restore_rate(bytes_only)
        bytes_only.unlink()
        stopped = measured(
            "dump", "--pid", str(writer.pid), "--to", image, "--mode", "stop", "--leave-running"
        )
        shutil.rmtree(image)
        dumped = measured("dump", "--pid", str(writer.pid), "--to", image)
        reap([writer.pid])
        again = restored(image)
        checks = {"its memory is what it was": writer.is_whole()}
    dump_rate = 1e3 * dumped["page-bytes"] / dumped["total-time"]
    restore_rate = 1e3 * dumped["page-bytes"] / again["total-time"]
    figures = {
        "dump-ms": dumped["command-time"],
        "frozen-ms": dumped["downtime"],
        "stop-dump-ms": stopped["command-time"],
        "stop-frozen-ms": stopped["downtime"],
        "dump-rate": dump_rate,
        "bare-dump-rate": bare_dump,
        "dump-of-bare-ratio": dump_rate / bare_dump,
        "restore-ms": again["command-time"],
        "restore-own-ms": again["total-time"],
        "restore-rate": restore_rate,
        "bare-restore-rate": bare_restore,
        "restore-of-bare-ratio": restore_rate / bare_restore,
        "dumper-above-idle-bytes": dumped["peak-bytes"] - idle_bytes(),
    }
    if criu.why_not is None:
        for file in image.iterdir():
            file.unlink()
        with Writer.started(folder, mib, nested=False) as writer:
            theirs = criu.there_and_back(writer, folder)
            checks["what CRIU restored, too"] = writer.is_whole()
        figures |= theirs
        figures["dump-rate-of-criu-ratio"] = theirs["criu-dump-ms"] / dumped["command-time"]
        figures["restore-rate-of-criu-ratio"] = theirs["criu-restore-ms"] / again["command-time"]
    return Sample(figures, checks)
