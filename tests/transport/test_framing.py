"""Frames over byte streams: pages arrive whole, and damage anywhere is seen and placed."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from pipeline.errors import ImageError
from pipeline.image.frames import MAX_PAYLOAD_BYTES, PageRun
from pipeline.image.schema import Content, End, UserNamespace
from pipeline.ledger import LEDGER
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader, FrameWriter, Message

PAGE = 4096


class Memory:
    """A byte stream in memory that hands out at most `step` bytes at once."""

    def __init__(self, raw: bytes = b"", step: int = 1 << 20) -> None:
        self.raw = bytearray(raw)
        self._step = step
        self._at = 0

    async def write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            self.raw += buffer

    async def read_into(self, view: memoryview) -> int:
        part = self.raw[self._at : self._at + min(len(view), self._step)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


async def stream() -> bytes:
    memory = Memory()
    writer = FrameWriter(memory)
    await writer.record(UserNamespace(index=0))
    await writer.record(Content(space=1, size_bytes=PAGE))
    await writer.pages(PageRun(1, [(0, PAGE)], memoryview(bytes(range(256)) * 16)))
    await writer.message(b"\x01")
    await writer.end(2, PAGE)
    assert writer.bytes_written == len(memory.raw)
    return bytes(memory.raw)


async def read(raw: bytes, step: int = 1 << 20) -> list[object]:
    reader = FrameReader(Memory(raw, step), BufferPool(1, MAX_PAYLOAD_BYTES), "test")
    items: list[object] = []
    while (item := await reader.next()) is not None:
        if isinstance(item, LeasedRun):
            items.append((item.run.space, item.run.segments, bytes(item.run.payload)))
            item.lease.release()
        else:
            items.append(item)
    assert reader.bytes_read == len(raw)
    return items


@pytest.mark.parametrize("step", [1, 3, 1000, 1 << 20])
async def test_what_was_written_is_read_in_parts_of_any_size(step: int):
    items = await read(await stream(), step)
    assert items[:2] == [UserNamespace(index=0), Content(space=1, size_bytes=PAGE)]
    assert items[2] == (1, [(0, PAGE)], bytes(range(256)) * 16)
    assert items[3] == Message(b"\x01")
    assert isinstance(items[4], End)
    assert (items[4].records, items[4].page_bytes) == (2, PAGE)
    assert len(items) == 5


async def test_a_cut_at_any_byte_is_seen():
    raw = await stream()
    held = LEDGER.held()
    for cut in [*range(300), *range(300, len(raw), 97), *range(len(raw) - 120, len(raw))]:
        items: list[object] = []
        with suppress(ImageError):
            items = await read(raw[:cut])
        assert not [item for item in items if isinstance(item, End)]
    assert LEDGER.held() == held


async def test_a_cut_is_placed():
    raw = await stream()
    with pytest.raises(ImageError, match=r"test: frame 0 at byte 0: .*truncated"):
        await read(raw[:10])
    with pytest.raises(ImageError, match=r"test: frame [34] at byte \d+: .*truncated"):
        await read(raw[:-1])


async def test_a_changed_bit_anywhere_is_seen():
    raw = await stream()
    held = LEDGER.held()
    for position in [*range(300), *range(300, len(raw), 61), *range(len(raw) - 120, len(raw))]:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        items: list[object] = []
        with suppress(ImageError):
            items = await read(bytes(damaged))
        # the kind of the last frame: a message, so that there is no end
        assert not [item for item in items if isinstance(item, End)], f"byte {position}"
    assert LEDGER.held() == held


@pytest.mark.parametrize("dropped", range(4))
async def test_a_missing_frame_is_seen_at_the_end(dropped: int):
    memory = Memory()
    writer = FrameWriter(memory)
    starts = []
    for index in range(4):
        starts.append(writer.bytes_written)
        await writer.record(UserNamespace(index=index))
    starts.append(writer.bytes_written)
    await writer.end(4, 0)
    raw = bytes(memory.raw[: starts[dropped]] + memory.raw[starts[dropped + 1] :])
    with pytest.raises(ImageError, match="missing, double or out of order"):
        await read(raw)


async def test_buffers_are_bounded_and_given_back():
    pool = BufferPool(2, PAGE)
    first, second = await pool.lease(), await pool.lease()
    with trio.move_on_after(0.01) as scope:
        await pool.lease()
    assert scope.cancelled_caught
    first.release()
    first.release()  # idempotent
    third = await pool.lease()
    second.release()
    third.release()


async def test_a_reader_that_is_cancelled_gives_its_buffer_back():
    class Stalled(Memory):
        async def read_into(self, view: memoryview) -> int:
            if self._at >= 200:
                await trio.sleep_forever()
            return await super().read_into(view[: 200 - self._at])

    memory = Memory()
    await FrameWriter(memory).pages(PageRun(1, [(0, PAGE)], memoryview(bytes(PAGE))))
    pool = BufferPool(1, MAX_PAYLOAD_BYTES)
    with trio.move_on_after(0.05):
        await FrameReader(Stalled(bytes(memory.raw)), pool, "test").next()
    with trio.fail_after(5):
        (await pool.lease()).release()
