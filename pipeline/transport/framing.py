"""Frames over any byte stream: files, pipes, sockets, TLS, object stores.

Sending hands a payload on without copying it, and receiving reads it straight into a leased
buffer of the pool. Only what is small is gathered: a tree with ten thousand descriptors has as
many records, and a system call and a change of threads for each would cost more than all the rest.
What was read is checked before it is given out; an end of the stream in the middle of a
frame is an error that says where.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import xxhash

from pipeline.errors import ImageError
from pipeline.image import codec, frames
from pipeline.image.frames import Codec, FrameHead, Kind, PageRun
from pipeline.image.packing import PackedRun, Packer, uncompress
from pipeline.image.schema import AnyRecord, End, Record
from pipeline.transport.buffers import BUFFER_BYTES, BUFFERS, BufferPool, LeasedRun
from pipeline.transport.handover import worked

#: frames and payloads below this size are copied, to be written together and read ahead
_SMALL_BYTES = 64 << 10


class ByteSink(Protocol):
    """Somewhere to write to, in order."""

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write all of the buffers; none is referred to after the return."""


class ByteSource(Protocol):
    """Somewhere to read from, in order."""

    async def read_into(self, view: memoryview) -> int:
        """Read at least one byte into `view`; 0 only at the end."""


class Message(msgspec.Struct, frozen=True):
    """A protocol message, still packed (see `pipeline.transport.protocol`)."""

    content: bytes


Item = AnyRecord | LeasedRun | Message


class _Gathering:
    """Writes what is small together."""

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self._gathered = bytearray()
        self.bytes_written = 0

    async def write(self, *buffers: bytes | memoryview) -> None:
        size = sum(len(buffer) for buffer in buffers)
        if size < _SMALL_BYTES:
            for buffer in buffers:
                self._gathered += buffer
            if len(self._gathered) >= _SMALL_BYTES:
                await self.flush()
        else:
            await self._sink.write(*self._taken(), *buffers)
        self.bytes_written += size

    async def flush(self) -> None:
        if gathered := self._taken():
            await self._sink.write(*gathered)

    def _taken(self) -> list[memoryview]:
        """What was gathered, to be written now; at most one."""
        gathered, self._gathered = self._gathered, bytearray()
        return [memoryview(gathered)] if gathered else []


class FrameWriter:
    """Writes frames to a sink; not to be used by two tasks at once.

    Args:
        sink: where to.
        packer: what makes frames of pages; without one they are not compressed.
        index: gets the frames without their payloads: see `pipeline.transport.index`.
        pool: what pages are read into on their way here; without one, it has its own.
    """

    def __init__(
        self,
        sink: ByteSink,
        packer: Packer | None = None,
        index: ByteSink | None = None,
        pool: BufferPool | None = None,
    ) -> None:
        self._out = _Gathering(sink)
        self._index = _Gathering(index) if index is not None else None
        self.packer = packer or Packer()
        self.pool = pool or BufferPool(BUFFERS, BUFFER_BYTES)
        self._digest = xxhash.xxh3_128()
        #: that of the end record, once it is written
        self.digest = b""

    @property
    def bytes_written(self) -> int:
        """Of all frames."""
        return self._out.bytes_written

    @property
    def index_bytes(self) -> int:
        """Of the index; 0 where none is written."""
        return self._index.bytes_written if self._index is not None else 0

    async def record(self, record: Record) -> None:
        """Write one record, at the latest with the next message or the end."""
        await self._write(frames.encode(Kind.RECORD, codec.encode(record)))

    async def message(self, content: bytes) -> None:
        """Write one protocol message, and what was gathered before it."""
        await self._write(frames.encode(Kind.MESSAGE, content))
        await self.flush()

    async def pages(self, run: PageRun) -> None:
        """Write pages, whose zero pages are taken out of the payload; the caller keeps the buffer."""
        await self.packed(await self.pack(run))

    async def pack(self, run: PageRun) -> PackedRun:
        """What `packed` is to write of `run`, while another one is written."""
        return await worked(len(run.payload), self.packer.pack, run)

    def total_bytes(self) -> int:
        """Bytes written, on all connections where there are several."""
        return self.bytes_written

    async def packed(self, run: PackedRun, done: Callable[[], object] | None = None) -> None:
        """Write a run that `pack` made, in the order in which it made them; `done` is told when its buffer is free."""
        begin = time.perf_counter()
        try:
            if run.head:
                await self._write(run.head, run.payload)
        finally:
            if done is not None:
                done()
        self.packer.wrote(run, time.perf_counter() - begin)

    async def end(self, records: int, page_bytes: int) -> None:
        """Write the end record, which vouches for every frame before it."""
        self.digest = self._digest.digest()
        await self.record(End(records=records, page_bytes=page_bytes, digest=self.digest))
        await self.flush()

    async def _write(self, head: bytes, payload: bytes | memoryview = b"") -> None:
        self._digest.update(head)
        if self._index is not None:
            await self._index.write(head)
        await self._out.write(head, payload)

    async def flush(self) -> None:
        """Write what was gathered."""
        await self._out.flush()
        if self._index is not None:
            await self._index.flush()


class Frame(NamedTuple):
    """A frame whose head and header are read and right; its payload is not read yet."""

    head: FrameHead
    header: bytes
    #: for messages about it
    where: str
    #: what its header holds, of a RECORD frame
    record: AnyRecord | None


class FrameHeads:
    """Reads heads and headers of frames from a source; payloads, where they are among them, are left to `fill`.

    Args:
        source: where from.
        name: what messages call the stream.
    """

    def __init__(self, source: ByteSource, name: str) -> None:
        self._source = source
        self._name = name
        self._digest = xxhash.xxh3_128()
        self._ahead = memoryview(bytearray(_SMALL_BYTES))
        #: what of `_ahead` was read and is not used yet
        self._ready = self._ahead[:0]
        self.bytes_read = 0
        self._frames = 0

    async def next(self) -> Frame | None:
        """The next one; None at an end between two frames.

        Raises:
            ImageError: the stream is cut, damaged, or no stream of ours.
        """
        where = f"{self._name}: frame {self._frames} at byte {self.bytes_read}"
        raw = await self._take(frames.HEAD.size, where, may_end=True)
        if raw is None:
            return None
        head = frames.decode_head(raw, where)
        header = await self._take(head.header_bytes, where)
        assert header is not None
        frames.check_sum(header, head.header_sum, where)
        self._frames += 1
        record = self._record(header, where) if head.kind == Kind.RECORD else None
        self._digest.update(raw + header)
        return Frame(head, header, where, record)

    def _record(self, header: bytes, where: str) -> AnyRecord:
        try:
            record = codec.decode(header)
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from None
        if isinstance(record, End) and record.digest != self._digest.digest():
            raise ImageError(f"{where}: frames before the end are missing, double or out of order")
        return record

    async def _take(self, count: int, where: str, may_end: bool = False) -> bytes | None:
        """The next `count` bytes; None if nothing comes, where that may be. Raises as `fill`."""
        if count <= len(self._ready):
            taken, self._ready = bytes(self._ready[:count]), self._ready[count:]
            self.bytes_read += count
            return taken
        read = bytearray(count)
        return bytes(read) if await self.fill(memoryview(read), where, may_end) else None

    async def fill(self, view: memoryview, where: str, may_end: bool = False) -> bool:
        """Fill `view` with what comes next; False if nothing does, where that may be.

        Raises:
            ImageError: less than that comes.
        """
        done = 0
        while done < len(view):
            rest = view[done:]
            if not self._ready and len(rest) < _SMALL_BYTES:
                self._ready = self._ahead[: await self._source.read_into(self._ahead)]
            if self._ready:
                count = min(len(rest), len(self._ready))
                rest[:count] = self._ready[:count]
                self._ready = self._ready[count:]
            else:
                count = 0 if len(rest) < _SMALL_BYTES else await self._source.read_into(rest)
            if count == 0:
                if may_end and done == 0:
                    return False
                raise ImageError(f"{where}: the stream ends in the middle of a frame: it is truncated")
            done += count
            self.bytes_read += count
        return True


class FrameReader:
    """Reads frames from a source.

    Args:
        source: where from.
        pool: where payloads go; its buffers hold `frames.MAX_PAYLOAD_BYTES`.
        name: what messages call the stream.
    """

    def __init__(self, source: ByteSource, pool: BufferPool, name: str) -> None:
        self._heads = FrameHeads(source, name)
        self.pool = pool

    @property
    def bytes_read(self) -> int:
        """Of all frames."""
        return self._heads.bytes_read

    async def next(self) -> Item | None:
        """The next item; None at an end between two frames.

        Ownership: the caller releases the lease of a `LeasedRun`.

        Raises:
            ImageError: the stream is cut, damaged, or no stream of ours.
        """
        frame = await self._heads.next()
        if frame is None:
            return None
        if frame.record is not None:
            return frame.record
        if frame.head.kind == Kind.MESSAGE:
            return Message(frame.header)
        return await self._pages(frame)

    async def _pages(self, frame: Frame) -> LeasedRun:
        lease = await self.pool.lease()
        try:
            payload = lease.view[: frame.head.payload_bytes]
            await self._heads.fill(payload, frame.where)
            return LeasedRun(await unpacked(frame.head, frame.header, payload, frame.where), lease)
        except BaseException:
            lease.release()
            raise


async def unpacked(head: FrameHead, header: bytes, payload: memoryview, where: str) -> PageRun:
    """The pages of a frame, its checksum verified, then unpacked.

    What a compressed payload holds is memory of its own, of which there is no more than a payload for each lease.

    Raises:
        ImageError: they are damaged.
    """
    return await worked(len(payload), _page_run, head, header, payload, where)


def _page_run(head: FrameHead, header: bytes, payload: memoryview, where: str) -> PageRun:
    frames.check_sum(payload, head.payload_sum, where)
    pages = frames.decode_pages(header, len(payload), where)
    if pages.codec != Codec.NONE:
        payload = uncompress(pages.codec, payload, pages.page_bytes, where)
    return PageRun(pages.space, pages.segments, payload, pages.zeros)
