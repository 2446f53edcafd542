"""Several connections: what is written comes in the order in which it was written, and a lost one is seen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError, PeerError
from pipeline.image.frames import MAX_PAYLOAD_BYTES, PageRun
from pipeline.image.schema import End, UserNamespace
from pipeline.ledger import LEDGER
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader, FrameWriter, Message
from pipeline.transport.spread import SpreadReader, SpreadWriter

PAGE = 4096


class Memory:
    def __init__(self) -> None:
        self.raw = bytearray()
        self._at = 0
        self.broken = False

    async def write(self, *buffers: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise PeerError("broken")
        for buffer in buffers:
            self.raw += buffer

    async def read_into(self, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        part = self.raw[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


async def write(what: Sequence[str], count: int) -> list[Memory]:
    """``p`` pages, numbered by their address, ``m`` a message, ``r`` a record; then the end."""
    memories = [Memory() for _ in range(count)]
    first, *others = [FrameWriter(memory) for memory in memories]
    writer = SpreadWriter(first, others)
    freed = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        for number, kind in enumerate(what):
            if kind == "p":
                size = PAGE * (1 + number % 40)
                packed = await writer.pack(PageRun(1, [(number << 24, size)], memoryview(b"x" * size)))
                await writer.packed(packed, lambda number=number: freed.append(number))
            elif kind == "m":
                await writer.message(b"%d" % number)
            else:
                await writer.record(UserNamespace(index=number))
        await writer.end(what.count("r"), 0)
        assert writer.total_bytes() == sum(len(memory.raw) for memory in memories)
        nursery.cancel_scope.cancel()
    assert sorted(freed) == [number for number, kind in enumerate(what) if kind == "p"]
    return memories


async def read(memories: Sequence[Memory]) -> list[str]:
    first, *others = [FrameReader(memory, BufferPool(3, MAX_PAYLOAD_BYTES), "test") for memory in memories]
    reader = SpreadReader(first, others)
    found = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        try:
            with trio.fail_after(10):
                while True:
                    item = await reader.next()
                    if isinstance(item, LeasedRun):
                        found.append(f"p{item.run.segments[0][0] >> 24}")
                        item.lease.release()
                    elif isinstance(item, Message):
                        found.append(f"m{int(item.content)}")
                    elif isinstance(item, End):
                        found.append("end")
                        return found
                    elif isinstance(item, UserNamespace):
                        found.append(f"r{item.index}")
                    else:
                        raise PeerError("the first is lost")
        except (PeerError, ImageError):
            return found
        finally:
            nursery.cancel_scope.cancel()


@given(st.text("pppmr", max_size=25), st.integers(1, 5))
def test_everything_comes_in_the_order_in_which_it_was_written(what: str, count: int):
    async def main() -> None:
        expected = [f"{kind}{number}" for number, kind in enumerate(what)]
        assert await read(await write(what, count)) == [*expected, "end"]

    trio.run(main)


@pytest.mark.parametrize("lost", range(3))
async def test_a_connection_that_is_cut_anywhere_is_seen(lost: int):
    what = "rppppmppr"
    length = len((await write(what, 3))[lost].raw)
    for cut in [*range(0, length, 997), length - 1]:
        memories = await write(what, 3)
        del memories[lost].raw[cut:]
        held = LEDGER.held()
        found = await read(memories)
        assert LEDGER.held() == held
        assert "end" not in found
        assert found == [f"{kind}{number}" for number, kind in enumerate(what)][: len(found)]


async def test_a_connection_that_breaks_while_it_is_written_fails_the_writer():
    memories = [Memory() for _ in range(3)]
    first, *others = [FrameWriter(memory) for memory in memories]
    writer = SpreadWriter(first, others)
    given_back = []

    async def send() -> None:
        for number in range(100):
            packed = await writer.pack(PageRun(1, [(number << 24, PAGE)], memoryview(b"x" * PAGE)))
            memories[2].broken = number > 10
            await writer.packed(packed, lambda number=number: given_back.append(number))
        await writer.end(0, 0)
        raise AssertionError("it was written to the end")

    with trio.fail_after(10), pytest.RaisesGroup(PeerError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(send)
    assert len(given_back) == len(set(given_back)) == max(given_back) + 1
    assert max(given_back) < 99


async def test_who_drains_a_connection_whose_further_ones_are_not_read_any_more_is_told_so():
    """`serve` is ended while it refuses a tree: what its source still sends is read behind that."""
    memories = await write("ppp", 2)
    pool = BufferPool(8, 1 << 20)
    held = LEDGER.held()
    one, other = (FrameReader(memory, pool, "wire") for memory in memories)
    reader = SpreadReader(one, [other])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        first = await reader.next()
        assert isinstance(first, LeasedRun)
        first.lease.release()
        nursery.cancel_scope.cancel()
    with pytest.raises(PeerError, match="not read any more"):
        await reader.next()
    assert LEDGER.held() == held
