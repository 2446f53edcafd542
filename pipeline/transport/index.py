"""The index of an image: all of its frames in their order, without the payloads.

Whoever has read it knows the records, and where in the image each page is, and has read no page. It is what
`FrameWriter` writes beside the image while that is streamed, so neither side keeps it: 52 bytes for each 4 MiB where
memory lies together, and up to 15 bytes more for each further run of pages.

The heads in it are those of the image, so nothing is taken on trust: the digest of the ``end`` record vouches for the
index as it does for the image, and the checksum in a head for the payload that is read later. An image that was made
without one, and can be read at any place, has its index taken from itself (`HeadsOf`): a read for each frame.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from pipeline.errors import ImageError
from pipeline.image import frames
from pipeline.image.codec import Image
from pipeline.image.frames import HEAD, FrameHead, Kind, PagesHeader
from pipeline.image.packing import Packer
from pipeline.image.schema import AnyRecord, End
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import ByteSink, ByteSource, FrameHeads, FrameWriter
from pipeline.transport.storage import RangeSource, Storage, index_of

#: read at once where an image is its own index
_WINDOW_BYTES = 16 << 10


class StoredFrame(msgspec.Struct, frozen=True):
    """A frame of pages: `payload_at` is where its payload is in the image, in bytes."""

    head: FrameHead
    header: bytes
    payload_at: int
    where: str

    def pages(self) -> PagesHeader:
        """What its header says, which was checked when the index was read."""
        return frames.decode_pages(self.header, self.head.payload_bytes, self.where)


class Index(msgspec.Struct, frozen=True):
    """What an index says: the frames of pages in their order, the end, and how long image (or layer) and index are."""

    frames: list[StoredFrame]
    end: End
    image_bytes: int
    index_bytes: int


@asynccontextmanager
async def indexed(
    storage: Storage, name: str, packer: Packer, pool: BufferPool, room_bytes: int = 0
) -> AsyncIterator[FrameWriter]:
    """Write an object of frames, and its index where there is a place for one; both exist when the block ends well.

    Args:
        packer, pool: see `FrameWriter`.
        room_bytes: see `Storage.create`.
    """
    async with AsyncExitStack() as stack:
        index: ByteSink | None = None
        if storage.has_manifest:
            index = await stack.enter_async_context(storage.create(index_of(name)))
        sink = await stack.enter_async_context(storage.create(name, room_bytes))
        yield FrameWriter(sink, packer, index, pool)


async def read_index(source: ByteSource, name: str) -> tuple[Image, Index]:
    """Read the index of an image to its end.

    Args:
        source: of the index.
        name: what messages call it.

    Raises:
        ImageError: it is damaged, cut, or no index; its records do not fit together.
    """
    image = Image()
    index = await _read(source, name, image.add)
    image.check_references()
    return image, index


async def read_layer_index(source: ByteSource, name: str) -> Index:
    """Read the index of a layer to its end; raises as `read_index`. If there are records, they are another image's."""
    return await _read(source, name, lambda _: None)


async def _read(source: ByteSource, name: str, take: Callable[[AnyRecord], None]) -> Index:
    heads = FrameHeads(source, name)
    end: End | None = None
    stored: list[StoredFrame] = []
    at = page_bytes = 0
    while (frame := await heads.next()) is not None:
        at += HEAD.size + len(frame.header)
        if frame.record is not None:
            if stored and not isinstance(frame.record, End):
                raise ImageError(f"{frame.where}: a record stands among the pages")
            take(frame.record)
            if isinstance(frame.record, End):
                end = frame.record
        elif frame.head.kind == Kind.PAGES:
            one = StoredFrame(frame.head, frame.header, at, frame.where)
            page_bytes += one.pages().page_bytes
            stored.append(one)
            at += frame.head.payload_bytes
        else:
            raise ImageError(f"{frame.where}: a protocol message stands among the records")
    if end is None:
        raise ImageError(f"{name}: it ends before the end record: it is truncated")
    if end.page_bytes != page_bytes:
        raise ImageError(f"{name}: {page_bytes} bytes of pages, but its end says otherwise")
    return Index(stored, end, at, heads.bytes_read)


class HeadsOf:
    """The index of an image, taken from the image itself.

    Args:
        image: whose payloads are passed over.
    """

    def __init__(self, image: RangeSource) -> None:
        self._image = image
        self._window_at = 0
        self._window = b""
        #: where the next frame begins
        self._next = 0
        self._rest = memoryview(b"")

    async def read_into(self, view: memoryview) -> int:
        """See `ByteSource`."""
        if not self._rest:
            self._rest = memoryview(await self._next_head())
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def _next_head(self) -> bytes:
        """Head and header of the next frame; what is left of the image where that is less."""
        raw = await self._at(self._next, HEAD.size)
        if len(raw) < HEAD.size:
            return raw
        head = frames.decode_head(raw, f"{self._image.name}: byte {self._next}")
        whole = await self._at(self._next, HEAD.size + head.header_bytes)
        self._next += HEAD.size + head.header_bytes + head.payload_bytes
        return whole

    async def _at(self, offset: int, size: int) -> bytes:
        size = min(size, max(0, self._image.size_bytes - offset))
        if offset < self._window_at or offset + size > self._window_at + len(self._window):
            room = bytearray(max(size, min(_WINDOW_BYTES, self._image.size_bytes - offset)))
            await self._image.read_at(offset, memoryview(room))
            self._window, self._window_at = bytes(room), offset
        return self._window[offset - self._window_at :][:size]
