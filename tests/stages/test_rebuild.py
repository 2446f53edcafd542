"""The rebuild as a whole: what is refused before a process is made, and what stops nothing any more."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import pipeline
from pipeline.errors import RebuildError
from pipeline.image.frames import PageRun
from pipeline.ledger import LEDGER
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.stages import building, fill, rebuild
from pipeline.stages.places import Place
from tests.harness.tree import Tree, dump, restore

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vdso": b"\1" * 32}, "the vdso of this kernel"),
        ({"xfeatures": 1 << 62}, "extended state"),
        ({"xstate_size_bytes": 17}, "extended state"),
    ],
)
def test_foreign_head_is_refused(
    start: Callable[..., Tree],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
) -> None:
    tree = start("quiet")
    dump(tree, tmp_path / "image")

    class Foreign(rebuild.Rebuilding):
        def prepare(self) -> None:
            self._image._head = msgspec.structs.replace(self._image.head, **changes)
            super().prepare()

    async def attempt() -> None:
        await pipeline.restore(str(tmp_path / "image"), detach=True)

    with monkeypatch.context() as patch:
        patch.setattr(building, "Rebuilding", Foreign)
        with pytest.raises(RebuildError, match=words):
            trio.run(attempt)
    assert not LEDGER.held()
    restore(tree, tmp_path / "image")
    tree.check()


def test_a_connection_that_fails_when_the_tree_is_let_run_is_said(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a migration the source has ended by then."""
    tree = start("quiet")
    dump(tree, tmp_path / "image")

    def fails(keepers: Keepers) -> None:
        raise RebuildError("a connection with the surroundings: no such cable")

    async def attempt() -> list[str]:
        restored = await pipeline.restore(str(tmp_path / "image"), detach=True)
        restored.close()
        return restored.notes

    with monkeypatch.context() as patch:
        patch.setattr(Keepers, "connect_networks", fails)
        assert trio.run(attempt) == ["a connection with the surroundings: no such cable"]
    tree.check()


def test_pages_that_cannot_be_written_are_said_and_nothing_is_left(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = start("quiet")
    dump(tree, tmp_path / "image")

    def fails(place: Place, run: PageRun) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(fill, "write_run", fails)
        with pytest.raises(
            RebuildError, match=r"memory of pid \d+: its pages cannot be written: Input/output"
        ):
            trio.run(partial(pipeline.restore, str(tmp_path / "image"), detach=True))
    assert not LEDGER.held()
    restore(tree, tmp_path / "image")
    tree.check()
