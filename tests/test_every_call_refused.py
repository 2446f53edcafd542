"""The kernel refuses one call after the other: nothing is left, and nothing is given back twice.

This is the failure that this project started from: a tool met an id without a mapping, gave up,
and its way out freed the same map twice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

import pipeline
from pipeline.errors import PipelineError
from pipeline.kernel.arch.x86_64 import NR
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call
from pipeline.remote.live import LiveTask
from pipeline.remote.puppet import Puppet
from tests.harness.settings import CLONE_NEWIPC, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUTS, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, family_of, reap, restore

pytestmark = pytest.mark.root

#: a tree on three levels, the innermost a container
ACROSS = Setting(
    "across", DEPTH_2.levels, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC, chain=True
)


class _Refusing:
    """Counts tables of calls run in puppets or live tasks; the kernel refuses table `at`. It refuses no close(2)."""

    def __init__(self, patch: pytest.MonkeyPatch, who: type[Puppet | LiveTask], at: int | None) -> None:
        self.count = 0
        refused: list[int] = []
        run = who.run

        def refusing(task: Any, calls: Sequence[Call]) -> None:
            self.count += any(call.number != NR.close for call in calls)
            if self.count == at and not refused:
                refused.append(at)
                raise OSError(errno.EPERM, "refused by the test")
            run(task, calls)

        patch.setattr(who, "run", refusing)


def _restore(image: Path, at: int | None) -> int:
    """Restore with call `at` refused; returns how many calls were made."""

    async def attempt() -> None:
        restored = await pipeline.restore(str(image), detach=True)
        restored.close()

    with pytest.MonkeyPatch.context() as patch:
        calls = _Refusing(patch, Puppet, at)
        try:
            trio.run(attempt)
        except (PipelineError, OSError):
            assert at is not None
        else:
            assert at is None, f"call {at} was refused, and nobody noticed"
    return calls.count


def test_restore_with_each_call_refused_leaves_nothing(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("namespaced", ACROSS)
    image = tmp_path / "image"
    family = tree.pids()
    dump(tree, image)
    total = _restore(image, None)
    assert total > 100
    tree.check()
    image = tmp_path / "again"
    dump(tree, image)
    others = set(family_of(os.getpid()))  # such as hosts that a fixture of other tests has made
    for at in range(1, total + 1):
        _restore(image, at)
        assert not LEDGER.held(), f"after call {at} of {total} was refused"
        assert not reap(family, 3.0), f"after call {at} of {total} was refused"
        left = set(family_of(os.getpid())) - others
        assert not left, f"after call {at} of {total} was refused"
    assert all(taken == given for taken, given in LEDGER.statistics().values())
    restore(tree, image)
    tree.check()


@pytest.mark.parametrize(("mode", "fewest"), [("stop", 4), ("precopy", 10)])
def test_dump_with_each_call_refused_leaves_the_tree_running(
    start: Callable[..., Tree], tmp_path: Path, mode: Literal["stop", "precopy"], fewest: int
) -> None:
    """Without rounds, where it cannot be tracked."""
    tree = start("threads", ACROSS)
    family = tree.pids()

    async def attempt(number: int) -> bool:
        try:
            result = await pipeline.dump(tree.pid, str(tmp_path / str(number)), mode=mode, leave="running")
        except (PipelineError, OSError):
            return False
        assert mode == "stop" or bool(result.notes) == (result.figures["dirty-sync-count"] == 0)
        return True

    at = count = refused = 0
    while count >= at:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            calls = _Refusing(patch, LiveTask, at)
            refused += not trio.run(attempt, at)
        count = calls.count
        tree.check()
        assert not LEDGER.held(), f"after call {at} was refused"
    assert at > fewest
    assert refused == at - 1 if mode == "stop" else 0 < refused < at - 1
    assert tree.pids() == family
    dump(tree, tmp_path / "whole", "--mode", mode)
    restore(tree, tmp_path / "whole")
    tree.check()
