"""How the cost of a dump and a restore grows: one program that has much of one thing, at growing numbers.

Beside each stands a bare loop over the same program: what it takes to only read what /proc has of it.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.commands import idle_bytes, measured, restored
from bench.extent import Extent
from bench.matrix import Case, Sample
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, Workshop, reap

#: descriptors, mappings, MiB of a sparse mapping of which 100 pages are used, MiB of random memory; what is multiplied
_SERIES = {
    "descriptors": ((1000, 1, 0, 1), 0),
    "mappings": ((10, 2000, 0, 1), 1),
    "MiB sparse": ((10, 1, 200, 1), 2),
    "MiB random": ((10, 1, 0, 100), 3),
}


def cases(extent: Extent) -> list[Case]:
    """Every thing, times every factor."""
    found = []
    for what, (amounts, position) in _SERIES.items():
        for factor in extent.scale:
            much = [amount * (factor if n == position else 1) for n, amount in enumerate(amounts)]
            name = f"{much[position]} {what}"
            found.append(Case("scale", name, partial(_there_and_back, much), {what: much[position]}))
    return found


def _bare_ms(pid: int) -> float:
    """To read what /proc says of its descriptors and mappings, and nothing else."""
    begin = time.monotonic()
    for number in os.listdir(f"/proc/{pid}/fd"):
        os.readlink(f"/proc/{pid}/fd/{number}")
        Path(f"/proc/{pid}/fdinfo/{number}").read_bytes()
    Path(f"/proc/{pid}/smaps").read_bytes()
    return 1e3 * (time.monotonic() - begin)


def _there_and_back(amounts: list[int], folder: Path) -> Sample:
    image = folder / "image"
    with ExitStack() as stack:
        workshop = Workshop()
        stack.callback(workshop.remove)
        tree = Tree.start(workshop, "large", DEPTH_1, [str(amount) for amount in amounts])
        stack.callback(tree.kill)
        bare_ms = _bare_ms(tree.pid)
        family = tree.pids()
        dumped = measured("dump", "--pid", str(tree.pid), "--to", image)
        assert not reap(family), "the dump has not ended the tree"
        again = restored(image)
        tree.check()
    return Sample(
        {
            "bare-ms": bare_ms,
            "frozen-ms": dumped["downtime"],
            "dump-ms": dumped["command-time"],
            "restore-ms": again["command-time"],
            "dumper-above-idle-bytes": dumped["peak-bytes"] - idle_bytes(),
            "image-bytes": dumped["transferred"],
        },
        {"it has all that it had": True},
    )
