"""In which order a tree is built: its steps (`pipeline.stages.rebuild`), and the pages that come between them.

From an image at once (`rebuilt`); or from a draft (`grown`), which is then brought up to what the tree has become.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from pipeline.image.codec import Image
from pipeline.kernel.arch import x86_64 as arch
from pipeline.progress import Progress
from pipeline.remote.tracer import Tracer
from pipeline.stages.fill import Feed
from pipeline.stages.rebuild import Rebuilding, Terms


@asynccontextmanager
async def grown(
    image: Image, feed: Feed, tracer: Tracer, progress: Progress, terms: Terms
) -> AsyncIterator[Rebuilding]:
    """The processes of `image` with their memory, not complete; gone after the block unless they were thawed.

    Raises:
        RebuildError: the kernel refuses a step.
        ImageError: records or pages do not fit together.
    """
    progress.phase("rebuild")
    if image.head.machine != arch.MACHINE:
        image.check_machine(arch.MACHINE)
    rebuilding = Rebuilding(image, terms)
    try:
        await tracer.run(rebuilding.prepare)
        for space in [*image.shared_memory, *image.contents]:
            await feed.fill(space, rebuilding.contents.place(space))
            await tracer.run(rebuilding.contents.finish_fill, space)
        rebuilding.contents.seal_writing()
        await tracer.run(rebuilding.furnish)
        await _fill_growing(rebuilding, feed, tracer)
        await feed.expect_end()
        yield rebuilding
    finally:
        with trio.CancelScope(shield=True):
            feed.close()
            await tracer.run(rebuilding.close)


async def bring_up_to_date(
    rebuilding: Rebuilding, image: Image, feed: Feed, tracer: Tracer, filled: trio.Event
) -> None:
    """Turn a tree that was grown from a draft, and is updated, into that of `image`; `feed` brings its last pages.

    `filled` is set when what outlives a process has its pages. Raises as `grown` does.
    """
    try:
        for space in [*image.shared_memory, *image.contents]:
            await feed.fill(space, rebuilding.contents.place(space))
            # the tracer may be busy with files that are made meanwhile
            await trio.to_thread.run_sync(rebuilding.contents.finish_fill, space)
        filled.set()
        await tracer.run(rebuilding.change)
        for space in rebuilding.last_fills():
            await feed.fill(space, rebuilding.place_of(space))
        if rebuilding.has_births:
            await _fill_growing(rebuilding, feed, tracer)
        await feed.expect_end()
    finally:
        feed.close()


async def _fill_growing(rebuilding: Rebuilding, feed: Feed, tracer: Tracer) -> None:
    """Let processes be born, each with its pages, until all are there."""
    while (fill := await tracer.run(rebuilding.next_fill)) is not None:
        await feed.fill(fill.space, await tracer.run(rebuilding.memory_of, fill))


@asynccontextmanager
async def rebuilt(
    image: Image, feed: Feed, tracer: Tracer, progress: Progress, terms: Terms
) -> AsyncIterator[Rebuilding]:
    """The tree of `image`, complete and stopped; gone after the block unless it was thawed. Raises as `grown` does."""
    async with grown(image, feed, tracer, progress, terms) as rebuilding:
        await tracer.run(rebuilding.complete)
        yield rebuilding
