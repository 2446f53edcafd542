"""The rebuild as a whole: what is refused before a process is made, and what stops nothing any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import pipeline
from pipeline.errors import RebuildError
from pipeline.ledger import LEDGER
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.stages import building, rebuild
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
        def _check_processor_and_vdso(self) -> None:
            self._image._head = msgspec.structs.replace(self._image.head, **changes)
            super()._check_processor_and_vdso()

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
