"""Trees of which somebody kills a part: while they are looked at, built, or when they are about to run.

As a program: the command line of the pipeline, with the first tree that comes to that step: ``STEP PART command ...``.
With PART ``nothing`` nobody is killed there, but the program makes a mistake.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.stages.capture import Capture
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.rebuild import Rebuilding
from pipeline.standstill import Standstill

#: what a mistake of the program says
MISTAKE = "a mistake of ours"
#: of the processes, parents first
PARTS = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}


class _Step(NamedTuple):
    """A method before which, or behind which, somebody kills; and whom there is to kill."""

    of: type
    name: str
    is_behind: bool
    pids: Callable[..., Sequence[HostPid]]


def _built(rebuilding: Rebuilding, *_: object) -> Sequence[HostPid]:
    return [grown.puppet.pid for grown in rebuilding.growth.grown.values()]


def _looked_at(_: Capture, frozen: FrozenTree) -> Sequence[HostPid]:
    return [process.pid for process in frozen.living()]


def _captured(still: Standstill, *_: object) -> Sequence[HostPid]:
    return [process.pid for process in still.tree.living()]


_STEPS = {
    "look": _Step(Capture, "take", False, _looked_at),
    "seen": _Step(Capture, "take", True, _looked_at),
    "read": _Step(Standstill, "__init__", True, _captured),
    "fill": _Step(Rebuilding, "memory_of", True, _built),
    **{
        name: _Step(Rebuilding, name, False, _built)
        for name in ("make_threads", "equip_early", "change", "complete", "thaw")
    },
}


@contextmanager
def killed(step: str, part: str, time_of_it: int = 1) -> Iterator[None]:
    """In the block a part (see `PARTS`) of the first tree is dead when it comes to a step, the n-th time."""
    one = _STEPS[step]
    act: Callable[..., Any] = getattr(one.of, one.name)
    times = 0

    def late(self: Any, *args: Any) -> Any:
        nonlocal times
        times += 1
        if times == time_of_it and part == "nothing":
            raise KeyError(MISTAKE)
        if times == time_of_it and not one.is_behind:
            _kill(one.pids(self, *args)[PARTS[part]])
        result = act(self, *args)
        if times == time_of_it and one.is_behind:
            _kill(one.pids(self, *args)[PARTS[part]])
        return result

    setattr(one.of, one.name, late)
    try:
        yield
    finally:
        setattr(one.of, one.name, act)


def _kill(pids: Sequence[HostPid]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while not all(map(procfs.is_exiting, pids)):
        time.sleep(0.01)


if __name__ == "__main__":
    from pipeline.cli.main import main

    _, chosen, of_it, *sys.argv[1:] = sys.argv
    with killed(chosen, of_it):
        sys.exit(main())
