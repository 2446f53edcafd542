"""What a program feels of being moved while it writes, by its size, its rate and the mode."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from bench.commands import Writer, longest_gap_ms, migrated, serving
from bench.extent import Extent
from bench.matrix import Case, Sample
from bench.plain import too_large
from tests.harness.hosts import write_secret

#: how long a program writes before it is moved, and after it was
_SETTLE_S = 0.5
_PARTS = ("freeze", "collect", "transfer", "finish", "thaw")
_COPIES = 2


def cases(extent: Extent) -> list[Case]:
    """Every program by every mode, and those whose memory is shared by one."""
    return [
        Case(
            "live",
            f"{mib} MiB{' shared' if shared else ''}, {rate} MB/s, {mode}",
            partial(_moved, mib, rate, mode, shared=shared),
            {"mib": mib, "rate-mb-s": rate, "mode": mode, "memory": "shared" if shared else "private"},
            too_large(mib, _COPIES),
        )
        for mib, rate in extent.live
        for mode, shared in [*((mode, False) for mode in extent.modes), ("precopy", True)]
    ]


def _moved(mib: int, rate: int, mode: str, folder: Path, *, shared: bool) -> Sample:
    secret = write_secret(folder / "secret")
    with (
        Writer.started(folder, mib, rate, shared=shared) as writer,
        serving(folder, secret) as server,
    ):
        begin = time.time()
        time.sleep(_SETTLE_S)
        before = longest_gap_ms(writer.log, begin)
        since = time.time()
        figures = migrated(writer, server, secret, ("--mode", mode))
        time.sleep(_SETTLE_S)
        felt = longest_gap_ms(writer.log, since)
        is_whole = writer.is_whole()
    return Sample(
        {
            "gap-ms": felt,
            "gap-before-ms": before,
            "downtime-ms": figures["downtime"],
            **{f"{part}-ms": figures[f"{part}-time"] for part in _PARTS},
            "total-ms": figures["total-time"],
            "sent-bytes": figures["transferred"],
            "rounds": figures.get("dirty-sync-count", 0),
            "pages-asked-for": figures.get("postcopy-requests", 0),
        },
        {"its memory is what it was": is_whole, "a gap was felt": felt > 0},
    )
