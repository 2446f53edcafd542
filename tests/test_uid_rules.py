"""Routing rules for ranges of uids: numbers of the user namespace that owns the network."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.networks import shell
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, engine, restore, said

pytestmark = pytest.mark.root


def inside(tree: Tree, *words: str) -> str:
    """What `ip` says in the network and the user namespace of a tree."""
    user = Path(f"/proc/{tree.pid}/ns/user")
    also = [] if user.samefile("/proc/self/ns/user") else ["--user"]
    command = ["nsenter", f"--target={tree.pid}", *also, "--net", "ip", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rules(tree: Tree) -> str:
    return inside(tree, "rule", "show") + inside(tree, "-6", "rule", "show")


def add_rules(tree: Tree) -> None:
    """Two with uids between others without, of one priority: their order counts."""
    for words in ("uidrange 5-9 from 10.0.0.1", "from 10.0.0.2", "from 10.0.0.3 uidrange 5-9"):
        inside(tree, "rule", "add", "pref", "77", "table", "9", *words.split())
    inside(tree, "-6", "rule", "add", "table", "10", "uidrange", "0-99")


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_uids_of_rules_stay_what_they_are_inside(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    tree = start("echoing", setting)
    add_rules(tree)
    before = rules(tree)
    assert before.count("uidrange 5-9") == 2
    dump(tree, tmp_path / "image")
    restore(tree, tmp_path / "image")
    assert rules(tree) == before
    tree.check()


@pytest.mark.parametrize(
    ("setting", "first"), [(DEPTH_1, 3_000_000), (DEPTH_2, 3_001_000)], ids=["depth1", "depth2"]
)
def test_uids_of_rules_lie_where_the_tree_lies(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, first: int
) -> None:
    tree = start("echoing", setting)
    add_rules(tree)
    before = rules(tree)
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--map", "3000000:65536")
    assert done.returncode == 0, said(done)
    assert rules(tree) == before
    outside = shell(f"/proc/{tree.pid}/ns/net", "ip rule show")
    assert outside.count(f"uidrange {first + 5}-{first + 9}") == 2
    tree.check()


def test_uids_of_a_network_of_the_surroundings_are_refused_elsewhere(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("echoing", DEPTH_0)
    add_rules(tree)
    dump(tree, tmp_path / "image")
    options = ["--map", "3000000:65536", "--unmapped", "overflow"]
    done = engine("restore", "--from", tmp_path / "image", "--detach", *options)
    assert done.returncode == 3, said(done)
    assert "has routing rules for uids, and --map gives these other numbers" in done.stderr
