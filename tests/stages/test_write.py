"""The write stage: what goes out when."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from pipeline.errors import StorageError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.frames import MAX_PAYLOAD_BYTES, MAX_SEGMENTS, PageRun
from pipeline.image.packing import PackedRun, Packer
from pipeline.image.schema import Content, End, Record
from pipeline.kernel.pagemap import Range
from pipeline.progress import NullProgress
from pipeline.stages import memory as stages_memory
from pipeline.stages import write as stages_write
from pipeline.stages.memory import FilePages, LivePages, ProcessPages
from pipeline.stages.sent import Sent
from pipeline.stages.write import InOrder, write_image, write_pages, write_translated
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader, FrameWriter
from pipeline.userns.forest import Forest
from tests.harness.made_images import Memory, content

PAGE = 4096


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[LocalFd]:
    """A file of one page."""
    path = tmp_path / "page"
    path.write_bytes(bytes(range(256)) * 16)
    fd = LocalFd(os.open(path, os.O_RDONLY))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("eager", [True, False])
async def test_who_reads_along_gets_the_records_while_pages_are_read(fd: LocalFd, eager: bool):
    """Reading waits until the records are out, or for a while in vain."""
    sink = Memory()
    record = Content(space=1, size_bytes=PAGE)
    out = threading.Event()
    seen: list[bool] = []

    def more() -> list[Range]:
        seen.append(out.wait(20 if eager else 0.5))
        return []

    async def watch() -> None:
        while not sink.raw:
            await trio.sleep(0.01)
        out.set()

    sources = [LivePages(2, os.getpid(), [], [], more), FilePages(1, fd, PAGE)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await write_translated(FrameWriter(sink), InOrder([record]), sources, NullProgress(), eager=eager)
    assert seen == [eager]


@pytest.mark.parametrize("count", [0, 1, 32, 33, 100])
async def test_records_stay_in_order_and_the_end_says_how_many_there_are(count: int):
    sink = Memory()
    records = [Content(space=number, size_bytes=PAGE) for number in range(1, count + 1)]
    await write_image(
        FrameWriter(sink), [(record, None) for record in records], [], Forest([]), NullProgress()
    )
    reader = FrameReader(sink, BufferPool(1, MAX_PAYLOAD_BYTES), "image")
    found = []
    while (item := await reader.next()) is not None:
        found.append(item)
    end = found.pop()
    assert found == records
    assert isinstance(end, End)
    assert end.records == count


async def test_each_round_reads_into_the_buffers_of_the_one_before(fd: LocalFd):
    pool = BufferPool(3, PAGE)
    writer = FrameWriter(Memory(), pool=pool)
    used: set[int] = set()
    for _ in range(3):
        assert await write_pages(writer, [FilePages(1, fd, PAGE)], NullProgress()) == PAGE
        used |= set(map(id, pool._free))
    assert len(used) == 1


BUFFER = 256 * PAGE


@pytest.fixture
def memory() -> Iterator[Range]:
    """Memory of our own: four buffers full, all pages different."""
    size = 4 * BUFFER
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        for page in range(0, size, PAGE):
            area[page : page + 8] = (page + 1).to_bytes(8, "little")
        view = ctypes.c_char.from_buffer(area)
        start = ctypes.addressof(view)
        yield start, start + size
        del view


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many processors there are."""
    monkeypatch.setattr(stages_memory, "_READERS", 2)


async def test_what_several_read_at_once_is_an_image(memory: Range):
    """Each frame is made by the thread that has read its pages; whoever is done first, their digest has one order."""
    together = threading.Barrier(2)

    class Patient(Packer):
        def pack(self, run: PageRun) -> PackedRun:
            together.wait(20)
            return super().pack(run)

    sink, pool = Memory(), BufferPool(6, BUFFER)
    writer = FrameWriter(sink, Patient(), pool=pool)
    source = ProcessPages(1, HostPid(os.getpid()), [memory])
    page_bytes = await write_translated(writer, InOrder([]), [source], NullProgress(), eager=False)
    assert page_bytes == memory[1] - memory[0] == writer.packer.page_bytes
    pages: dict[int, bytes] = {}
    reader = FrameReader(sink, BufferPool(1, MAX_PAYLOAD_BYTES), "image")
    while (item := await reader.next()) is not None:  # the end vouches for the order of all before it
        if isinstance(item, LeasedRun):
            pages |= content(item.run)
            item.lease.release()
    assert {at - memory[0]: page[:8] for at, page in pages.items()} == {
        page: (page + 1).to_bytes(8, "little") for page in range(0, page_bytes, PAGE)
    }
    assert pool._room.value == pool.count


async def test_what_fails_first_of_several_reads_is_raised_alone(memory: Range):
    """Nothing is mapped where all of them read; their buffers are given back."""
    pool = BufferPool(6, BUFFER)
    start = memory[1] + (1 << 40)
    source = ProcessPages(1, HostPid(os.getpid()), [(start, start + 4 * BUFFER)])
    with pytest.raises(OSError, match="page at"):
        await write_pages(FrameWriter(Memory(), pool=pool), [source], NullProgress())
    assert pool._room.value == pool.count


async def test_a_read_that_fails_ends_the_others(memory: Range):
    """What is left is not read for nothing."""

    class Slow(Packer):
        def pack(self, run: PageRun) -> PackedRun:
            time.sleep(0.2)  # the other one fails meanwhile
            return super().pack(run)

    packer, pool = Slow(), BufferPool(6, BUFFER)
    source = ProcessPages(1, HostPid(os.getpid()), [(BUFFER, 2 * BUFFER), memory])
    with pytest.raises(OSError, match="page at"):
        await write_pages(FrameWriter(Memory(), packer, pool=pool), [source], NullProgress())
    assert packer.page_bytes <= BUFFER
    assert pool._room.value == pool.count


async def test_a_write_that_fails_ends_those_who_read(memory: Range):
    class Full(Memory):
        async def write(self, *buffers: bytes | memoryview) -> None:
            if len(self.raw) > BUFFER:
                raise StorageError("full")
            await super().write(*buffers)

    pool = BufferPool(3, BUFFER)
    source = ProcessPages(1, HostPid(os.getpid()), [memory])
    with pytest.raises(StorageError, match="full"):
        await write_pages(FrameWriter(Full(), pool=pool), [source], NullProgress())
    assert pool._room.value == pool.count


async def test_what_an_earlier_image_has_is_asked_by_one_at_a_time(memory: Range):
    """Who knows the earlier image keeps account of it."""
    asking: list[int] = []
    at_once: list[int] = []

    def unchanged(space: int, segments: Sequence[Range], digests: Sequence[bytes]) -> list[int]:
        asking.append(space)
        at_once.append(len(asking))
        time.sleep(0.05)
        asking.pop()
        return []

    packer = Packer(digests=True, unchanged=unchanged)
    source = ProcessPages(1, HostPid(os.getpid()), [memory])
    pool = BufferPool(6, BUFFER)
    await write_pages(FrameWriter(Memory(), packer, pool=pool), [source], NullProgress())
    assert at_once == [1] * 4


@pytest.mark.parametrize("eager", [True, False])
async def test_records_are_translated_when_it_is_their_turn(
    fd: LocalFd, eager: bool, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is done for them while pages are read of a tree that stands still, unless somebody waits for them."""
    translated: list[Record] = []

    def into_forest(record: Record, state: Record | None, forest: Forest) -> Record:
        translated.append(record)
        return record

    monkeypatch.setattr(stages_write, "into_forest", into_forest)
    turn = trio.Event()
    seen: list[int] = []

    def all_read() -> None:
        seen.append(len(translated))
        turn.set()

    record = Content(space=1, size_bytes=PAGE)
    forest = Forest([])
    await write_image(
        FrameWriter(Memory()),
        [(record, None)],
        [FilePages(1, fd, PAGE)],
        forest,
        NullProgress(),
        all_read,
        eager=eager,
        turn=turn.wait,
    )
    assert seen == [int(eager)]
    assert translated == [record]


CHUNK = Sent.CHUNK_BYTES


@pytest.fixture
def chunks() -> Iterator[LocalFd]:
    """Shared memory of forty chunks, without a page."""
    fd = LocalFd(os.memfd_create("shared"))
    try:
        os.truncate(fd, 40 * CHUNK)
        yield fd
    finally:
        os.close(fd)


async def _news(fd: LocalFd, sent: Sent) -> tuple[list[int], dict[int, bytes]]:
    """How many segments each frame has of what is new, and the pages."""
    sink, pool = Memory(), BufferPool(6, MAX_PAYLOAD_BYTES)
    await write_translated(
        FrameWriter(sink, pool=pool), InOrder([]), [FilePages(1, fd, 40 * CHUNK, sent)], NullProgress()
    )
    assert pool._room.value == pool.count
    frames: list[int] = []
    pages: dict[int, bytes] = {}
    reader = FrameReader(sink, BufferPool(1, MAX_PAYLOAD_BYTES), "wire")
    while (item := await reader.next()) is not None:
        if isinstance(item, LeasedRun):
            frames.append(len(item.run.segments))
            pages |= content(item.run)
            item.lease.release()
    return frames, pages


async def test_what_is_new_in_many_chunks_shares_frames(chunks: LocalFd):
    """A database writes a page here and there: not a frame for each."""
    sent = Sent()
    for time_of_it in (b"1", b"2"):
        wanted = {}
        for at in range(0, 40 * CHUNK, CHUNK):
            wanted[at + 5 * PAGE] = page = (time_of_it + b"%d" % at).ljust(PAGE, b".")
            os.pwrite(chunks, page, at + 5 * PAGE)
        frames, pages = await _news(chunks, sent)
        assert pages == wanted
        assert len(frames) == 2, "32 chunks are looked at in one go"
    assert await _news(chunks, sent) == ([], {})


async def test_a_frame_of_many_chunks_has_no_more_segments_than_it_may(chunks: LocalFd):
    wanted = {
        at: (b"%d" % at).ljust(PAGE, b".")
        for start in range(0, 40 * CHUNK, CHUNK)
        for at in range(start, start + CHUNK, 2 * PAGE)
    }
    for at, page in wanted.items():
        os.pwrite(chunks, page, at)
    frames, pages = await _news(chunks, Sent())
    assert pages == wanted
    assert max(frames) <= MAX_SEGMENTS
    assert sum(frames) == len(wanted)


async def test_a_frame_of_many_chunks_is_no_larger_than_it_may_be(chunks: LocalFd):
    block = bytes(range(1, 251)) * (CHUNK // 250)
    for start in range(0, 40 * CHUNK, CHUNK):
        os.pwrite(chunks, block[: CHUNK - PAGE], start)
    frames, pages = await _news(chunks, Sent())
    assert len(pages) == 40 * 255
    assert len(frames) == 10, "four chunks fill a buffer"
    assert all(page == os.pread(chunks, PAGE, at) for at, page in pages.items())
