"""One migration over several connections: pages go on all of them in turns, everything else on the first.

The order of the stream is kept without a number in any frame. Pages take the connections in turns,
beginning with the first; whoever has anything else to say puts an empty message (`_TURN_BACK`) on the
connection whose turn it is, says it on the first, and goes on there. So the other side knows at
any moment on which connection the next frame comes: what was written later is never read earlier, and
a page of a later round never comes before one of an earlier round. Connections are read
and written by a task each, a few frames ahead.

With each end record, every further connection has one of its own, which vouches for its frames up to there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from pipeline.errors import ImageError, PeerError, PipelineError, ungrouped
from pipeline.image.frames import PageRun
from pipeline.image.packing import PackedRun, Packer
from pipeline.image.schema import End, Record
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.framing import FrameReader, FrameWriter, Item, Message

_TURN_BACK = b""
#: frames that are read or written ahead on each connection
_AHEAD = 1

_Done = Callable[[], object]


class SpreadWriter(FrameWriter):
    """A `FrameWriter` over several; pages are queued, and written by `run`.

    Args:
        first: of the connection that carries everything that is not pages.
        others: of the further ones.
    """

    def __init__(self, first: FrameWriter, others: Sequence[FrameWriter]) -> None:
        self._first, self._others = first, others
        self._all = (first, *others)
        self._turn = 0
        pairs = [trio.open_memory_channel[tuple[PackedRun, _Done]](_AHEAD) for _ in self._all]
        self._queues = [send for send, _ in pairs]
        self._ends = [receive for _, receive in pairs]
        self._waiting = 0
        self._idle = trio.Event()
        self._idle.set()
        self.packer = first.packer
        self.pool = first.pool
        first.packer = Packer()  # how long a run takes is told by `run`, of all connections together

    def total_bytes(self) -> int:
        """Bytes written on all connections."""
        return sum(writer.bytes_written for writer in self._all)

    async def run(self) -> None:
        """Write what is queued for each connection, until cancelled; what is left then is given back."""
        try:
            async with trio.open_nursery() as nursery:
                for writer, queue in zip(self._all, self._ends, strict=True):
                    nursery.start_soon(self._write_queued, writer, queue)
        finally:
            for queue in self._ends:
                with suppress(trio.WouldBlock, trio.EndOfChannel):
                    while True:
                        queue.receive_nowait()[1]()
                queue.close()

    async def _write_queued(
        self, writer: FrameWriter, queue: trio.MemoryReceiveChannel[tuple[PackedRun, _Done]]
    ) -> None:
        async for run, done in queue:
            begin = trio.current_time()
            await writer.packed(run, done)
            await writer.flush()
            self.packer.wrote(run, (trio.current_time() - begin) / len(self._all))
            self._waiting -= 1
            if not self._waiting:
                self._idle.set()

    async def packed(self, run: PackedRun, done: _Done | None = None) -> None:
        """Queue a run on the connection whose turn it is."""
        done = done or _nothing
        queue = self._queues[self._turn]
        self._turn = (self._turn + 1) % len(self._queues)
        self._waiting += 1
        self._idle = trio.Event()
        try:
            await queue.send((run, done))
        except trio.BrokenResourceError:
            done()
            await trio.sleep_forever()  # `run` has failed, which cancels whoever is beside it
        except BaseException:
            done()
            raise

    async def pages(self, run: PageRun) -> None:
        """Write pages; the caller has the buffer back."""
        await self.packed(await self.pack(run))
        await self._written()

    async def _written(self) -> None:
        while self._waiting:
            await self._idle.wait()

    async def _turn_back(self) -> None:
        await self._written()
        if self._turn:
            await self._others[self._turn - 1].message(_TURN_BACK)
            self._turn = 0

    async def record(self, record: Record) -> None:
        """Write a record, behind all pages before it."""
        await self._turn_back()
        await self._first.record(record)

    async def message(self, content: bytes) -> None:
        """Write a message, behind all pages before it."""
        await self._turn_back()
        await self._first.message(content)

    async def end(self, records: int, page_bytes: int) -> None:
        """Write the end record, and one on each further connection."""
        await self._turn_back()
        for writer in self._others:
            await writer.end(0, 0)
        await self._first.end(records, page_bytes)

    async def flush(self) -> None:
        """Write what was gathered."""
        await self._written()
        await self._first.flush()


@asynccontextmanager
async def beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run `work` beside the block. If it fails, the block is cancelled, and the failure raised where that ended it.

    An error of the block comes out as itself, whatever became of the rest: it may say that a tree is in doubt.
    """
    failure: PipelineError | None = None
    error_of_block: Exception | None = None
    block = trio.CancelScope()

    async def watched() -> None:
        nonlocal failure
        try:
            with ungrouped():
                await work()
        except PipelineError as error:
            failure = error
            block.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched)
            with block:
                try:
                    yield
                except Exception as error:  # noqa: BLE001 (raised below)
                    error_of_block = error
            nursery.cancel_scope.cancel()
    finally:
        if error_of_block is not None:
            raise error_of_block
    if failure is not None and block.cancelled_caught:
        raise failure


def _nothing() -> None:
    """Nobody waits for it."""


class SpreadReader(FrameReader):
    """A `FrameReader` over several, whose further ones are read ahead by `run`.

    Args:
        first: of the connection that carries everything that is not pages.
        others: of the further ones.
    """

    def __init__(self, first: FrameReader, others: Sequence[FrameReader]) -> None:
        self._first, self._others = first, others
        self._turn = 0
        pairs = [trio.open_memory_channel[Item | Exception | None](_AHEAD) for _ in others]
        self._sends = [send for send, _ in pairs]
        self._queues = [receive for _, receive in pairs]

    async def run(self) -> None:
        """Read the further connections ahead, until cancelled; what is left then is given back."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)  # what was read stays until it is wanted
                for reader, send in zip(self._others, self._sends, strict=True):
                    nursery.start_soon(self._read_ahead, reader, send)
        finally:
            for queue in self._queues:
                with suppress(trio.WouldBlock, trio.EndOfChannel):
                    while True:
                        _give_back(queue.receive_nowait())
                queue.close()

    @staticmethod
    async def _read_ahead(reader: FrameReader, send: trio.MemorySendChannel[Item | Exception | None]) -> None:
        while True:
            item: Item | Exception | None
            try:
                item = await reader.next()
            except (ImageError, PeerError) as error:
                item = error
            try:
                await send.send(item)
            except BaseException:
                _give_back(item)
                raise
            if item is None or isinstance(item, Exception):
                return

    async def next(self) -> Item | None:
        """The next item of the whole; raises as `FrameReader.next`, or PeerError."""
        if self._turn:
            other = await self._of_other(self._turn - 1)
            if isinstance(other, LeasedRun):
                self._turn = (self._turn + 1) % (len(self._queues) + 1)
                return other
            if other != Message(_TURN_BACK):
                raise ImageError("one of several connections sends what does not belong there")
            self._turn = 0
        item = await self._first.next()
        if isinstance(item, LeasedRun):
            self._turn = 1 if self._queues else 0
        elif isinstance(item, End):
            for index in range(len(self._queues)):
                last = await self._of_other(index)
                if not isinstance(last, End):
                    _give_back(last)
                    raise ImageError("one of several connections has more than the first one says")
        return item

    async def _of_other(self, index: int) -> Item:
        try:
            item = await self._queues[index].receive()
        except trio.ClosedResourceError:  # `run` has ended: whoever drains the connection goes on behind that
            raise PeerError("the further connections of the migration are not read any more") from None
        if isinstance(item, Exception):
            raise item
        if item is None:
            raise PeerError("one of several connections of the migration was lost")
        return item


def _give_back(item: Item | Exception | None) -> None:
    if isinstance(item, LeasedRun):
        item.lease.release()
