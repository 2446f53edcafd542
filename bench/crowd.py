"""Many processes: what each costs, which should not grow with their number."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.commands import measured
from bench.extent import Extent
from bench.matrix import Case, Sample
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, Workshop, reap


def cases(extent: Extent) -> list[Case]:
    """One for each number."""
    return [
        Case("crowd", f"{count} processes", partial(_there_and_back, count), {"processes": count})
        for count in extent.processes
    ]


def _there_and_back(count: int, folder: Path) -> Sample:
    image = folder / "image"
    with ExitStack() as stack:
        workshop = Workshop()
        stack.callback(workshop.remove)
        tree = Tree.start(workshop, "crowd", DEPTH_1, ("1", str(count)))
        stack.callback(tree.kill)
        family = tree.pids()
        dumped = measured("dump", "--pid", str(tree.pid), "--to", image)
        assert not reap(family), "the dump has not ended the tree"
        # of hundreds of pids one would be somebody else's by now
        again = measured("restore", "--from", image, "--detach", "--new-pidns")
        tree.pid = again["root-pid"]
        everybody = len(tree.pids()) == len(family)
        tree.check()
        checks = {"all are there": everybody, "all go on to count": True}
    return Sample(
        {
            "frozen-ms": dumped["downtime"],
            "frozen-each-ms": dumped["downtime"] / count,
            "restore-own-ms": again["total-time"],
            "restore-each-ms": again["total-time"] / count,
        },
        checks,
    )
