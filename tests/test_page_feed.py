"""Pages of a stream, for who fills the memory of a tree."""

from __future__ import annotations

import pytest

from pipeline.errors import ImageError
from pipeline.image.frames import PageRun
from pipeline.image.schema import Layer, Stored
from pipeline.ledger import LEDGER
from pipeline.progress import NullProgress
from pipeline.restore import page_feed
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader
from tests.cli import test_inspect
from tests.harness.made_images import PAGE, SPACE, Memory


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
