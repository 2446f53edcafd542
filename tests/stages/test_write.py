"""The write stage: what goes out when."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pipeline.ids import LocalFd
from pipeline.image.schema import Content
from pipeline.kernel.pagemap import Range
from pipeline.progress import NullProgress
from pipeline.stages.memory import FilePages, LivePages
from pipeline.stages.write import in_order, write_pages, write_translated
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import FrameWriter
from tests.harness.made_images import Memory

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
        await write_translated(FrameWriter(sink), in_order([record]), sources, NullProgress(), eager=eager)
    assert seen == [eager]


async def test_each_round_reads_into_the_buffers_of_the_one_before(fd: LocalFd):
    pool = BufferPool(3, PAGE)
    writer = FrameWriter(Memory(), pool=pool)
    used: set[int] = set()
    for _ in range(3):
        assert await write_pages(writer, [FilePages(1, fd, PAGE)], NullProgress()) == PAGE
        used |= set(map(id, pool._free))
    assert len(used) == 1
