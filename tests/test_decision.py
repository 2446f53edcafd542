"""^C in the moment of the decision: the tree runs in exactly one place, and the command says in which."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import pipeline
from pipeline.progress import NullProgress
from pipeline.restore import opened
from pipeline.stages.pager import Pager
from pipeline.stages.stored_pages import StoredPages
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.framing import FrameReader
from pipeline.transport.storage import Storage
from tests.harness.cancelling import CancelAt, cancelled_at
from tests.harness.hosts import Host, Server, inside, kill_guard, kill_inside, serving
from tests.harness.settings import DEPTH_1
from tests.harness.tree import PATIENCE_S, ROOT, Tree, dump, family_of, reap, restore, said

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


@contextmanager
def _asked(source: Host, server: Server, secret: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    """A migration that waits for a line when the destination is prepared."""
    with subprocess.Popen(
        source.command(*CANCELLING, "asked", "5000", server.address, str(secret), mode),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as migration:
        assert migration.stdout is not None
        assert migration.stdout.readline() == "prepared\n"
        yield migration


@pytest.mark.parametrize("mode", ["stop", "precopy", "postcopy"])
def test_a_server_that_is_interrupted_waits_for_the_word_of_its_source(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret) as server:
        with _asked(source, server, secret, mode) as migration:
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


def test_a_guard_that_is_killed_costs_no_tree(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    """Also when the source may have decided already."""
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret) as server:
        with _asked(source, server, secret, "postcopy") as migration:
            kill_guard(server, signal.SIGKILL)
            out, _ = migration.communicate("go on\n", timeout=PATIENCE_S)
        assert out == "migrated\n"
        assert not reap(family), "the source still runs"
        tree.pid = destination.outer_pid(5000)
        tree.check()


def test_who_insists_does_not_wait_for_a_destination_that_is_silent(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree]
) -> None:
    """It would be tried for half a minute to tell it that the tree stays."""
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    with serving(destination, secret) as server:
        with _asked(source, server, secret, "stop") as migration:
            assert migration.stdin is not None
            kill_inside(server.process, signal.SIGSTOP)
            try:
                kill_inside(migration, signal.SIGINT)
                migration.stdin.write("go on\n")
                migration.stdin.flush()
                tree.check()
                assert migration.poll() is None
                kill_inside(migration, signal.SIGINT)
                out, _ = migration.communicate(timeout=15)
                assert out == "cancelled\n"
            finally:  # nsenter has stopped with its child, and lets it go on
                os.kill(server.process.pid, signal.SIGCONT)
        tree.check()
        until = time.monotonic() + PATIENCE_S
        while destination.pids() != {destination.init, *family_of(inside(server.process))}:
            assert time.monotonic() < until, "the destination keeps its copy"
            time.sleep(0.05)


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


class Arms(NullProgress):
    """Arms an instrument when a phase begins."""

    def __init__(self, instrument: CancelAt, phase: str) -> None:
        self._instrument, self._phase = instrument, phase

    def phase(self, name: str) -> None:
        self._instrument.is_armed |= name == self._phase


@pytest.mark.parametrize("mode", ["stop", "precopy"])
@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_a_dump_is_cancelled_or_there_is_an_image(
    start: Callable[..., Tree], tmp_path: Path, step: int, mode: pipeline.Mode
) -> None:
    tree = start("threads", DEPTH_1)
    image = tmp_path / "image"
    instrument = CancelAt(step)

    async def recipe() -> object:
        return await pipeline.dump(
            tree.pid, str(image), leave="running", mode=mode, progress=Arms(instrument, "write")
        )

    done = instrument.run(recipe)
    assert instrument.is_armed
    assert (image / "manifest").exists() == bool(done)
    tree.check()


@asynccontextmanager
async def left_slowly(storage: Storage) -> AsyncIterator[FrameReader]:
    async with opened(storage) as reader:
        yield reader
        await trio.sleep(0.05)


@pytest.mark.parametrize("options", [{}, {"lazy": True}], ids=["whole", "lazy"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_restore_is_cancelled_or_goes_to_its_end(
    start: Callable[..., Tree],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    options: dict[str, bool],
) -> None:
    """Also where the image is left slowly."""
    monkeypatch.setattr(importlib.import_module("pipeline.restore"), "opened", left_slowly)
    tree = start("threads", DEPTH_1)
    family = tree.pids()
    image = tmp_path / "image"
    dump(tree, image)
    instrument = CancelAt(step)

    async def recipe() -> None:
        restored = await pipeline.restore(
            str(image), detach=True, progress=Arms(instrument, "thaw"), **options
        )
        restored.close()

    instrument.run(recipe)
    assert instrument.is_armed
    if instrument.scope.cancelled_caught:
        left = reap(family)
        assert not left, [Path(f"/proc/{pid}/status").read_text() for pid in left]
        assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")], "what was cancelled runs"
        restore(tree, image)
    tree.check()


def test_a_restore_that_is_cancelled_while_its_last_pages_are_on_their_way_is_cancelled(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come when the tree is being ended, and are read to the end."""
    load, give_back = StoredPages.load, Pager._give_back

    async def slowly(stored: StoredPages, *args: Any) -> LeasedRun:
        with trio.CancelScope(shield=True):
            leased = await load(stored, *args)
            await trio.sleep(0.2)
        return leased

    def slow_to_the_end(pager: Pager, *args: Any, **kwargs: Any) -> None:
        give_back(pager, *args, **kwargs)
        time.sleep(0.4)

    monkeypatch.setattr(StoredPages, "load", slowly)
    monkeypatch.setattr(Pager, "_give_back", slow_to_the_end)
    tree = start("threads", DEPTH_1)
    family = tree.pids()
    image = tmp_path / "image"
    dump(tree, image)
    instrument = CancelAt(STEPS)
    progress = Arms(instrument, "postcopy")
    instrument.run(lambda: pipeline.restore(str(image), detach=True, progress=progress, lazy=True))
    assert instrument.scope.cancelled_caught
    assert not reap(family)
    restore(tree, image)
    tree.check()
