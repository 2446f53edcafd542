"""^C in the moment of the decision: the tree runs in exactly one place, and the command says in which."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from tests.harness.cancelling import cancelled_at
from tests.harness.hosts import Host, kill_inside, serving
from tests.harness.settings import DEPTH_1
from tests.harness.tree import PATIENCE_S, ROOT, Tree, reap, restore, said

pytestmark = pytest.mark.root

#: more than there are from the destination's word until the tree is ended here
STEPS = 8
CANCELLING = (sys.executable, "-m", "tests.harness.cancelling")


@pytest.mark.parametrize("mode", ["stop", "precopy", "hybrid"])
@pytest.mark.parametrize("when", [*map(str, range(1, STEPS + 1)), "before", "behind"])
def test_a_migration_is_cancelled_or_goes_to_its_end(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], when: str, mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret) as server:
        done = source.run(*CANCELLING, when, "5000", server.address, secret, mode)
        assert done.returncode == 0, said(done)
        if done.stdout == "migrated\n":
            assert when != "before"
            assert not reap(family), "the source still runs"
            tree.pid = destination.outer_pid(5000)
        else:
            assert done.stdout == "cancelled\n"
            assert when != "behind"
            with pytest.raises(ProcessLookupError):
                destination.outer_pid(5000)
        tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy", "postcopy"])
def test_a_server_that_is_interrupted_waits_for_the_word_of_its_source(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret) as server:
        with subprocess.Popen(
            source.command(*CANCELLING, "asked", "5000", server.address, str(secret), mode),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as migration:
            assert migration.stdout is not None
            assert migration.stdout.readline() == "prepared\n"
            kill_inside(server.process, signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None
            out, _ = migration.communicate("go on\n", timeout=PATIENCE_S)
        assert out == "migrated\n"
        _, err = server.process.communicate(timeout=PATIENCE_S)
        assert "whose tree stands here" in err
        assert server.process.returncode == 130
    assert not reap(family), "the source still runs"
    tree.pid = destination.outer_pid(5000)
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_dump_is_cancelled_or_goes_to_its_end(
    start: Callable[..., Tree], tmp_path: Path, step: int, mode: pipeline.Mode
) -> None:
    tree = start("threads", DEPTH_1)
    family = tree.pids()
    image = tmp_path / "image"

    async def recipe() -> object:
        return await pipeline.dump(tree.pid, str(image), leave="end", mode=mode)

    done = cancelled_at(step, recipe)
    if done:
        assert not reap(family), "the tree still runs"
        restore(tree, image)
    else:
        assert not (image / "manifest").exists()
        assert len([pid for pid in family if os.path.exists(f"/proc/{pid}")]) == len(family)
    tree.check()
