"""Pages of a stream, for who fills the memory of a tree."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from pipeline.errors import ImageError, RebuildError
from pipeline.image.frames import PageRun
from pipeline.image.schema import Layer, Stored
from pipeline.ledger import LEDGER
from pipeline.progress import NullProgress
from pipeline.restore import page_feed
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader
from tests.cli import test_inspect
from tests.harness.made_images import PAGE, SPACE, Memory

#: `pipeline.restore` is the function
recipe = importlib.import_module("pipeline.restore")


async def test_pages_that_a_stream_does_not_bring_are_missed_at_once():
    """A source may send what it likes: what is in no stream would silently be zeros."""
    image = test_inspect.image().image
    image.layers[0] = Layer(index=0, name="pages", digest=bytes(16))
    image.stored[SPACE, 0] = Stored(space=SPACE, layer=0, number=SPACE, runs=[(0, PAGE)])
    pool = BufferPool(1, PAGE)
    held = LEDGER.held()
    lease = await pool.lease()
    first = LeasedRun(PageRun(SPACE, [(0, PAGE)], lease.view[:PAGE]), lease)
    with pytest.raises(ImageError, match="in layers"):
        page_feed(FrameReader(Memory(), pool, "wire"), image, first, NullProgress())
    assert LEDGER.held() == held


# -- pages that come later ------------------------------------------------------------------------


@pytest.mark.parametrize("brings_it_down", [True, False])
async def test_a_tree_that_cannot_be_let_run_is_told_of_alone(
    monkeypatch: pytest.MonkeyPatch, brings_it_down: bool
):
    """Who puts pages into it finds it gone as well."""

    class Pager:
        def __init__(self, *_: object) -> None:
            self.ended = False

        async def run(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                if brings_it_down:
                    raise ProcessLookupError

    monkeypatch.setattr(recipe, "Guard", lambda: SimpleNamespace(dismiss=lambda: None))
    monkeypatch.setattr(recipe, "Pager", Pager)
    monkeypatch.setattr(recipe, "Bringing", lambda *_: SimpleNamespace(run=trio.sleep_forever))
    tree: Any = SimpleNamespace(take_watched=list, victims=list)
    stored: Any = object()

    async def let_run() -> None:
        async with recipe._pages_later(stored, {}, NullProgress(), print) as begin:
            begin(tree)
            await trio.testing.wait_all_tasks_blocked()
            raise RebuildError("the tree was ended when it was about to run")

    with pytest.raises(RebuildError, match="about to run"):
        await let_run()


async def test_pages_that_cannot_be_brought_are_told_of(monkeypatch: pytest.MonkeyPatch):
    async def fail() -> None:
        raise ImageError("the image is damaged")

    monkeypatch.setattr(recipe, "Guard", lambda: SimpleNamespace(dismiss=lambda: None))
    monkeypatch.setattr(recipe, "Pager", lambda *_: SimpleNamespace(run=trio.sleep_forever))
    monkeypatch.setattr(recipe, "Bringing", lambda *_: SimpleNamespace(run=fail))
    tree: Any = SimpleNamespace(take_watched=list, victims=list)
    stored: Any = object()
    with pytest.raises(ImageError, match="damaged"):
        async with recipe._pages_later(stored, {}, NullProgress(), print) as begin:
            begin(tree)
