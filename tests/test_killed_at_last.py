"""A tree that somebody kills when it is about to run: nothing of it is left, it is said, and who served it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import blocking
from pipeline.errors import RebuildError
from tests.harness.hosts import Host, inner_pid, serving
from tests.harness.killing import PARTS, killed_at_last
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, dump, reap, restore, said

pytestmark = pytest.mark.root


@pytest.mark.parametrize("options", [{}, {"lazy": True}, {"new_pidns": True}], ids=["whole", "lazy", "pidns"])
@pytest.mark.parametrize("part", PARTS)
def test_a_restore(start: Callable[..., Tree], tmp_path: Path, part: str, options: dict[str, bool]) -> None:
    tree = start("processes", DEPTH_1)
    family = tree.pids()
    dump(tree, tmp_path / "image")
    with killed_at_last(part), pytest.raises(RebuildError, match="was ended when it was about to run"):
        blocking.restore(str(tmp_path / "image"), detach=True, **options)
    assert not reap(family)
    assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")]
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy", "postcopy"])
@pytest.mark.parametrize("part", ["first", "last"])
def test_a_migration(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], part: str, mode: str
) -> None:
    source, destination = hosts
    lost = start_on(source, "processes", DEPTH_1)
    family = lost.pids()
    with serving(destination, secret, tool=("tests.harness.killing", part)) as server:
        to = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        done = source.engine("migrate", "--pid", str(inner_pid(lost.pid)), *to)
        assert done.returncode == 4, said(done)
        assert "the tree is ended here, and does not run there" in done.stderr
        assert "was ended when it was about to run" in done.stderr
        assert not reap(family)
        assert server.process.poll() is None
        again = start_on(source, "threads", DEPTH_1)
        root, family = inner_pid(again.pid), again.pids()
        done = source.engine("migrate", "--pid", str(root), *to)
        assert done.returncode == 0, said(done)
        assert not reap(family)
        again.pid = destination.outer_pid(root)
        again.check()
