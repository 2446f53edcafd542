"""Trees that somebody kills, or a part of them, when they are about to run.

As a program: the command line of the pipeline, with the first tree that it lets run: ``PART command ...``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.stages.rebuild import Rebuilding

#: the first and the last process, and all
PARTS = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}


@contextmanager
def killed_at_last(part: str) -> Iterator[None]:
    """In the block a part (see `PARTS`) of the first tree is dead when it is let run."""
    thaw = Rebuilding.thaw

    def late(rebuilding: Rebuilding) -> HostPid:
        Rebuilding.thaw = thaw  # type: ignore[method-assign]
        victims = rebuilding.victims()[PARTS[part]]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        while not all(map(procfs.is_exiting, victims)):
            time.sleep(0.01)
        return thaw(rebuilding)

    Rebuilding.thaw = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Rebuilding.thaw = thaw  # type: ignore[method-assign]


if __name__ == "__main__":
    from pipeline.cli.main import main

    _, chosen, *sys.argv[1:] = sys.argv
    with killed_at_last(chosen):
        sys.exit(main())
