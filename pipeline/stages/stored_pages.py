"""The pages of an image, to be read in any order: for a tree that runs before they are there, and out of layers.

The indexes of the image and its layers tell where they are (`pipeline.transport.index`); what they hold is read, and
its checksum verified, when it is wanted. A frame is read whole: what lies around a page that somebody waits for is
likely to be wanted next. Of a page that is there several times the last one counts, and what the image itself has of it
counts more than its layers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from msgspec.structs import replace

from pipeline.errors import ImageError
from pipeline.image.codec import Image
from pipeline.image.frames import MAX_PAYLOAD_BYTES, PageRun, PagesHeader
from pipeline.image.schema import Layer
from pipeline.kernel.pagemap import Range, intersect, merged, subtract, total_bytes
from pipeline.resources.memory.missing import RangeSet
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import unpacked
from pipeline.transport.index import HeadsOf, Index, StoredFrame, read_index, read_layer_index
from pipeline.transport.manifest import read_manifest
from pipeline.transport.storage import (
    IMAGE,
    INDEX,
    DirectoryStorage,
    RangeSource,
    Storage,
    index_of,
    referred,
)

#: pages that are under way at once
_BUFFERS = 8


@asynccontextmanager
async def stored_pages(storage: Storage) -> AsyncIterator[StoredPages]:
    """The pages of the complete image in `storage`, of which only the indexes are read at once.

    Raises:
        ImageError: image or index are cut, damaged, not of one another, or none of ours.
        StorageError: it cannot be read.
        UsageError: it cannot be read in any order.
    """
    async with AsyncExitStack() as stack:
        manifest = await read_manifest(storage)
        source = await stack.enter_async_context(storage.open_ranges(IMAGE))
        if manifest is not None and manifest.index_bytes:
            image, index = await stored_index(storage, manifest.index_bytes)
        elif isinstance(storage, DirectoryStorage):
            image, index = await read_index(HeadsOf(source), source.name)
        else:
            raise ImageError(
                f"{storage.name}: the image has no index (an older version made it), and --lazy would have to read all "
                "of it first: leave --lazy out"
            )
        layers = {}
        for number, layer in image.layers.items():
            place = referred(storage, layer.at)
            with needed(storage, layer):
                there = await stack.enter_async_context(place.open_ranges(layer.name))
                layers[number] = Located(await layer_index(storage, layer), there, place)
        yield StoredPages(image, Located(index, source, storage), layers)


async def stored_index(storage: Storage, size_bytes: int) -> tuple[Image, Index]:
    """The index that is kept beside an image, `size_bytes` long as the manifest says.

    Raises:
        ImageError: it is missing, damaged or cut.
        StorageError: it cannot be read.
    """
    name = f"{storage.name}/{INDEX}"
    try:
        async with storage.open(INDEX) as source:
            image, index = await read_index(source, name)
        if index.index_bytes != size_bytes:
            raise ImageError(f"{name}: it has {index.index_bytes} bytes, and {size_bytes} by the manifest")
    except ImageError as error:
        raise ImageError(
            f"the index of the image: {error} (only --lazy needs it, and an image with layers)"
        ) from None
    return image, index


async def layer_index(storage: Storage, layer: Layer) -> Index:
    """The index of a layer of an image.

    Raises:
        ImageError: it is missing, damaged, cut, or that of another layer.
        StorageError: it cannot be read.
    """
    place = referred(storage, layer.at)
    name = f"{place.name}/{index_of(layer.name)}"
    async with place.open(index_of(layer.name)) as source:
        index = await read_layer_index(source, name)
    if index.end.digest != layer.digest:
        raise ImageError(f"{name}: this is not the layer that the image was made with")
    return index


@contextmanager
def needed(storage: Storage, layer: Layer) -> Iterator[None]:
    """Says of what goes wrong with a layer whose it is."""
    try:
        yield
    except ImageError as error:
        place = referred(storage, layer.at).name
        raise ImageError(f"{storage.name}: pages of it are in {place}/{layer.name}: {error}") from None


class Located:
    """An image or a layer: where its frames are, and what they are read from.

    Args:
        index: of it.
        source: itself.
        storage: where it is.

    Raises:
        ImageError: they do not belong together.
    """

    def __init__(self, index: Index, source: RangeSource, storage: Storage) -> None:
        self.index = index
        self.source = source
        self.storage = storage
        if source.size_bytes != index.image_bytes:
            raise ImageError(
                f"{source.name}: it has {source.size_bytes} bytes, and {index.image_bytes} by its index: it is "
                "truncated, or another image"
            )

    def places(self) -> dict[int, list[tuple[int, int, int]]]:
        """Where pages are, by space as it is called here: [start, end) and the number of the frame; ascending.

        Of pages that are there twice the last ones count, as for who reads it from its begin.
        """
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, frame in enumerate(self.index.frames):
            pages = frame.pages()
            found.setdefault(pages.space, []).extend((a, b, number) for a, b in _ranges_of(pages))
        for space, pieces in found.items():
            pieces.sort()
            if any(before[1] > behind[0] for before, behind in pairwise(pieces)):
                found[space] = _settled(pieces)
        return found


def _settled(pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    covered = RangeSet()
    own = []
    for a, b, number in sorted(pieces, key=lambda piece: piece[2], reverse=True):
        own += [(x, y, number) for x, y in subtract([(a, b)], covered.within(a, b))]
        covered.add(a, b)
    return sorted(own)


class Piece(NamedTuple):
    """What counts of a frame: `ranges`, ascending, of `space`."""

    located: Located
    frame: StoredFrame
    space: int
    ranges: list[Range]


class StoredPages:
    """The pages of a complete image.

    Args:
        image: its records.
        own: its own pages.
        layers: by `Layer` index.

    Raises:
        ImageError: there are pages that belong to nothing, or some are not in a layer in which they should be.
    """

    def __init__(self, image: Image, own: Located, layers: Mapping[int, Located]) -> None:
        self.image = image
        self.own = own
        self.layers = layers
        self.bytes_read = sum(one.index.index_bytes for one in (own, *layers.values()))
        self._pool = BufferPool(_BUFFERS, MAX_PAYLOAD_BYTES)
        self.pieces: list[Piece] = []
        #: by space: first addresses of its ranges, ascending, and in which piece each is
        self._places: dict[int, tuple[array[int], array[int]]] = {}
        self._ranges: dict[int, list[Range]] = {}
        found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        spaces = {*image.spaces, *image.shared_memory, *image.contents}
        for space, places in own.places().items():
            if space not in spaces:
                raise ImageError(f"{own.source.name}: pages of space {space} belong to nothing")
            found[space] += self._add(own, space, places)
        in_layers = {number: layer.places() for number, layer in layers.items()}
        for stored in image.stored.values():
            layer = layers[stored.layer]
            wanted = subtract(stored.runs, merged(sorted((a, b) for a, b, _ in found[stored.space])))
            places = _cut(in_layers[stored.layer].get(stored.number, []), wanted)
            if sum(b - a for a, b, _ in places) != total_bytes(wanted):
                raise ImageError(f"{layer.source.name}: pages of space {stored.space} are missing")
            found[stored.space] += self._add(layer, stored.space, places)
        for space, pieces in found.items():
            pieces.sort()
            self._places[space] = array("Q", (a for a, _, _ in pieces)), array("Q", (n for _, _, n in pieces))
            self._ranges[space] = merged((a, b) for a, b, _ in pieces)

    def _add(
        self, located: Located, space: int, places: Sequence[tuple[int, int, int]]
    ) -> list[tuple[int, int, int]]:
        """Make pieces of frames; what is where, with the numbers of pieces instead of those of frames."""
        ranges: dict[int, list[Range]] = defaultdict(list)
        for a, b, frame in places:
            ranges[frame].append((a, b))
        found = []
        for frame in sorted(ranges):
            found += [(a, b, len(self.pieces)) for a, b in ranges[frame]]
            self.pieces.append(Piece(located, located.index.frames[frame], space, ranges[frame]))
        return found

    def ranges(self, space: int) -> list[Range]:
        """What there are pages of, zeros too, ascending."""
        return self._ranges.get(space, [])

    async def load(self, number: int, without: Sequence[Range] = ()) -> LeasedRun:
        """The pages of a piece; the caller releases the lease.

        Args:
            without: ranges that are not wanted, ascending.

        Raises:
            ImageError: they are damaged, or the image is another one now.
            StorageError: they cannot be read now.
        """
        located, frame, space, ranges = self.pieces[number]
        source = located.source
        lease = await self._pool.lease()
        try:
            payload = lease.view[: frame.head.payload_bytes]
            await source.read_at(frame.payload_at, payload)
            self.bytes_read += len(payload)
            where = f"{source.name}: pages at byte {frame.payload_at}"
            run = await unpacked(frame.head, frame.header, payload, where)
            run = replace(_only(run, subtract(ranges, without)), space=space)
        except BaseException:
            lease.release()
            raise
        return LeasedRun(run, lease)

    # -- what comes before ------------------------------------------------------------------------

    @property
    def at_once(self) -> int:
        """How many loads at once pay."""
        return max(one.storage.reads_at_once for one in (self.own, *self.layers.values()))

    def sooner(self, space: int, later: Sequence[Range] = ()) -> Iterator[Callable[[], Awaitable[LeasedRun]]]:
        """What loads every page of a space that does not come later, in the order of the image; see `load`.

        Args:
            later: ranges, ascending.
        """
        waiting = RangeSet(later)
        for number in sorted(set(self._places[space][1])) if space in self._places else ():
            ranges = self.pieces[number].ranges
            waits = _within(waiting, ranges)
            if subtract(ranges, waits):
                yield partial(self.load, number, waits)

    # -- what comes later -------------------------------------------------------------------------

    def later(self, later: Mapping[int, Sequence[Range]]) -> list[int]:
        """The numbers of the pieces in which there is something of what comes later.

        Args:
            later: ranges by space, ascending.
        """
        waiting = {space: RangeSet(ranges) for space, ranges in later.items()}
        return [
            number
            for number, piece in enumerate(self.pieces)
            if piece.space in waiting and intersect(piece.ranges, _within(waiting[piece.space], piece.ranges))
        ]

    def piece_of(self, space: int, address: int) -> int:
        """The number of the piece that the page at `address` is in, which is one of `ranges`."""
        starts, numbers = self._places[space]
        return numbers[bisect_right(starts, address) - 1]


def _cut(places: Sequence[tuple[int, int, int]], wanted: Sequence[Range]) -> list[tuple[int, int, int]]:
    """The part of places that is wanted; both ascend."""
    found = []
    at = 0
    for a, b, frame in places:
        while at < len(wanted) and wanted[at][1] <= a:
            at += 1
        for start, end in wanted[at:]:
            if start >= b:
                break
            found.append((max(a, start), min(b, end), frame))
    return found


def _ranges_of(pages: PagesHeader) -> list[Range]:
    """What a frame has pages of, zeros too, ascending."""
    return merged(sorted((start, start + size) for start, size in [*pages.segments, *pages.zeros]))


def _within(waiting: RangeSet, ranges: Sequence[Range]) -> list[Range]:
    """The part of `waiting` that is around `ranges`, which ascend."""
    return waiting.within(ranges[0][0], ranges[-1][1])


def _only(run: PageRun, ranges: Sequence[Range]) -> PageRun:
    """The part of a run that is in some ranges; its payload is moved together."""
    if not any(subtract([(start, start + length)], ranges) for start, length in [*run.segments, *run.zeros]):
        return run
    segments: list[tuple[int, int]] = []
    at = done = 0
    payload = run.payload if not run.payload.readonly else memoryview(bytearray(run.payload))
    for start, length in run.segments:
        for a, b in intersect([(start, start + length)], ranges):
            first = at + a - start
            payload[done : done + b - a] = payload[first : first + b - a]
            segments.append((a, b - a))
            done += b - a
        at += length
    zeros = [
        (a, b - a) for start, length in run.zeros for a, b in intersect([(start, start + length)], ranges)
    ]
    return PageRun(run.space, segments, payload[:done], zeros)
