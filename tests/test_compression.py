"""Dumps, restores and migrations of real programs with every codec; what the frames hold is what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import unharmed
from tests.harness.hosts import Host, migrate
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_2, Setting
from tests.harness.tree import Tree, engine, reap, restore, said

pytestmark = pytest.mark.root

CODECS = ("none", "lz4", "zstd", "auto")


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", ["zeroed", "sharing", "processes"])
@pytest.mark.parametrize("codec", CODECS)
def test_dump_and_restore(
    start: Callable[..., Tree], tmp_path: Path, codec: str, program: str, setting: Setting
) -> None:
    tree = start(program, setting)
    family = tree.pids()
    image = tmp_path / "image"
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", image, "--compress", codec, "--json")
        assert done.returncode == 0, said(done)
        assert not reap(family), "the dump left it running"
        found = json.loads(done.stdout)
        if codec in {"lz4", "zstd"} and program != "sharing":  # whose pages are noise
            assert found["compression"] == codec
            assert found["figures"]["compression-rate"] > 1
            assert found["figures"]["transferred"] < found["figures"]["page-bytes"]
        restore(tree, image)


@pytest.mark.parametrize("program", ["zeroed", "sharing"])
@pytest.mark.parametrize("codec", CODECS)
def test_migration(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], codec: str, program: str
) -> None:
    source, destination = hosts
    tree = start_on(source, program, CONTAINER_2)
    migrate(source, destination, tree, secret, "--compress", codec)
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy"])
@pytest.mark.parametrize("streams", ["2", "4"])
def test_migration_over_several_connections(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], streams: str, mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "large", CONTAINER_2, ["20", "20", "64", "64"])
    migrate(source, destination, tree, secret, "--streams", streams, "--mode", mode)
    tree.check()


def test_a_program_that_never_rests_over_several_connections(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    """A page of a later round comes behind that of an earlier one, whichever connections they take."""
    source, destination = hosts
    tree = start_on(source, "rewriting", CONTAINER_2, ["forks"])
    for _ in range(2):
        migrate(
            source, destination, tree, secret, "--streams", "3", "--mode", "precopy", "--max-rounds", "6",
            "--max-downtime", "1us", compare=False,
        )  # fmt: skip
        tree.check()
        source, destination = destination, source
