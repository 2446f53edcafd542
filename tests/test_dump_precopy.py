"""Dumps that store memory while the tree runs, and images whose pages lie in layers."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.kernel import userfaultfd
from pipeline.precopy import rounds_pay
from pipeline.progress import NullProgress, Round
from pipeline.stages import freeze
from tests.harness.carry import unharmed
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, reap, restore, said
from tests.test_carried_states import KINDS_OF_MEMORY

pytestmark = pytest.mark.root

LARGE = ("0", "20", "64", "64")
ROUNDS = ("--mode", "precopy")


@pytest.mark.parametrize("program", KINDS_OF_MEMORY)
def test_state_is_carried(start: Callable[..., Tree], tmp_path: Path, program: str) -> None:
    """At depth 1; see test_carried_states.py for all programs and the other depths."""
    tree = start(program, DEPTH_1)
    image = tmp_path / "image"
    with unharmed(tree):
        dump(tree, image, *ROUNDS)
        restore(tree, image)
    assert tree.end() == 0


@pytest.mark.parametrize("options", [(), ("--lazy",)], ids=["whole", "lazy"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_a_tree_that_never_rests_has_every_page(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, options: tuple[str, ...]
) -> None:
    """The rounds end only when there have been several, so that many pages are in the layer more than once."""
    tree = start("rewriting", setting)
    for number in range(3):
        image = tmp_path / str(number)
        dump(tree, image, *ROUNDS, "--max-downtime", "1us", "--max-rounds", "4")
        restore(tree, image, *options)
        tree.check()


@pytest.mark.parametrize("options", [(), ("--lazy",)], ids=["whole", "lazy"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_most_of_a_quiet_memory_is_stored_before_the_stop(
    start: Callable[..., Tree], tmp_path: Path, codec: str, options: tuple[str, ...]
) -> None:
    tree = start("large", DEPTH_1, LARGE)
    family = tree.pids()
    image = tmp_path / "image"
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", image, *ROUNDS, "--compress", codec, "--json")
        assert done.returncode == 0, said(done)
        assert not reap(family), "the dump left it running"
        restore(tree, image, *options)
    found = json.loads(done.stdout)
    assert not found["notes"]
    if userfaultfd.is_asynchronous():
        assert found["figures"]["dirty-sync-count"] == 1, "what is shared was not known to be quiet"
    sizes = {path.name: path.stat().st_size for path in image.iterdir()}
    assert sizes["image"] < sizes["pages"] / 10
    assert found["figures"]["transferred"] == sizes["image"] + sizes["pages"]


class _Turning(NullProgress):
    """Lets the tree change when the first round is over."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.rounds = 0
        self.family: list[int] = []

    def round(self, ended: Round) -> None:
        self.rounds += 1
        if self.rounds == 1:
            os.kill(self._tree.pid, signal.SIGUSR1)
            self._tree.wait_for(self._tree.directory / "turned")
            self.family = self._tree.pids()


@pytest.mark.parametrize("max_rounds", [1, 3])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_what_changes_behind_the_first_round_is_carried(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, max_rounds: int
) -> None:
    """Memory that is written, dropped, moved, mapped anew; processes that come, go, and run another program."""
    tree = start("turning", setting)
    image = tmp_path / "image"
    progress = _Turning(tree)

    async def whole() -> None:
        await pipeline.dump(
            tree.pid, str(image), mode="precopy", max_downtime=1e-6, max_rounds=max_rounds, progress=progress
        )

    trio.run(whole)
    assert progress.rounds == max_rounds
    assert not reap(progress.family), "the dump left it running"
    restore(tree, image)
    tree.check()


def test_what_goes_wrong_behind_a_complete_image_takes_nothing_from_it(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree has ended: all of it that there is, is in the image."""
    tree = start("large", DEPTH_1, LARGE)
    family = tree.pids()
    image = tmp_path / "image"
    end = freeze.end

    def end_and_fail(frozen: freeze.FrozenTree) -> None:
        end(frozen)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(freeze, "end", end_and_fail)
    with pytest.raises(OSError, match="Input/output"):
        trio.run(lambda: pipeline.dump(tree.pid, str(image), mode="precopy"))
    assert not reap(family)
    restore(tree, image)
    tree.check()


# -- what can go wrong ---------------------------------------------------------------------------


def test_a_stream_has_no_place_for_rounds() -> None:
    done = engine("dump", "--pid", os.getpid(), "--to", "-", *ROUNDS)
    assert done.returncode == 2, said(done)
    assert "stream" in done.stderr


@pytest.mark.parametrize("damage", ["missing", "another", "flipped", "cut"])
def test_a_layer_that_is_not_whole_restores_nothing(
    start: Callable[..., Tree], tmp_path: Path, damage: str
) -> None:
    tree = start("large", DEPTH_1, ("0", "4", "0", "0"))
    other, image = tmp_path / "other", tmp_path / "image"
    done = engine("dump", "--pid", tree.pid, "--to", other, *ROUNDS, "--leave-running")
    assert done.returncode == 0, said(done)
    family = tree.pids()
    dump(tree, image, *ROUNDS)
    layer = image / "pages"
    content = layer.read_bytes()
    if damage == "missing":
        layer.unlink()
    elif damage == "another":
        layer.write_bytes((other / "pages").read_bytes())
    elif damage == "flipped":
        middle = len(content) // 2
        layer.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        layer.write_bytes(content[: len(content) // 2])
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode == 1, said(done)
    assert str(layer) in done.stderr
    assert "Traceback" not in done.stderr
    assert not reap(family)
    layer.write_bytes(content)
    restore(tree, image)
    tree.check()


def test_interrupted_in_the_rounds_it_goes_on_and_nothing_is_left(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("rewriting", DEPTH_2)
    image = tmp_path / "image"
    command = [sys.executable, "-m", "pipeline", "dump", "--pid", str(tree.pid), "--to", str(image), *ROUNDS]
    with subprocess.Popen(
        [*command, "--max-downtime", "1us", "--max-rounds", "1000", "--progress", "json"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"round"' in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert not image.exists() or not list(image.iterdir())
    tree.check()


#: processes, each with little of its own; what they share is touched by the first, and is as large as the argument says
_FAMILY = """
import mmap, os, signal, sys
shared = mmap.mmap(-1, int(sys.argv[1]))
shared.write(b"x" * int(sys.argv[1]))
children = [os.fork() or signal.pause() for _ in range(30)]
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("shared_bytes", "pays"), [(4096, False), (64 << 20, True)])
def test_rounds_are_for_memory_that_takes_longer_than_a_look(shared_bytes: int, *, pays: bool) -> None:
    """Shared memory is not part of the processes' own, and is written all the same."""
    command = [sys.executable, "-c", _FAMILY, str(shared_bytes)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    ) as family:
        try:
            assert family.stdout is not None
            assert family.stdout.readline() == b"ready\n"
            assert trio.run(rounds_pay, family.pid) is pays
        finally:
            os.killpg(family.pid, signal.SIGKILL)


def test_few_processes_are_dumped_in_rounds_however_small() -> None:
    """Their looks are short: both stops are, and the last one is the shorter for the rounds."""
    with subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL) as process:
        try:
            assert trio.run(rounds_pay, process.pid)
        finally:
            process.kill()


def test_many_small_processes_are_dumped_at_one_stop(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("crowd", DEPTH_1, ("1", "40"))
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", "--leave-running", "--json")
        assert done.returncode == 0, said(done)
    assert "dirty-sync-count" not in json.loads(done.stdout)["figures"]
