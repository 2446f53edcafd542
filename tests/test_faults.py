"""Whatever fails, everything is given back once, and the tree runs on in exactly one place."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

import pipeline
from pipeline.ledger import LEDGER
from pipeline.transport.storage import CLAIM, MANIFEST
from tests.harness.cancelling import CancelAt
from tests.harness.leaks import sweep
from tests.harness.settings import CONTAINER_2, DEPTH_2
from tests.harness.tree import ROOT, Tree, dump, family_of, reap, restore

pytestmark = pytest.mark.root

#: how many moments of a recipe are tried, evenly over all of its steps
MOMENTS = 24


def run_cancelled(recipe: Callable[[], Awaitable[object]], step: int | None) -> tuple[int, bool]:
    """Run a recipe and cancel it at a step; returns how many steps were made and whether it was cancelled."""
    instrument = CancelAt(step)
    instrument.is_armed = True
    instrument.run(recipe)
    return instrument.steps, instrument.scope.cancelled_caught


def moments(steps: int) -> list[int]:
    return sorted({max(1, round(steps * n / MOMENTS)) for n in range(1, MOMENTS + 1)})


def test_dump_cancelled_anywhere_leaves_the_tree_running(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("threads", DEPTH_2)
    image = tmp_path / "image"

    async def recipe() -> None:
        await pipeline.dump(tree.pid, str(image), leave="running")

    steps, _ = run_cancelled(recipe, None)
    subprocess.run(["rm", "-r", str(image)], check=True)
    cancelled = 0
    for step in moments(steps):
        _, caught = run_cancelled(recipe, step)
        cancelled += caught
        assert not LEDGER.held(), f"after a cancel at step {step} of {steps}"
        assert not (image / "manifest").exists() or not caught
        if image.exists():
            subprocess.run(["rm", "-r", str(image)], check=True)
        tree.check()
    assert cancelled > MOMENTS // 2
    assert all(taken == given for taken, given in LEDGER.statistics().values())


def test_restore_cancelled_anywhere_leaves_nothing(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("processes", CONTAINER_2)
    family = tree.pids()
    image = tmp_path / "image"
    dump(tree, image)

    async def recipe() -> None:
        restored = await pipeline.restore(str(image), detach=True)
        restored.close()

    steps = 200
    for step in (1, 5, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200):
        made, caught = run_cancelled(recipe, step)
        assert not LEDGER.held(), f"after a cancel at step {step}"
        if not caught:
            steps = made
            break
        assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")], f"after a cancel at step {step}"
    else:
        restore(tree, image)
    assert steps > 5
    tree.check()


@pytest.mark.parametrize("seed", range(6))
def test_dump_killed_leaves_the_tree_running(start: Callable[..., Tree], tmp_path: Path, seed: int) -> None:
    tree = start("blocked", DEPTH_2)
    dice = random.Random(seed)
    for number in range(4):
        command = [sys.executable, "-m", "pipeline", "dump", "--pid", str(tree.pid)]
        dumper = subprocess.Popen(
            [*command, "--to", str(tmp_path / f"image{number}"), "--leave-running"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(dice.uniform(0.2, 0.7))
        dumper.send_signal(signal.SIGKILL)
        dumper.wait()
        tree.check()
    assert "TracerPid:\t0" in Path(f"/proc/{tree.pid}/status").read_text()
    sweep()
    for image in tmp_path.iterdir():
        assert (image / MANIFEST).exists(), "something is left of it"
        assert not (image / CLAIM).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_dump_interrupted_says_so_and_gives_back(
    start: Callable[..., Tree], tmp_path: Path, number: int
) -> None:
    tree = start("threads", DEPTH_2)
    for delay in (0.25, 0.35, 0.5):
        image = tmp_path / f"image{delay}"
        command = [sys.executable, "-m", "pipeline", "dump", "--pid", str(tree.pid), "--to", str(image)]
        dumper = subprocess.Popen([*command, "--leave-running"], cwd=ROOT, stderr=subprocess.PIPE)
        time.sleep(delay)
        dumper.send_signal(number)
        dumper.communicate()
        assert dumper.returncode in (0, 128 + number, -number)
        if dumper.returncode == 128 + number:  # else it came before the command listened, or after its work
            assert not (image / "manifest").exists()
        tree.check()


def test_restore_killed_leaves_no_half_tree(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("processes", DEPTH_2)
    family = tree.pids()
    runners = {pid for pid in family if _runs(pid)}
    image = tmp_path / "image"
    dump(tree, image)
    dice = random.Random(7)
    for _ in range(8):
        command = [sys.executable, "-m", "pipeline", "restore", "--from", str(image), "--detach"]
        restorer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.2, 0.5))
        restorer.send_signal(signal.SIGKILL)
        if restorer.wait() == 0:
            break
        _wait_for_puppets()
        left = {pid for pid in family_of(os.getpid()) if pid in family and _runs(pid)}
        if left == runners:
            break  # it was killed after the thaw
        assert not left
        reap(family)
    else:
        restore(tree, image)
    tree.check()


def _wait_for_puppets() -> None:
    """The kernel kills the puppets of a killed restorer; stand-ins for dead leaders are among them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = [pid for pid in family_of(os.getpid())[1:] if _is_puppet(_name(pid))]
        if not children:
            return
        for pid in children:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _is_puppet(name: str) -> bool:
    """By how it was executed last: by a number of a descriptor, in /proc, or by that itself."""
    return name == "memfd:puppet" or name.isdecimal()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
