"""Pages that arrive are written where they belong, while the next ones are read."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from pipeline.errors import ImageError, RebuildError
from pipeline.image.frames import PageRun
from pipeline.progress import NullProgress
from pipeline.stages import fill
from pipeline.stages.fill import Feed, PageFeed, StoredFeed
from pipeline.stages.places import FilePlace, Place
from pipeline.transport.buffers import BufferPool, LeasedRun

PAGE = 4096
#: what is written in a thread
LARGE = 256 << 10
COUNT = 3


class Stream:
    """`COUNT` runs of `size` bytes each, of space 1; `read` is set when the second one is read."""

    def __init__(self, size: int = LARGE) -> None:
        self.size = size
        self.pool = BufferPool(2, size)
        self.read = threading.Event()
        self.is_whole = True

    async def run(self, number: int) -> LeasedRun:
        lease = await self.pool.lease()
        try:
            lease.view[:] = bytes([number]) * self.size
            self.is_whole = False
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            self.is_whole = True
        except BaseException:
            lease.release()
            raise
        return LeasedRun(PageRun(1, ((number * self.size, self.size),), lease.view), lease)

    async def rest(self) -> AsyncIterator[LeasedRun]:
        for number in range(1, COUNT):
            run = await self.run(number)
            self.read.set()
            yield run

    async def is_idle(self) -> bool:
        """Whether every buffer is free."""
        with trio.fail_after(5):
            leases = [await self.pool.lease() for _ in range(self.pool.count)]
        for lease in leases:
            lease.release()
        return True


async def fills_nothing(feed: Feed, path: Path) -> None:
    """It says so, where nothing can be written."""
    fd = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        with pytest.raises(RebuildError, match="its pages cannot be written: Bad file descriptor"):
            await feed.fill(1, FilePlace(fd))
    finally:
        os.close(fd)


async def test_the_next_pages_are_read_while_pages_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    write = fill.write_run

    def patient(place: Place, run: PageRun) -> None:
        assert stream.read.wait(10), "nothing is read while this is written"
        write(place, run)

    monkeypatch.setattr(fill, "write_run", patient)
    feed = PageFeed(await stream.run(0), stream.rest(), NullProgress())
    with (tmp_path / "memory").open("wb") as file:
        await feed.fill(1, FilePlace(file.fileno()))
        await feed.expect_end()
    assert (tmp_path / "memory").read_bytes() == b"".join(bytes([n]) * LARGE for n in range(COUNT))
    assert feed.bytes_done == COUNT * LARGE
    assert await stream.is_idle()


@pytest.mark.parametrize("size", [PAGE, LARGE])
async def test_pages_that_cannot_be_written_leave_the_stream_at_a_border(tmp_path: Path, size: int) -> None:
    stream = Stream(size)
    feed = PageFeed(await stream.run(0), stream.rest(), NullProgress())
    await fills_nothing(feed, tmp_path / "memory")
    feed.close()
    assert stream.is_whole
    assert stream.read.is_set()
    assert await stream.is_idle()


async def test_whoever_is_cancelled_gives_back_what_waits_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    begun, go_on = threading.Event(), threading.Event()
    written: list[PageRun] = []

    def patient(_: Place, run: PageRun) -> None:
        begun.set()
        assert go_on.wait(10)
        written.append(run)

    monkeypatch.setattr(fill, "write_run", patient)
    feed = PageFeed(await stream.run(0), stream.rest(), NullProgress())
    with (tmp_path / "memory").open("wb") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.fill, 1, FilePlace(file.fileno()))
            await trio.to_thread.run_sync(begun.wait)
            await trio.to_thread.run_sync(stream.read.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            go_on.set()
    feed.close()
    assert len(written) == 1
    assert await stream.is_idle()


class Store(Stream):
    """The same runs, to be loaded at any time; a load waits until `at_once` are under way, and run `damaged` fails."""

    def __init__(self, at_once: int, damaged: int | None = None) -> None:
        super().__init__()
        self.pool = BufferPool(COUNT, self.size)
        self._at_once = at_once
        self._damaged = damaged
        self._waiting = 0
        self._enough = trio.Event()

    def loads(self, space: int) -> Iterator[Callable[[], Awaitable[LeasedRun]]]:
        assert space == 1
        return (partial(self.load, number) for number in range(COUNT))

    async def load(self, number: int) -> LeasedRun:
        self._waiting += 1
        if self._waiting == self._at_once:
            self._enough.set()
        with trio.fail_after(5):
            await self._enough.wait()
        if number == self._damaged:
            raise ImageError("it is damaged")
        return await self.run(number)


@pytest.mark.parametrize("at_once", [1, 2, COUNT])
async def test_stored_pages_are_loaded_several_at_once(tmp_path: Path, at_once: int) -> None:
    store = Store(at_once)
    feed = StoredFeed(store.loads, at_once, NullProgress())
    with (tmp_path / "memory").open("wb") as file:
        await feed.fill(1, FilePlace(file.fileno()))
    assert (tmp_path / "memory").read_bytes() == b"".join(bytes([n]) * LARGE for n in range(COUNT))
    assert feed.bytes_done == COUNT * LARGE
    assert await store.is_idle()


@pytest.mark.parametrize("damaged", range(COUNT))
async def test_of_several_loads_that_which_fails_is_told_and_the_others_give_back(
    tmp_path: Path, damaged: int
) -> None:
    store = Store(COUNT, damaged)
    feed = StoredFeed(store.loads, COUNT, NullProgress())
    with (tmp_path / "memory").open("wb") as file, pytest.raises(ImageError, match="it is damaged"):
        await feed.fill(1, FilePlace(file.fileno()))
    assert await store.is_idle()


async def test_stored_pages_that_cannot_be_written_are_told_once(tmp_path: Path) -> None:
    store = Store(COUNT)
    feed = StoredFeed(store.loads, COUNT, NullProgress())
    await fills_nothing(feed, tmp_path / "memory")
    assert await store.is_idle()
