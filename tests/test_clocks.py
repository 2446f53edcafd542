"""Clocks of a tree that moves to another boot: they go on from what they said, by a time namespace around the tree.

The source is played by a time namespace in which both the tree and the dump live, and whose clocks are far ahead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.image.schema import Head, Memberships
from pipeline.policy import Clocks
from pipeline.resources.namespaces import clocks
from pipeline.resources.namespaces.clocks_here import ClocksHere
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, Workshop, dump, engine, reap, restore, said

AHEAD_S = 500_000
_AHEAD = f"""
import ctypes, os, sys
assert ctypes.CDLL(None).unshare(0x80) == 0
with open("/proc/self/timens_offsets", "w") as file:
    file.write("monotonic {AHEAD_S} 0\\nboottime {2 * AHEAD_S} 0\\n")
child = os.fork()
if child == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
os.waitpid(child, 0)
"""
#: runs a command where clocks are ahead
AHEAD = (sys.executable, "-c", _AHEAD)


@pytest.fixture
def moved(
    nothing_left_behind: None, workshop: Workshop, tmp_path: Path
) -> Iterator[Callable[[Setting], Tree]]:
    """Start `deadlines` where clocks are ahead, and dump it there: the tree is gone, its image is in `image`."""
    with ExitStack() as stack:

        def move(setting: Setting) -> Tree:
            tree = Tree.start(workshop, "deadlines", setting, within=AHEAD)
            stack.callback(tree.kill)
            tree.check()
            family = tree.pids()
            around = int(Path(f"/proc/{tree.pid}/stat").read_text().rpartition(")")[2].split()[1])
            done = subprocess.run(
                ["nsenter", f"--time=/proc/{tree.pid}/ns/time", sys.executable, "-m", "pipeline", "dump",
                 "--pid", str(tree.pid), "--to", str(tmp_path / "image")],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert not reap([*family, around])
            return tree

        yield move


def of_another_boot(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The engine on a host that says that it is another one."""
    script = (
        "import sys; from pipeline.resources.namespaces import clocks; clocks.boot_id = lambda: 'another'; "
        "from pipeline.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def restored(
    tree: Tree, image: Path, *options: str, run: Callable[..., subprocess.CompletedProcess[str]] = engine
) -> str:
    """Restore with options; what the command says."""
    pidfile = tree.directory / "pid"
    done = run("restore", "--from", image, "--detach", "--pidfile", pidfile, *options)
    assert done.returncode == 0, said(done)
    assert int(pidfile.read_text()) == tree.pid
    pidfile.unlink()
    return done.stderr


def has_own_clocks(tree: Tree) -> bool:
    return os.stat(f"/proc/{tree.pid}/ns/time").st_ino != os.stat("/proc/self/ns/time").st_ino


@pytest.mark.root
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_clocks_go_on_where_those_of_the_host_are_behind(
    moved: Callable[[Setting], Tree], tmp_path: Path, setting: Setting
) -> None:
    tree = moved(setting)
    assert "CLOCK_MONOTONIC" not in restored(tree, tmp_path / "image")
    assert has_own_clocks(tree)
    tree.check()
    dump(tree, tmp_path / "second")
    restore(tree, tmp_path / "second")
    assert has_own_clocks(tree)
    tree.check()
    assert tree.end() == 0


@pytest.mark.root
def test_clocks_of_a_tree_in_a_pid_namespace_made_around_it_go_on_twice(
    moved: Callable[[Setting], Tree], tmp_path: Path
) -> None:
    tree = moved(DEPTH_1)
    image = tmp_path / "image"
    for _ in range(2):
        pidfile = tree.directory / "pid"
        done = engine("restore", "--from", image, "--new-pidns", "--detach", "--pidfile", pidfile)
        assert done.returncode == 0, said(done)
        tree.pid = int(pidfile.read_text())
        pidfile.unlink()
        assert has_own_clocks(tree)
        tree.check()
        image = tmp_path / "next"
        if not image.exists():
            dump(tree, image)
    tree.kill()


@pytest.mark.root
def test_clocks_of_the_host_are_taken_and_said_where_a_person_wants_them(
    moved: Callable[[Setting], Tree], tmp_path: Path
) -> None:
    tree = moved(DEPTH_1)
    told = restored(tree, tmp_path / "image", "--clocks", "host")
    found = re.search(r"CLOCK_MONOTONIC of the tree jumps by (-\d+) s, as --clocks host wants it", told)
    assert found, told
    assert abs(int(found[1]) + AHEAD_S) < 100
    assert not has_own_clocks(tree)
    with open(f"/proc/{tree.pid}/timers", "rb") as timers:
        assert timers.read().count(b"ClockID") == 2
    tree.kill()


@pytest.mark.root
def test_clocks_are_kept_always_or_on_another_boot(
    nothing_left_behind: None, workshop: Workshop, tmp_path: Path
) -> None:
    tree = Tree.start(workshop, "deadlines", DEPTH_2)
    try:
        assert not has_own_clocks(tree)
        dump(tree, tmp_path / "two")
        restored(tree, tmp_path / "two", run=of_another_boot)
        assert has_own_clocks(tree)
        tree.check()
        dump(tree, tmp_path / "three")
        restored(tree, tmp_path / "three", "--clocks", "keep")
        assert has_own_clocks(tree)
        tree.check()
        assert tree.end() == 0
    finally:
        tree.kill()


HEAD = Head(
    version=1, machine="x", page_size_bytes=4096, xfeatures=0, xstate_size_bytes=0, vdso=bytes(32), kernel="",
    created_ns=0, root=1, monotonic_ns=10**15, boottime_ns=10**15, boot_id="another",
)  # fmt: skip
OUTSIDE = Memberships(
    user=0, pid=0, mnt=1, uts=2, ipc=3, net=4, cgroup=5, time=6, pid_for_children=0, time_for_children=6
)


class Powerless:
    """A launcher whose children may not make time namespaces."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.ended = 0

    def clone(self, _: int) -> Powerless:
        return self

    def syscall(self, *_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    def kill_and_reap(self) -> None:
        self.ended += 1


def test_where_no_time_namespace_can_be_made_the_jump_is_said_or_refused() -> None:
    launcher = Powerless()
    auto = ClocksHere(HEAD, "auto", 6, [OUTSIDE])
    auto.go_on(launcher)  # type: ignore[arg-type]
    (note,) = auto.notes
    assert "no time namespace can be made" in note
    assert auto.tree_ns(1) is None
    keep = ClocksHere(HEAD, "keep", 6, [OUTSIDE])
    with pytest.raises(RebuildError, match="--clocks keep"):
        keep.go_on(launcher)  # type: ignore[arg-type]
    assert launcher.ended == 2


def test_nothing_is_made_around_a_tree_that_lives_in_time_namespaces_of_its_own() -> None:
    inside = msgspec.structs.replace(OUTSIDE, time=9, time_for_children=9)
    launcher = Powerless()
    for wish in get_args(Clocks):
        here = ClocksHere(HEAD, wish, 6, [inside])
        here.go_on(launcher)  # type: ignore[arg-type]
        assert not here.notes
    assert launcher.ended == 0


def test_clocks_go_on_by_themselves_on_the_same_boot() -> None:
    ours = clocks.own_offsets_ns()
    offsets = (ours["monotonic"], ours["boottime"])
    head = msgspec.structs.replace(HEAD, boot_id=clocks.boot_id(), clock_offsets_ns=offsets)
    here = ClocksHere(head, "auto", 6, [OUTSIDE])
    here.go_on(Powerless())  # type: ignore[arg-type]
    assert not here.notes
    told = here.tree_ns(time.CLOCK_MONOTONIC)
    assert told is not None
    assert 0 <= time.monotonic_ns() - told < 10**9
    assert here.tree_ns(time.CLOCK_REALTIME) is None
    hidden = msgspec.structs.replace(head, boot_id="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "boot_id", lambda: "")
        assert ClocksHere(hidden, "auto", 6, [OUTSIDE]).tree_ns(1) is None, (
            "nobody knows whether it is the same"
        )
    other = msgspec.structs.replace(head, clock_offsets_ns=(offsets[0] + 1, offsets[1]))
    assert ClocksHere(other, "auto", 6, [OUTSIDE]).tree_ns(1) is None
