"""A tree that comes over a connection, at its destination: what `pipeline.migrate` and `pipeline.live` send.

Of a tree that is sent while it runs a draft is built first, into which the rounds write their pages. When it stands
still at its source, its records come before it is known there which pages are lacking: so what was built becomes the
tree that they tell of, and its open files are made, while the source reckons and reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from msgspec.structs import replace

from pipeline import garbage
from pipeline.errors import ImageError, PeerError, PipelineError, ungrouped
from pipeline.image.codec import Image, prepare
from pipeline.image.delta import Draft
from pipeline.image.schema import Absent
from pipeline.kernel.arch import x86_64 as arch
from pipeline.progress import Progress
from pipeline.remote.tracer import Tracer
from pipeline.resources.registry import kinds
from pipeline.restore import page_feed, read_counted, read_records
from pipeline.stages.building import bring_up_to_date, grown, rebuilt
from pipeline.stages.fill import writing
from pipeline.stages.rebuild import Rebuilding, Terms
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.framing import Item
from pipeline.transport.protocol import Begin, CatchUp, CaughtUp
from pipeline.transport.tcp import Channel


@asynccontextmanager
async def arrived(
    channel: Channel, tracer: Tracer, progress: Progress, terms: Terms
) -> AsyncIterator[tuple[Rebuilding, int]]:
    """The next image of a connection, complete and stopped, and how many bytes of pages it had.

    The tree is gone behind the block unless it was thawed.

    Raises:
        ImageError, PeerError: what came is no tree.
        RebuildError, Refused: it cannot be made here.
    """
    image, first = await read_records(channel.reader)
    image.check_machine(arch.MACHINE)
    feed = page_feed(channel.reader, image, first, progress)
    async with rebuilt(image, feed, tracer, progress, terms) as rebuilding:
        yield rebuilding, feed.bytes_done


@asynccontextmanager
async def arrived_live(
    channel: Channel, tracer: Tracer, progress: Progress, terms: Terms
) -> AsyncIterator[tuple[Rebuilding, int]]:
    """A tree that is sent while it runs, as `arrived`."""
    begin = await _beginning(channel, await channel.reader.next())
    while begin.what != "whole":
        if begin.what != "draft":
            raise PeerError(f"{channel.peer} sends a {begin.what} of nothing")
        image, first = await read_records(channel.reader)
        image.check_machine(arch.MACHINE)
        draft = Draft(image)
        await trio.to_thread.run_sync(lambda: prepare(kind.record for kind in kinds()))
        feed = page_feed(channel.reader, image, first, progress)
        async with grown(image, feed, tracer, progress, terms) as rebuilding:
            page_bytes = feed.bytes_done
            await tracer.run(rebuilding.make_threads)
            begin = await _beginning(channel, await channel.reader.next())
            while begin.what == "round":
                progress.phase("round")
                count, begin = await _round(channel, rebuilding, progress)
                page_bytes += count
            if begin.what == "still":
                with garbage.held_off():
                    progress.phase("finish")
                    count, begin = await _come_to_rest(
                        channel, rebuilding, draft, begin.records, tracer, progress
                    )
                    if begin.what == "rest":
                        await tracer.run(rebuilding.complete)
                        yield rebuilding, page_bytes + count
                        return
    async with arrived(channel, tracer, progress, replace(terms, live=False)) as tree:
        yield tree


async def _round(channel: Channel, rebuilding: Rebuilding, progress: Progress) -> tuple[int, Begin]:
    """Take in the pages of a round; their bytes, and what comes behind it."""
    count = 0
    async with writing() as write:
        while isinstance(item := await channel.reader.next(), LeasedRun):
            try:
                place = rebuilding.place_of(item.run.space)
            except BaseException:
                item.lease.release()
                raise
            count += len(item.run.payload)
            await write(place, item)
            progress.advance(count, None)
    return count, await _beginning(channel, item)


async def _come_to_rest(
    channel: Channel, rebuilding: Rebuilding, draft: Draft, records: int, tracer: Tracer, progress: Progress
) -> tuple[int, Begin]:
    """Turn what was built of a draft into the tree as it stands still, of which so many records come first.

    Returns:
        Bytes of its pages, and what the source says behind the records: ``rest``, which is taken in here, or anything
        else, which is not.
    """
    image = Image()
    await read_counted(channel.reader, image, records, draft)
    image.check_references()
    updated, filled = trio.Event(), trio.Event()
    is_draft_of_it = False
    #: raised where a peer can be told: behind a whole frame; and behind all pages, where they can be taken in
    refused: list[PipelineError] = []
    failed: list[PipelineError] = []

    def update(token: trio.lowlevel.TrioToken) -> bool:
        nonlocal is_draft_of_it
        is_draft_of_it = rebuilding.update(image)
        token.run_sync_soon(updated.set)
        return not is_draft_of_it or (not rebuilding.lacks_files and equip(filled.is_set))

    def equip(is_enough: Callable[[], bool]) -> bool:
        try:
            return rebuilding.equip_early(is_enough)
        except PipelineError as error:
            failed.append(error)
            return True

    async def update_and_equip() -> None:
        try:
            is_equipped = await tracer.run(update, trio.lowlevel.current_trio_token())
        except PipelineError as error:
            refused.append(error)
            updated.set()
            return
        if not is_equipped:
            # behind the change of what stands, which waits for nothing but that
            await filled.wait()
            await tracer.run(equip, lambda: False)

    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(update_and_equip)
            begin = await _beginning(channel, await channel.reader.next())
            await updated.wait()
            if refused:
                raise refused[0]
            if begin.what != "rest":
                nursery.cancel_scope.cancel()
                return 0, begin
            if not is_draft_of_it:
                raise ImageError(f"{channel.peer} leaves out what was in no draft")
            await read_counted(channel.reader, image, begin.records, draft, Absent)
            feed = page_feed(channel.reader, image, None, progress)
            await bring_up_to_date(rebuilding, image, feed, tracer, filled)
    if failed:
        raise failed[0]
    return feed.bytes_done, begin


async def _beginning(channel: Channel, item: Item | None) -> Begin:
    """What comes next of a tree that is sent while it runs; asked for that first, we say that all of it is taken in.

    Args:
        item: what came behind the last part, all of which is.

    Raises:
        PeerError: `item` does not say so.
        ImageError: the source has given up.
    """
    message = channel.understand(item)
    while isinstance(message, CatchUp):
        await channel.say(CaughtUp())
        message = channel.understand(await channel.reader.next())
    if not isinstance(message, Begin):
        raise ImageError(f"{channel.peer} has given up")
    return message
