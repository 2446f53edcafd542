"""The fill stage: pages that arrive are written to where they belong.

In a stream, pages of a space come in one piece, and spaces come in the order of the
plan: first the objects that several processes share, then process by process as they
are born. So there is no table of what is still missing: a run of another space says
that the one before is complete.

They are written in a worker thread, while the next ones are read; few of them at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from pipeline.errors import ImageError, RebuildError, ungrouped
from pipeline.image.frames import PageRun
from pipeline.progress import Progress
from pipeline.stages.abreast import abreast
from pipeline.stages.places import Place
from pipeline.transport.buffers import LeasedRun, left_in
from pipeline.transport.handover import worked

#: runs that wait until those before them are written
_AHEAD = 1


def write_run(place: Place, run: PageRun) -> None:
    """Write every segment of `run` to `place`, and its zeros; raises as `Place` says."""
    for start, length in run.zeros:
        place.zero(start, length)
    place.write(run.segments, run.payload)


@asynccontextmanager
async def writing() -> AsyncIterator[Callable[[Place, LeasedRun], Awaitable[None]]]:
    """What is given to the function in the block, a place and a run for it, is written when the block has ended.

    One run at a time, in order, while the next ones are fetched: two at a time took longer (docs/performance.md). The
    leases are owned from then on.

    Raises:
        RebuildError: one cannot be written; where a run is given, of an earlier one, or at the end.
    """
    send, receive = trio.open_memory_channel[tuple[Place, LeasedRun]](_AHEAD)
    failed: list[RebuildError] = []

    async def give(place: Place, leased: LeasedRun) -> None:
        try:
            if failed:
                raise failed[0]
            await send.send((place, leased))
        except BaseException:
            leased.lease.release()
            raise

    with ungrouped(), receive:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_write_all, receive, failed)
            with send:
                yield give
    if failed:
        raise failed[0]


def _size_bytes(run: PageRun) -> int:
    return len(run.payload) + sum(length for _, length in run.zeros)


async def _write_all(
    runs: trio.MemoryReceiveChannel[tuple[Place, LeasedRun]], failed: list[RebuildError]
) -> None:
    """Write until there are no more; behind the first that fails, only give back."""
    try:
        async for place, leased in runs:
            try:
                if not failed:
                    await worked(_size_bytes(leased.run), write_run, place, leased.run)
            except OSError as error:
                why = f"its pages cannot be written: {error.strerror}"
                failed.append(RebuildError(f"{place.subject}: {why}"))
            finally:
                leased.lease.release()
    finally:
        for _, leased in left_in(runs):
            leased.lease.release()


class Feed(Protocol):
    """Where the pages of a tree come from that is built."""

    bytes_done: int

    async def fill(self, space: int, place: Place) -> None:
        """Write all pages of `space` to `place`; RebuildError: that fails."""

    async def expect_end(self) -> None:
        """Every page was wanted by somebody; ImageError."""

    def close(self) -> None:
        """Give back what is in hand; idempotent."""


class StoredFeed:
    """Pages that are read when they are wanted, several runs at once.

    Args:
        loads: what loads the runs of a space; whoever gets one releases its lease.
        at_once: how many are on their way to here.
        progress: is told the bytes that have come.
    """

    def __init__(
        self,
        loads: Callable[[int], Iterator[Callable[[], Awaitable[LeasedRun]]]],
        at_once: int,
        progress: Progress,
    ) -> None:
        self._loads = loads
        self._at_once = at_once
        self._progress = progress
        self.bytes_done = 0

    async def fill(self, space: int, place: Place) -> None:
        """See `Feed.fill`."""
        left = self._loads(space)

        async def load_left() -> None:
            for load in left:
                leased = await load()
                size = len(leased.run.payload)
                await write(place, leased)
                self.bytes_done += size
                self._progress.advance(self.bytes_done, None)

        async with writing() as write:
            await abreast(self._at_once, load_left)

    async def expect_end(self) -> None:
        """See `Feed.expect_end`: nobody has more than what is asked for."""

    def close(self) -> None:
        """See `Feed.close`."""


class PageFeed:
    """Hands page runs of the stream to whoever fills the space they belong to.

    Args:
        first: the first page run, owned by the feed from now on.
        runs: the stream of those behind it, in order.
        progress: is told the bytes that have come.
        total_bytes: how many will come, where known.
    """

    def __init__(
        self,
        first: LeasedRun | None,
        runs: AsyncIterator[LeasedRun],
        progress: Progress,
        total_bytes: int | None = None,
    ) -> None:
        self._runs = runs
        self._next = first
        self._ended = False
        self._progress = progress
        self._total = total_bytes
        self.bytes_done = 0

    async def _peek(self) -> LeasedRun | None:
        if self._next is None and not self._ended:
            try:
                self._next = await anext(self._runs)
            except StopAsyncIteration:
                self._ended = True
        return self._next

    async def fill(self, space: int, place: Place) -> None:
        """Write all pages of `space` to `place`; returns when the stream goes on with another space.

        If that fails, the stream is at the border of a frame: a peer that is told so is listened to there.
        """
        async with writing() as write:
            while (leased := await self._peek()) is not None and leased.run.space == space:
                self._next = None
                size = len(leased.run.payload)
                await write(place, leased)
                self.bytes_done += size
                self._progress.advance(self.bytes_done, self._total)

    async def expect_end(self) -> None:
        """Every page was wanted by somebody.

        Raises:
            ImageError: the stream holds pages of a space that is not next.
        """
        leased = await self._peek()
        if leased is not None:
            raise ImageError(f"pages of space {leased.run.space} come out of turn, or belong to nothing")

    def close(self) -> None:
        """Release a run in hand; idempotent."""
        if self._next is not None:
            leased, self._next = self._next, None
            leased.lease.release()
