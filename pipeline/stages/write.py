"""The write stage: records and pages as frames.

Records go first, so that who reads them can begin to build; they are translated on their way (`translate`). Pages are
read and made into frames by one task, and written by another at the same time, with buffers between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Self, TypeVar

import trio

from pipeline.errors import ungrouped
from pipeline.image.packing import PackedRun
from pipeline.image.schema import Record
from pipeline.progress import Progress
from pipeline.stages.memory import PageSource, stream_memory
from pipeline.stages.translate import into_forest
from pipeline.transport.buffers import Lease, left_in
from pipeline.transport.framing import FrameWriter
from pipeline.userns.forest import Forest

T = TypeVar("T")

#: records from one moment in which others have a turn to the next: a moment costs as much as a record
_BATCH_RECORDS = 32


async def write_image(
    writer: FrameWriter,
    records: Sequence[tuple[Record, Record | None]],
    sources: Sequence[PageSource],
    forest: Forest,
    progress: Progress,
    all_read: Callable[[], object] = lambda: None,
    *,
    eager: bool = False,
    turn: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
) -> int:
    """Run the stages that carry a captured tree to `writer`; returns the bytes of pages.

    Records first, so that the other side can begin to build; then pages as they are read; then the end.

    Args:
        all_read: called when nothing is to be read of the tree any more.
        eager: somebody reads the records while the first pages are read here.
        turn: awaited before each few records are translated and written; unless `eager`, when nobody waits for them,
            and others come first.
    """
    with ungrouped():
        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[Sequence[Record]](2)
            nursery.start_soon(translate_records, records, forest, send, nothing if eager else turn)
            return await write_translated(
                writer, receive, sources, progress, all_read, eager=eager, turn=turn
            )
    raise AssertionError("a nursery swallows nothing")


async def write_translated(
    writer: FrameWriter,
    records: AsyncIterable[Sequence[Record]],
    sources: Sequence[PageSource],
    progress: Progress,
    all_read: Callable[[], object] = lambda: None,
    *,
    eager: bool = False,
    turn: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
    before: int = 0,
) -> int:
    """Records that are translated, the pages of `sources`, and the end; returns the bytes of pages.

    `all_read`, `eager`, `turn`: see `write_image`. `before`: records of the image that are written already.
    """
    count = before

    async def write() -> None:
        nonlocal count
        count += await write_records(writer, records, eager=eager, turn=turn)

    page_bytes = await write_pages(writer, sources, progress, write, all_read)
    await writer.end(count, page_bytes)
    return page_bytes


async def write_records(
    writer: FrameWriter,
    records: AsyncIterable[Sequence[Record]],
    *,
    eager: bool,
    turn: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
) -> int:
    """Records that are translated; returns their number. `eager`, `turn`: see `write_image`."""
    count = 0
    async for batch in records:
        if not eager:
            await turn()
        for record in batch:
            await writer.record(record)
        count += len(batch)
    if eager:
        await writer.flush()
    return count


class InOrder:
    """Records that are translated already, or as they are asked for; a few at a time.

    Not a generator, which somebody would have to close who does not come to its end.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._batches = _batches(records)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Record]:
        for batch in self._batches:
            return batch
        raise StopAsyncIteration


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    """A few of them at a time, in order."""
    rest = iter(things)
    while batch := list(itertools.islice(rest, _BATCH_RECORDS)):
        yield batch


async def nothing() -> None:
    """Comes before what need not wait."""


async def write_pages(
    writer: FrameWriter,
    sources: Sequence[PageSource],
    progress: Progress,
    before: Callable[[], Awaitable[None]] = nothing,
    all_read: Callable[[], object] = lambda: None,
) -> int:
    """The pages of `sources`, read while `before` is written and then while others are on their way; their bytes.

    `all_read`: see `write_image`.
    """
    page_bytes = 0

    async def read(send: trio.MemorySendChannel[tuple[PackedRun, Lease]]) -> None:
        await stream_memory(sources, send, writer.pool, writer.packer.pack, progress)
        all_read()

    with ungrouped():
        async with trio.open_nursery() as nursery:
            # how many there may be is up to the pool
            send, receive = trio.open_memory_channel[tuple[PackedRun, Lease]](math.inf)
            nursery.start_soon(read, send)
            try:
                await before()
                async for packed, lease in receive:
                    page_bytes += packed.page_bytes
                    await writer.packed(packed, lease.release)
            finally:
                for _, lease in left_in(receive):
                    lease.release()
    return page_bytes


async def translate_records(
    records: Sequence[tuple[Record, Record | None]],
    forest: Forest,
    send: trio.MemorySendChannel[Sequence[Record]],
    turn: Callable[[], Awaitable[object]],
) -> None:
    """The namespace-translate stage: every id of every record moves into the forest. `turn`: see `write_image`."""
    async with send:
        for batch in _batches(records):
            await turn()
            await send.send([into_forest(record, state, forest) for record, state in batch])
