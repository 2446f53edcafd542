"""The pages of an image, to be read in any order: for a tree that runs before they are there.

The index of the image tells where they are (`pipeline.transport.index`); what they hold is read, and its checksum
verified, when it is wanted. A frame is read whole: what lies around a page that somebody waits for is likely to be
wanted next.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

from pipeline.errors import ImageError
from pipeline.image.codec import Image
from pipeline.image.frames import MAX_PAYLOAD_BYTES, PageRun, PagesHeader
from pipeline.kernel.pagemap import Range, intersect, merged, subtract
from pipeline.resources.memory.missing import RangeSet
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import unpacked
from pipeline.transport.index import HeadsOf, Index, read_index
from pipeline.transport.storage import IMAGE, INDEX, DirectoryStorage, RangeSource, Storage

#: pages that are under way at once
_BUFFERS = 8


@asynccontextmanager
async def stored_pages(storage: Storage, index_bytes: int) -> AsyncIterator[StoredPages]:
    """The pages of the complete image in `storage`.

    Args:
        storage: where it is.
        index_bytes: how long its index is, as its manifest says; 0: it was made without one.

    Raises:
        ImageError: image or index are cut, damaged, not of one another, or none of ours.
        StorageError: it cannot be read.
        UsageError: it cannot be read in any order.
    """
    async with storage.open_ranges(IMAGE) as image:
        if index_bytes:
            index = await stored_index(storage, index_bytes)
        elif isinstance(storage, DirectoryStorage):
            index = await read_index(HeadsOf(image), image.name)
        else:
            raise ImageError(
                f"{storage.name}: the image has no index (an older version made it), and --lazy would have to read all "
                "of it first: leave --lazy out"
            )
        if image.size_bytes != index.image_bytes:
            raise ImageError(
                f"{image.name}: it has {image.size_bytes} bytes, and {index.image_bytes} by its index: it is "
                "truncated, or another image"
            )
        yield StoredPages(index, image)


async def stored_index(storage: Storage, size_bytes: int) -> Index:
    """The index that is kept beside an image, `size_bytes` long as the manifest says.

    Raises:
        ImageError: it is missing, damaged or cut.
        StorageError: it cannot be read.
    """
    name = f"{storage.name}/{INDEX}"
    try:
        async with storage.open(INDEX) as source:
            index = await read_index(source, name)
        if index.index_bytes != size_bytes:
            raise ImageError(f"{name}: it has {index.index_bytes} bytes, and {size_bytes} by the manifest")
    except ImageError as error:
        raise ImageError(f"the index of the image: {error} (only --lazy needs it: leave it out)") from None
    return index


class StoredPages:
    """The pages of a complete image.

    Args:
        index: of it.
        source: the image itself.
    """

    def __init__(self, index: Index, source: RangeSource) -> None:
        self._frames = index.frames
        self._source = source
        self._pool = BufferPool(_BUFFERS, MAX_PAYLOAD_BYTES)
        #: the records
        self.image: Image = index.image
        self.bytes_read = index.index_bytes
        #: by space: first addresses of its ranges, ascending, and in which frame each is
        self._places: dict[int, tuple[array[int], array[int]]] = {}
        self._ranges: dict[int, list[Range]] = {}
        #: by number: what counts of a frame of which something is in a later one, too
        self._last: dict[int, list[Range]] = {}
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, frame in enumerate(self._frames):
            pages = frame.pages()
            found.setdefault(pages.space, []).extend((a, b, number) for a, b in _ranges_of(pages))
        for space, pieces in found.items():
            pieces.sort()
            if any(before[1] > behind[0] for before, behind in pairwise(pieces)):
                pieces = self._settle(pieces)
            self._places[space] = array("Q", (a for a, _, _ in pieces)), array("Q", (n for _, _, n in pieces))
            self._ranges[space] = merged((a, b) for a, b, _ in pieces)

    def _settle(self, pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Of pages that are there twice the last ones count, as for who reads the image from its begin."""
        covered = RangeSet()
        own: dict[int, list[Range]] = {}
        for a, b, number in sorted(pieces, key=lambda piece: piece[2], reverse=True):
            own.setdefault(number, []).extend(subtract([(a, b)], covered.within(a, b)))
            covered.add(a, b)
        self._last |= {number: merged(sorted(ranges)) for number, ranges in own.items()}
        return sorted((a, b, number) for number, ranges in own.items() for a, b in ranges)

    def ranges(self, space: int) -> list[Range]:
        """What there are pages of, zeros too, ascending."""
        return self._ranges.get(space, [])

    def _own(self, number: int) -> tuple[int, list[Range]]:
        """The space of a frame, and what counts of it."""
        pages = self._frames[number].pages()
        own = self._last.get(number)
        return pages.space, _ranges_of(pages) if own is None else own

    async def load(self, number: int) -> LeasedRun:
        """The pages of a frame, without those that a later one has; the caller releases the lease.

        Raises:
            ImageError: they are damaged, or the image is another one now.
            StorageError: they cannot be read now.
        """
        frame = self._frames[number]
        lease = await self._pool.lease()
        try:
            payload = lease.view[: frame.head.payload_bytes]
            await self._source.read_at(frame.payload_at, payload)
            self.bytes_read += len(payload)
            where = f"{self._source.name}: pages at byte {frame.payload_at}"
            run = await unpacked(frame.head, frame.header, payload, where)
            if number in self._last:
                run = _without(run, subtract(_ranges_of(frame.pages()), self._last[number]))
        except BaseException:
            lease.release()
            raise
        return LeasedRun(run, lease)

    # -- what comes before ------------------------------------------------------------------------

    async def sooner(self, later: Mapping[int, Sequence[Range]]) -> AsyncIterator[LeasedRun]:
        """Every page that does not come later, in the order of the image; whoever gets a run releases its lease.

        Args:
            later: ranges by space, ascending.
        """
        waiting = {space: RangeSet(ranges) for space, ranges in later.items()}
        for number in range(len(self._frames)):
            space, own = self._own(number)
            waits = _within(waiting.get(space), own)
            if not subtract(own, waits):
                continue
            leased = await self.load(number)
            yield LeasedRun(_without(leased.run, waits), leased.lease) if waits else leased

    # -- what comes later -------------------------------------------------------------------------

    def later(self, later: Mapping[int, Sequence[Range]]) -> list[int]:
        """The numbers of the frames in which there is something of what comes later.

        Args:
            later: ranges by space, ascending.
        """
        waiting = {space: RangeSet(ranges) for space, ranges in later.items()}
        found = []
        for number in range(len(self._frames)):
            space, own = self._own(number)
            if intersect(own, _within(waiting.get(space), own)):
                found.append(number)
        return found

    def frame_of(self, space: int, address: int) -> int:
        """The number of the frame that the page at `address` is in, which is one of `ranges`."""
        starts, numbers = self._places[space]
        return numbers[bisect_right(starts, address) - 1]


def _ranges_of(pages: PagesHeader) -> list[Range]:
    """What a frame has pages of, zeros too, ascending."""
    return merged(sorted((start, start + size) for start, size in [*pages.segments, *pages.zeros]))


def _within(waiting: RangeSet | None, ranges: Sequence[Range]) -> list[Range]:
    """The part of `waiting` that is around `ranges`, which ascend."""
    return waiting.within(ranges[0][0], ranges[-1][1]) if waiting is not None and ranges else []


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
