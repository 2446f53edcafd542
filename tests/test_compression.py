"""Dumps, restores and migrations of real programs with every codec; what the frames hold is what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.carry import unharmed
from tests.harness.hosts import Host, migrate
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop, engine, reap, restore, said

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


@pytest.fixture
def hosts(nothing_left_behind: None) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(Host())
            stack.callback(found[-1].close)
        yield found[0], found[1]


@pytest.mark.parametrize("program", ["zeroed", "sharing"])
@pytest.mark.parametrize("codec", CODECS)
def test_migration(
    hosts: tuple[Host, Host], workshop: Workshop, tmp_path: Path, codec: str, program: str
) -> None:
    source, destination = hosts
    secret = tmp_path / "secret"
    secret.write_text("a secret that is long enough for both sides\n")
    secret.chmod(0o600)
    tree = source.start(workshop, program, CONTAINER_2, first_pid=5000)
    migrate(source, destination, tree, secret, "--compress", codec)
    tree.check()


@pytest.mark.parametrize("streams", ["2", "4"])
def test_migration_over_several_connections(
    hosts: tuple[Host, Host], workshop: Workshop, tmp_path: Path, streams: str
) -> None:
    source, destination = hosts
    secret = tmp_path / "secret"
    secret.write_text("a secret that is long enough for both sides\n")
    secret.chmod(0o600)
    tree = source.start(workshop, "large", CONTAINER_2, first_pid=5000, arguments=["20", "20", "64", "64"])
    migrate(source, destination, tree, secret, "--streams", streams)
    tree.check()
