"""Images whose trees run before their memory is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import unharmed
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, engine, reap, restore, said

pytestmark = pytest.mark.root

LARGE = ("0", "20", "64", "64")


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
def test_a_large_memory_comes_behind(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, codec: str
) -> None:
    tree = start("large", setting, LARGE)
    family = tree.pids()
    image = tmp_path / "image"
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", image, "--compress", codec)
        assert done.returncode == 0, said(done)
        assert not reap(family), "the dump left it running"
        restore(tree, image, "--lazy")


@pytest.mark.parametrize("program", ["rewriting", "processes", "sharing", "threads"])
def test_a_tree_that_never_rests_has_every_page(
    start: Callable[..., Tree], tmp_path: Path, program: str
) -> None:
    tree = start(program, DEPTH_2)
    for number in range(3):
        image = tmp_path / str(number)
        dump(tree, image)
        restore(tree, image, "--lazy")
        tree.check()


def test_it_runs_before_its_memory_is_there(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("large", DEPTH_1, LARGE)
    image = tmp_path / "image"
    dump(tree, image)
    done = engine("restore", "--from", image, "--detach", "--lazy", "--json", "--events", tmp_path / "events")
    assert done.returncode == 0, said(done)
    found = json.loads(done.stdout)
    tree.pid = found["root_pid"]
    tree.check()
    assert found["figures"]["start-time"] <= found["figures"]["total-time"]
    names = [json.loads(line).get("name") for line in (tmp_path / "events").read_text().splitlines()]
    assert names.index("thaw") < names.index("postcopy")


def test_a_tree_whose_image_is_damaged_is_ended(start: Callable[..., Tree], tmp_path: Path) -> None:
    """The damage is among the pages that come when it runs already."""
    tree = start("large", DEPTH_1, LARGE)
    family = tree.pids()
    image = tmp_path / "image"
    dump(tree, image)
    with (image / "image").open("r+b") as file:
        middle = os.fstat(file.fileno()).st_size // 2
        file.seek(middle)
        old = file.read(1)
        file.seek(middle)
        file.write(bytes([old[0] ^ 1]))
    done = engine("restore", "--from", image, "--detach", "--lazy")
    assert done.returncode == 1, said(done)
    assert "the checksum does not fit" in done.stderr
    assert not reap(family), "it runs on with pages missing"


def test_what_cannot_be_read_in_any_order_is_not_lazy() -> None:
    done = engine("restore", "--from", "s3://nowhere/image", "--lazy")
    assert done.returncode == 2, said(done)
    assert "needs an image in a directory" in done.stderr


def test_who_cannot_answer_page_faults_is_told(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("anonymous", DEPTH_1)
    image = tmp_path / "image"
    dump(tree, image)
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/userfaultfd && exec "$@"', "-"]
    done = engine("restore", "--from", image, "--detach", "--lazy", within=hidden)
    assert done.returncode == 1, said(done)
    assert "page faults of programs cannot be answered here" in done.stderr
    restore(tree, image)
    tree.check()
