"""Trees of which somebody kills a part while they are built, or when they are about to run.

As a program: the command line of the pipeline, with the first tree that comes to that step: ``STEP PART command ...``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.stages.rebuild import Rebuilding

#: of the processes, parents first
PARTS = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}
#: behind these steps, not before them
_BEHIND = frozenset({"memory_of"})


@contextmanager
def killed(step: str, part: str) -> Iterator[None]:
    """In the block a part (see `PARTS`) of the first tree is dead when it comes to a step of `Rebuilding`."""
    act: Callable[..., Any] = getattr(Rebuilding, step)

    def late(rebuilding: Rebuilding, *args: Any) -> Any:
        setattr(Rebuilding, step, act)
        result = act(rebuilding, *args) if step in _BEHIND else None
        _kill([grown.puppet.pid for grown in rebuilding.growth.grown.values()][PARTS[part]])
        return result if step in _BEHIND else act(rebuilding, *args)

    setattr(Rebuilding, step, late)
    try:
        yield
    finally:
        setattr(Rebuilding, step, act)


def _kill(pids: list[HostPid]) -> None:
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
