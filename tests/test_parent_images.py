"""Images that refer to pages of earlier ones: each is whole with them, and says so without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import unharmed
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, engine, reap, restore, said

pytestmark = pytest.mark.root

LARGE = ("0", "20", "64", "64")
SHARED = ("0", "0", "0", "0", "64")
ROUNDS = ("--mode", "precopy")


def bytes_of(image: Path) -> int:
    return sum(path.stat().st_size for path in image.iterdir())


def keep(tree: Tree, image: Path, *options: object) -> dict[str, float]:
    """Dump a tree that goes on; the figures."""
    done = engine("dump", "--pid", tree.pid, "--to", image, *ROUNDS, "--leave-running", "--json", *options)
    assert done.returncode == 0, said(done)
    found = json.loads(done.stdout)
    assert not found["notes"]
    figures: dict[str, float] = found["figures"]
    return figures


@pytest.mark.parametrize("options", [(), ("--lazy",)], ids=["whole", "lazy"])
@pytest.mark.parametrize("amounts", [LARGE, SHARED], ids=["private", "shared"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_what_has_not_changed_is_not_stored_again(
    start: Callable[..., Tree],
    tmp_path: Path,
    setting: Setting,
    amounts: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    tree = start("large", setting, amounts)
    first, second = tmp_path / "first", tmp_path / "second"
    with unharmed(tree):
        keep(tree, first, *(() if options else ("--digests",)))
        dump(tree, second, *ROUNDS, "--parent", str(first))
        assert bytes_of(second) < bytes_of(first) / 5
        restore(tree, second, *options)


@pytest.mark.parametrize("program", ["rewriting", "turning", "sharing", "processes"])
def test_each_of_several_generations_is_whole(
    start: Callable[..., Tree], tmp_path: Path, program: str
) -> None:
    """Also behind a restore, which puts the same pages into other processes."""
    tree = start(program, DEPTH_2)
    last = tmp_path / "0"
    dump(tree, last, *ROUNDS)
    for number in range(1, 5):
        restore(tree, last, *(("--lazy",) if number == 3 else ()))
        tree.check()
        image = tmp_path / str(number)
        dump(tree, image, *ROUNDS, "--parent", str(last), "--max-downtime", "1us", "--max-rounds", "3")
        last = image
    restore(tree, last)
    tree.check()
    done = engine("inspect", last, "--json")
    assert done.returncode == 0, said(done)
    layers = json.loads(done.stdout)["layers"]
    assert len(layers) > 1, "it refers to none of its parents"
    assert len({(layer["at"], layer["name"]) for layer in layers}) == len(layers)


def test_an_image_and_its_parent_may_move_together(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("large", DEPTH_1, LARGE)
    before = tmp_path / "before"
    keep(tree, before / "first")
    dump(tree, before / "second", *ROUNDS, "--parent", str(before / "first"))
    before.rename(tmp_path / "after")
    restore(tree, tmp_path / "after" / "second")
    tree.check()


@pytest.mark.parametrize("what", ["gone", "another"])
def test_without_its_parent_an_image_restores_nothing(
    start: Callable[..., Tree], tmp_path: Path, what: str
) -> None:
    tree = start("large", DEPTH_1, LARGE)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    keep(tree, first)
    keep(tree, third)
    family = tree.pids()
    dump(tree, second, *ROUNDS, "--parent", str(first))
    first.rename(tmp_path / "hidden")
    if what == "another":
        third.rename(first)
    for command in (
        ["restore", "--detach", "--from"],
        ["restore", "--lazy", "--detach", "--from"],
        ["inspect"],
    ):
        done = engine(*command, second)
        assert done.returncode == 1, said(done)
        assert "first" in done.stderr
        assert "Traceback" not in done.stderr
    assert not reap(family)
    if what == "another":
        first.rename(third)
    (tmp_path / "hidden").rename(first)
    restore(tree, second)
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_any_image_is_a_parent(start: Callable[..., Tree], tmp_path: Path, mode: str) -> None:
    """Without digests it is read; what refers to it has them."""
    tree = start("large", DEPTH_1, LARGE)
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", first, "--mode", mode, "--leave-running")
        assert done.returncode == 0, said(done)
        keep(tree, second, "--parent", first)
        dump(tree, third, "--parent", str(second))
        assert bytes_of(second) < bytes_of(first) / 5
        assert bytes_of(third) < bytes_of(first) / 5
        restore(tree, third)


def test_a_parent_is_there_and_goes_with_rounds(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet", DEPTH_1)
    second = tmp_path / "second"
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", second, "--parent", tmp_path / "none")
        assert done.returncode == 1, said(done)
        done = engine(
            "dump", "--pid", tree.pid, "--to", second, "--mode", "stop", "--parent", tmp_path / "none"
        )
        assert done.returncode == 2, said(done)
    assert not second.exists()
