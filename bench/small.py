"""A small program: how long it stands still, and whole commands, the start of their interpreter included."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from bench.commands import Writer, measured, migrated, restored, serving
from bench.criu import Criu
from bench.matrix import Case, Failed, Sample
from pipeline import events
from tests.harness.hosts import write_secret
from tests.harness.tree import reap

_MIB = 1
#: trees that a server restores, one after the other: the first also pays for what is imported late
_TREES = 4


def cases(criu: Criu) -> list[Case]:
    """Commands, and a server that runs already."""
    return [
        Case("small", "dump and restore", partial(_there_and_back, criu)),
        Case("small", "restore in a running serve", _served),
    ]


def _there_and_back(criu: Criu, folder: Path) -> Sample:
    image = folder / "image"
    figures = {
        "bare-python-ms": _starts("pass"),
        "bare-python-with-trio-ms": _starts("import trio, msgspec, msgpack, xxhash"),
    }
    with Writer.started(folder, _MIB) as writer:
        stopped = measured(
            "dump", "--pid", str(writer.pid), "--to", folder / "stopped", "--mode", "stop", "--leave-running"
        )
        dumped = measured("dump", "--pid", str(writer.pid), "--to", image)
        reap([writer.pid])
        again = restored(image)
        is_whole = writer.is_whole()
    figures |= {
        "frozen-ms": dumped["downtime"],
        "stop-frozen-ms": stopped["downtime"],
        "collect-ms": dumped["collect-time"],
        "dump-ms": dumped["command-time"],
        "restore-ms": again["command-time"],
        "restore-own-ms": again["total-time"],
        "page-bytes": dumped["page-bytes"],
    }
    checks = {"its memory is what it was": is_whole}
    if criu.why_not is None:
        with Writer.started(folder, _MIB, nested=False) as writer:
            figures |= criu.there_and_back(writer, folder)
            checks["what CRIU restored, too"] = writer.is_whole()
    return Sample(figures, checks)


def _starts(program: str) -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    return 1e3 * (time.monotonic() - begin)


def _served(folder: Path) -> Sample:
    """From the records of a tree being there to its running, its source's end included, as `serve` logs it."""
    secret = write_secret(folder / "secret")
    is_whole = True
    with serving(folder, secret) as server:
        for _ in range(_TREES):
            with Writer.started(folder, _MIB) as writer:
                migrated(writer, server, secret, ("--mode", "stop"))
                is_whole = is_whole and writer.is_whole()
        first, *others = _restores_ms(server.events)
    if len(others) != _TREES - 1:
        raise Failed(f"serve has logged {1 + len(others)} trees of {_TREES}")
    return Sample(
        {"restore-in-serve-ms": min(others), "first-restore-in-serve-ms": first},
        {"their memory is what it was": is_whole},
    )


def _restores_ms(log: Path) -> list[float]:
    """How long each tree took, by the events of a `serve`."""
    found = []
    begun_s = 0.0
    for line in log.read_bytes().splitlines():
        match events.parse(line):
            case events.Phase(name="rebuild") as phase:
                begun_s = phase.t
            case events.Restored() as tree:
                found.append(1e3 * (tree.t - begun_s))
            case _:
                continue
    return found
