"""A destination that takes its time: a tree whose draft is built, and does not say so before it is allowed.

As a program: the command line of the pipeline: ``DIRECTORY command ...``. In the directory it makes `BUILT`, and waits
for `GO_ON`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from pipeline import arriving
from pipeline.stages.rebuild import Rebuilding

BUILT, GO_ON = "built", "go-on"


def slowly(directory: Path) -> None:
    """From now on trees are built that way."""
    build = arriving.grown

    @asynccontextmanager
    async def grown(*args: Any) -> AsyncIterator[Rebuilding]:
        async with build(*args) as rebuilding:
            (directory / BUILT).touch()
            while not (directory / GO_ON).exists():
                await trio.sleep(0.01)
            yield rebuilding

    arriving.grown = grown


if __name__ == "__main__":
    from pipeline.cli.main import main

    _, chosen, *sys.argv[1:] = sys.argv
    slowly(Path(chosen))
    sys.exit(main())
