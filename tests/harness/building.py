"""A destination that takes its time: a tree whose draft is built, and does not say so before it is allowed.

As a program: the command line of the pipeline: ``DIRECTORY command ...``. In the directory it makes `BUILT`, and waits
for `GO_ON`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.stages.rebuild import Rebuilding

BUILT, GO_ON = "built", "go-on"


def slowly(directory: Path) -> None:
    """From now on trees are built that way."""
    make_threads = Rebuilding.make_threads

    def make_last(rebuilding: Rebuilding) -> None:
        make_threads(rebuilding)
        (directory / BUILT).touch()
        while not (directory / GO_ON).exists():
            time.sleep(0.01)

    Rebuilding.make_threads = make_last


if __name__ == "__main__":
    from pipeline.cli.main import main

    _, chosen, *sys.argv[1:] = sys.argv
    slowly(Path(chosen))
    sys.exit(main())
