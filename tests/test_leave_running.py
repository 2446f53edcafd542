"""`dump --leave-running`: the tree stands still until all of it was read, and not until that is stored."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import trio

import pipeline
from pipeline.errors import PipelineError
from pipeline.ids import HostPid
from pipeline.image.schema import Record
from pipeline.kernel import procfs
from pipeline.ledger import LEDGER
from pipeline.transport.framing import FrameWriter
from pipeline.transport.manifest import Manifest
from pipeline.transport.storage import Storage
from tests.harness.carry import unharmed
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, reap, restore

pytestmark = pytest.mark.root

Mode = Literal["stop", "precopy"]
#: the module of that name: in the package it is the function
MODULE = importlib.import_module("pipeline.dump")


def stand_still(tree: Tree) -> list[int]:
    """Who of it is traced, as all of it is that stands still."""
    return [pid for pid in tree.pids() if procfs.status(HostPid(pid)).tracer_pid]


async def until_it_runs(tree: Tree) -> None:
    while stand_still(tree):
        await trio.sleep(0.001)


@pytest.mark.parametrize("mode", ["stop", "precopy"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
def test_it_runs_on_before_the_image_is_complete(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, mode: Mode
) -> None:
    tree = start("processes", setting)
    family = tree.pids()
    write_manifest = MODULE.write_manifest

    async def written_late(storage: Storage, manifest: Manifest) -> None:
        with trio.fail_after(30):
            await until_it_runs(tree)
        await write_manifest(storage, manifest)

    monkeypatch.setattr(MODULE, "write_manifest", written_late)
    image = tmp_path / "image"
    with unharmed(tree):
        trio.run(partial(pipeline.dump, tree.pid, str(image), leave="running", mode=mode))
    assert tree.pids() == family
    tree.kill()
    restore(tree, image)
    tree.check()


def test_records_are_encoded_when_it_runs(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for all its pages meanwhile."""
    tree = start("sharing", DEPTH_1)
    stood = []
    write = FrameWriter.record

    async def record(writer: FrameWriter, record: Record) -> None:
        stood.append(stand_still(tree))
        await write(writer, record)

    monkeypatch.setattr(FrameWriter, "record", record)
    trio.run(partial(pipeline.dump, tree.pid, str(tmp_path / "image"), leave="running", mode="precopy"))
    assert len(stood) > len(tree.pids())
    assert not any(stood)


@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_what_is_to_end_stands_still_until_the_image_is_complete(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    tree = start("processes", DEPTH_1)
    family = tree.pids()
    write_manifest = MODULE.write_manifest
    seen = []

    async def written_late(storage: Storage, manifest: Manifest) -> None:
        await trio.sleep(0.2)
        seen.append(tree.pid in stand_still(tree))
        await write_manifest(storage, manifest)

    monkeypatch.setattr(MODULE, "write_manifest", written_late)
    trio.run(partial(pipeline.dump, tree.pid, str(tmp_path / "image"), mode=mode))
    assert seen == [True]
    assert not reap(family)
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_an_image_that_fails_behind_it_leaves_the_tree_running_and_nothing_else(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    tree = start("processes", DEPTH_1)

    async def fails(storage: Storage, manifest: Manifest) -> None:
        with trio.fail_after(30):
            await until_it_runs(tree)
        raise PipelineError("the disk is full")

    monkeypatch.setattr(MODULE, "write_manifest", fails)
    image = tmp_path / "image"
    with unharmed(tree), pytest.raises(PipelineError, match="the disk is full"):
        trio.run(partial(pipeline.dump, tree.pid, str(image), leave="running", mode=mode))
    assert not image.exists() or not list(image.iterdir())
    assert not LEDGER.held()
