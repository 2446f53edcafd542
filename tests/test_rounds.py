"""One tree through many dumps and restores, and through migrations: nothing wears off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import carry, unharmed
from tests.harness.hosts import Host, migrate
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, engine, said

pytestmark = pytest.mark.root

ROUNDS = 10


@pytest.mark.parametrize(
    ("program", "setting"),
    [("processes", DEPTH_2), ("pipes", DEPTH_1), ("threads", CONTAINER_2)],
    ids=["processes-depth2", "pipes-depth1", "threads-container2"],
)
def test_ten_rounds_of_one_tree(
    start: Callable[..., Tree], tmp_path: Path, program: str, setting: Setting
) -> None:
    tree = start(program, setting)
    sizes = []
    for number in range(ROUNDS):
        image = tmp_path / f"image{number}"
        carry(tree, image)
        sizes.append(sum(path.stat().st_size for path in image.iterdir()))
    assert sizes[-1] < sizes[1] * 1.1, f"the image grows from round to round: {sizes}"
    assert tree.end() == 0


def test_dump_that_leaves_running_ten_times(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("blocked", DEPTH_1)
    with unharmed(tree):
        for number in range(ROUNDS):
            done = engine("dump", "--pid", tree.pid, "--to", tmp_path / f"image{number}", "--leave-running")
            assert done.returncode == 0, said(done)


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", ["processes", "threads", "anonymous", "sharing"])
def test_migration_between_two_hosts(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], program: str, setting: Setting
) -> None:
    source, destination = hosts
    tree = start_on(source, program, setting)
    migrate(source, destination, tree, secret)
    tree.check()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_sleeps_last_through_several_rounds(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    """After the first round the kernel is in restart_syscall(2), and only the place where it sleeps tells in what."""
    tree = start("asleep", setting)
    for number in range(2):
        carry(tree, tmp_path / f"image{number}")
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "running", "--leave-running")
    assert done.returncode == 0, said(done)
    carry(tree, tmp_path / "last")
    deadline = time.monotonic() + 40
    while len(list(Path(f"/proc/{tree.pid}/task").iterdir())) > 1:
        assert time.monotonic() < deadline
        tree.check()
        time.sleep(0.2)
    tree.check()
    assert tree.end() == 0
