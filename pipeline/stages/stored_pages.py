"""The pages of an image in a file, to be read in any order: for a tree that runs before they are there.

One pass over the heads of the frames tells where the pages are; what they hold is read, and its checksum verified, when
it is wanted. A frame is read whole: what lies around a page that somebody waits for is likely to be wanted next.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
import xxhash

from pipeline.errors import ImageError, StorageError, ungrouped
from pipeline.image import codec, frames
from pipeline.image.frames import HEAD, MAX_PAYLOAD_BYTES, FrameHead, Kind, PageRun, PagesHeader
from pipeline.image.packing import uncompress
from pipeline.image.schema import End
from pipeline.kernel.pagemap import Range, intersect, merged, subtract, total_bytes
from pipeline.progress import Progress
from pipeline.stages.pager import Pager
from pipeline.transport.buffers import BufferPool, LeasedRun

_BUFFERS = 3


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a frame of pages is, and what it holds."""

    pages: PagesHeader
    head: FrameHead
    payload_at: int
    where: str

    def ranges(self) -> list[Range]:
        """What it has pages of, zeros too, ascending."""
        return merged(
            sorted((start, start + size) for start, size in [*self.pages.segments, *self.pages.zeros])
        )


class StoredPages:
    """The pages of a complete image.

    Args:
        path: of its file.

    Raises:
        ImageError: it is cut, damaged or no image of ours.
        StorageError: it cannot be read.

    Ownership: `close` gives the file back.
    """

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        self._pool = BufferPool(_BUFFERS, MAX_PAYLOAD_BYTES)
        self._frames: list[_Frame] = []
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        try:
            self._scan()
        except BaseException:
            self.close()
            raise
        #: by space: first address of each range, and the frame that it is in; ascending
        self._places: dict[int, tuple[list[int], list[int]]] = {}
        found: dict[int, list[tuple[int, int]]] = {}
        for number, frame in enumerate(self._frames):
            for start, _ in frame.ranges():
                found.setdefault(frame.pages.space, []).append((start, number))
        for space, pairs in found.items():
            pairs.sort()
            self._places[space] = [start for start, _ in pairs], [number for _, number in pairs]

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, size: int, at: int, where: str) -> bytes:
        try:
            raw = os.pread(self._fd, size, at)
        except OSError as error:
            raise StorageError(f"{where}: {error.strerror}") from error
        if len(raw) != size:
            raise ImageError(f"{where}: the file ends in the middle of a frame: it is truncated")
        return raw

    def _scan(self) -> None:
        """Look at every head, as who reads the image from its begin would."""
        digest = xxhash.xxh3_128()
        at = number = 0
        ended = False
        size = os.fstat(self._fd).st_size
        while at < size:
            where = f"{self._name}: frame {number} at byte {at}"
            raw = self._read(HEAD.size, at, where)
            head = frames.decode_head(raw, where)
            header = self._read(head.header_bytes, at + HEAD.size, where)
            frames.check_sum(header, head.header_sum, where)
            payload_at = at + HEAD.size + head.header_bytes
            if head.kind == Kind.PAGES:
                pages = frames.decode_pages(header, head.payload_bytes, where)
                self._frames.append(_Frame(pages, head, payload_at, where))
            elif isinstance(end := codec.decode(header), End):
                ended = True
                if end.digest != digest.digest():
                    raise ImageError(f"{where}: frames before the end are missing, double or out of order")
            digest.update(raw + header)
            at = payload_at + head.payload_bytes
            number += 1
        if not ended or at != size:
            raise ImageError(f"{self._name}: the image ends before its end record: it is truncated")

    def ranges(self, space: int) -> list[Range]:
        """What there are pages of, zeros too, ascending."""
        return merged(
            sorted(one for frame in self._frames if frame.pages.space == space for one in frame.ranges())
        )

    async def _load(self, frame: _Frame) -> LeasedRun:
        """The pages of a frame; the caller releases the lease."""
        lease = await self._pool.lease()
        try:
            run = await trio.to_thread.run_sync(partial(self._unpack, frame, lease.view))
        except BaseException:
            lease.release()
            raise
        return LeasedRun(run, lease)

    def _unpack(self, frame: _Frame, view: memoryview) -> PageRun:
        payload = view[: frame.head.payload_bytes]
        done = 0
        while done < len(payload):
            try:
                count = os.preadv(self._fd, [payload[done:]], frame.payload_at + done)
            except OSError as error:
                raise StorageError(f"{frame.where}: {error.strerror}") from error
            if not count:
                raise ImageError(f"{frame.where}: the file became shorter")
            done += count
        frames.check_sum(payload, frame.head.payload_sum, frame.where)
        pages = frame.pages
        if pages.codec != frames.Codec.NONE:
            payload = uncompress(pages.codec, payload, pages.page_bytes, frame.where)
        return PageRun(pages.space, pages.segments, payload, pages.zeros)

    # -- what comes before ------------------------------------------------------------------------

    async def sooner(self, later: Mapping[int, Sequence[Range]]) -> AsyncIterator[LeasedRun]:
        """Every page that does not come later, in the order of the image; whoever gets a run releases its lease.

        Args:
            later: ranges by space, ascending.
        """
        for frame in self._frames:
            waits = later.get(frame.pages.space, ())
            if not subtract(frame.ranges(), waits):
                continue
            leased = await self._load(frame)
            yield LeasedRun(_without(leased.run, waits), leased.lease) if waits else leased

    # -- what comes later -------------------------------------------------------------------------

    async def bring_all(self, pager: Pager, later: Mapping[int, Sequence[Range]], progress: Progress) -> None:
        """Bring what comes later, first what somebody waits for, until no page is missing.

        Raises:
            ImageError: the image is damaged.
            StorageError: it cannot be read any more.
        """
        progress.phase("postcopy")
        total = sum(total_bytes(ranges) for ranges in later.values())
        left = {
            number
            for number, frame in enumerate(self._frames)
            if intersect(frame.ranges(), later.get(frame.pages.space, ()))
        }

        async def bring(number: int) -> None:
            if number in left:
                left.remove(number)
                leased = await self._load(self._frames[number])
                try:
                    await pager.bring(leased.run)
                finally:
                    leased.lease.release()
                progress.advance(min(pager.bytes_done, total), total)

        async def bring_wanted() -> None:
            async for space, address in pager.wanted():
                starts, numbers = self._places[space]
                await bring(numbers[bisect_right(starts, address) - 1])

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring_wanted)
                for number in sorted(left):
                    await bring(number)
                await pager.whole.wait()
                nursery.cancel_scope.cancel()


def _without(run: PageRun, ranges: Sequence[Range]) -> PageRun:
    """The part of a run that is not in some ranges; its payload is moved together."""
    segments: list[tuple[int, int]] = []
    at = done = 0
    payload = run.payload if not run.payload.readonly else memoryview(bytearray(run.payload))
    for start, length in run.segments:
        for a, b in subtract([(start, start + length)], ranges):
            first = at + a - start
            payload[done : done + b - a] = payload[first : first + b - a]
            segments.append((a, b - a))
            done += b - a
        at += length
    zeros = [
        (a, b - a) for start, length in run.zeros for a, b in subtract([(start, start + length)], ranges)
    ]
    return PageRun(run.space, segments, payload[:done], zeros)
