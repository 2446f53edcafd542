"""The command line of the pipeline, as a program; what it serves runs, and its source hears of that `LATE_S` later."""

from __future__ import annotations

import sys
import time

from pipeline.ids import HostPid
from pipeline.stages.rebuild import Rebuilding

LATE_S = 2.0
_thaw = Rebuilding.thaw


def _then_wait(rebuilding: Rebuilding) -> HostPid:
    root = _thaw(rebuilding)
    time.sleep(LATE_S)
    return root


if __name__ == "__main__":
    from pipeline.cli.main import main

    Rebuilding.thaw = _then_wait  # type: ignore[method-assign]
    sys.exit(main())
