"""Small images made in memory, with their index, of whatever pages a test wants."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.image.frames import PageRun
from pipeline.image.packing import Compression, Packer
from pipeline.transport.framing import FrameWriter
from tests.cli import test_inspect

PAGE = 4096
#: of the address space in the records
SPACE = 7


class Memory:
    """Bytes in memory: a stream to write and to read, and an object that is read at any place."""

    def __init__(self, raw: bytes = b"", name: str = "memory") -> None:
        self.raw = bytearray(raw)
        self.name = name
        self._at = 0

    @property
    def size_bytes(self) -> int:
        return len(self.raw)

    async def write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            self.raw += buffer

    async def read_into(self, view: memoryview) -> int:
        part = self.raw[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    async def read_at(self, offset: int, view: memoryview) -> None:
        part = self.raw[offset : offset + len(view)]
        assert len(part) == len(view), "behind the end"
        view[:] = part


def run(start: int, content: bytes, space: int = SPACE) -> PageRun:
    """Pages that lie together."""
    return PageRun(space, [(start, len(content))], memoryview(content))


def content(run: PageRun) -> dict[int, bytes]:
    """The bytes of each page."""
    found = {}
    at = 0
    for start, length in run.segments:
        for page in range(0, length, PAGE):
            found[start + page] = bytes(run.payload[at : at + PAGE])
            at += PAGE
    for start, length in run.zeros:
        found |= {start + page: bytes(PAGE) for page in range(0, length, PAGE)}
    return found


async def made(
    runs: Sequence[PageRun], compression: Compression = "none", *, digests: bool = False
) -> tuple[Memory, Memory]:
    """An image of two processes with these pages, and its index."""
    image, index = Memory(name="image"), Memory(name="index")
    writer = FrameWriter(image, Packer(compression, digests), index)
    count = 0
    for record in test_inspect.image().image.records():
        await writer.record(record)
        count += 1
    page_bytes = 0
    for one in runs:
        packed = await writer.pack(one)
        page_bytes += packed.page_bytes
        await writer.packed(packed)
    await writer.end(count, page_bytes)
    assert writer.bytes_written == len(image.raw)
    assert writer.index_bytes == len(index.raw)
    return image, index
