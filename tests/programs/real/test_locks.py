"""Locks of a tree that moves while source and destination share the files: they are handed over."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import find_python
from tests.programs.real.tree import RealTree, lines_of

pytestmark = pytest.mark.root

WAITS = "import fcntl, time; file = open('flock'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(100)"


def held(directory: Path) -> set[str]:
    """Which of the locks somebody has, seen from outside."""
    numbers = {str((directory / name).stat().st_ino): name for name in ("flock", "ofd", "posix")}
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        name = numbers.get(words[5].rpartition(":")[2]) if words[1] != "->" else None
        if name and words[3] == "WRITE" and words[1].lower().startswith(name):
            found.add(name)
    return found


@pytest.mark.parametrize("setting", [DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_locks_are_handed_over(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, [find_python(), "locking.py"], lines_of("counts"), sources=["locking.py"])
    tree.goes_on()
    everything = {"flock", "ofd", "posix"}
    assert held(tree.directory) == everything
    tree.carry(tmp_path / "image")
    assert held(tree.directory) == everything
    assert "lock" not in tree.migrate()
    assert held(tree.directory) == everything
    with (tree.directory / "posix").open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 12)
    tree.carry_running(tmp_path / "again")
    tree.finish()
    assert held(tree.directory) == set()


def test_a_lock_that_somebody_else_waited_for_is_told(launch: Callable[..., RealTree]) -> None:
    """Who is woken by the end of the source may be quicker than the destination, or not: one has it, and no other."""
    tree = launch(DEPTH_1, [find_python(), "locking.py"], lines_of("counts"), sources=["locking.py"])
    tree.goes_on()
    with subprocess.Popen([sys.executable, "-c", WAITS], cwd=tree.directory) as other:
        try:
            waits, has = f"-> FLOCK  ADVISORY  WRITE {other.pid} ", f": FLOCK  ADVISORY  WRITE {other.pid} "
            tree.wait("the other waits", lambda: waits in Path("/proc/locks").read_text())
            said = tree.migrate()
            assert "flock" in held(tree.directory)
            assert (has in Path("/proc/locks").read_text()) == (
                "its flock lock cannot be taken again: another process holds a lock that conflicts" in said
            )
        finally:
            other.kill()
    tree.finish()
