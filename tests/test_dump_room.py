"""Storage for the memory of a tree is reserved before the tree stands still, and given back where it was too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import trio

import pipeline
from pipeline.progress import NullProgress
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree

pytestmark = pytest.mark.root

_BLOCK_BYTES = 512
MIB = 1 << 20
#: of random memory
RANDOM_MIB = 24


class _AtTheFreeze(NullProgress):
    """Looks at what the files below a directory take when the tree is going to be stopped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.taken_bytes = 0

    def phase(self, name: str) -> None:
        if name == "freeze":
            self.taken_bytes = sum(_taken_bytes(path) for path in self._directory.iterdir())


def _taken_bytes(path: Path) -> int:
    return path.stat().st_blocks * _BLOCK_BYTES


@pytest.mark.parametrize("compress", ["none", "lz4"])
def test_room_is_made_for_what_is_written_while_the_tree_stands_still(
    start: Callable[..., Tree],
    tmp_path: Path,
    compress: Literal["none", "lz4"],
) -> None:
    """Not where it is not known how much it will be."""
    tree = start("large", DEPTH_1, ["0", "0", "0", str(RANDOM_MIB)])
    image = tmp_path / "image"
    seen = _AtTheFreeze(image)

    async def dumped() -> pipeline.DumpResult:
        return await pipeline.dump(
            tree.pid, str(image), mode="stop", leave="running", compress=compress, progress=seen
        )

    figures = trio.run(dumped).figures
    written = sum(path.stat().st_size for path in image.iterdir())
    assert written > RANDOM_MIB * MIB
    assert (seen.taken_bytes >= RANDOM_MIB * MIB) == (compress == "none")
    assert sum(map(_taken_bytes, image.iterdir())) < written + MIB
    assert figures["page-bytes"] > RANDOM_MIB * MIB
    tree.check()
