"""One place holds the image of one tree: whoever else dumps there is refused, and what fails last is no image."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline import blocking
from pipeline.errors import StorageError
from pipeline.ledger import LEDGER
from pipeline.transport import storage
from pipeline.transport.manifest import Manifest
from pipeline.transport.storage import MANIFEST, DirectoryStorage, Storage
from tests.harness.carry import unharmed
from tests.harness.settings import DEPTH_0, DEPTH_2, Setting
from tests.harness.tree import Tree, engine, restore, said

pytestmark = pytest.mark.root

#: the function has its name
MODULE = importlib.import_module("pipeline.dump")


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda one: one.name)
@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_of_two_dumps_to_one_place_one_is_refused(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, mode: str
) -> None:
    """The other one has found the place free; its tree is not touched, and what the first has written stays."""
    tree, other = start("anonymous", setting), start("anonymous", setting)
    image = tmp_path / "image"
    genuine = MODULE.write_manifest

    async def free(_: DirectoryStorage) -> None:
        """It was, when it was asked."""

    async def written(place: Storage, manifest: Manifest) -> None:
        with pytest.raises(pipeline.UsageError, match="another dump is writing an image there"):
            await pipeline.dump(other.pid, str(image), mode=mode)
        await genuine(place, manifest)

    monkeypatch.setattr(DirectoryStorage, "require_free", free)
    monkeypatch.setattr(MODULE, "write_manifest", written)
    with unharmed(tree), unharmed(other):
        trio.run(lambda: pipeline.dump(tree.pid, str(image), mode=mode))
        with pytest.raises(pipeline.UsageError, match="holds an image already"):
            blocking.dump(other.pid, str(image), mode=mode)
        restore(tree, image)
    assert not LEDGER.held()


def test_a_place_where_a_dump_was_killed_is_refused(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet")
    (tmp_path / storage.CLAIM).touch()
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path)
    assert done.returncode == 2, said(done)
    assert f"{tmp_path}: another dump is writing an image there" in done.stderr
    assert "if it was killed, remove what it has left (writing" in done.stderr
    tree.check()


def test_a_manifest_that_fails_at_its_very_end_leaves_no_image(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its name by then; without it there is no image, and nobody takes one for whole."""
    tree = start("anonymous")
    image = tmp_path / "image"

    def sync(_: Path) -> None:
        if (image / MANIFEST).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "_sync_directory", sync)
    with unharmed(tree), pytest.raises(StorageError, match="Input/output error"):
        blocking.dump(tree.pid, str(image))
    assert not image.exists()
    assert not LEDGER.held()
