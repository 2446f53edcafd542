"""What an earlier image of the same tree has of each page, so that a dump need not store it again.

A page is known again by its digest (`pipeline.image.packing.page_digest`), whoever wrote it: nothing of the earlier
dump has to be left in the tree. The memory of a process is compared with that of the process that had the same pid,
address by address, and shared memory with what such a process had mapped at the same address; that this is the right
one is likely, and if it is not, nothing is found. Files without a name and System V segments are not compared.

An image may hold the digests of its pages (`dump --digests`). Pages of one that does not are read for them, wherever
they are: that takes no more memory, but time.

An image refers to pages where they are: to those that its parent has in layers, in these. However many generations
there are, each page is read once.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import trio

from pipeline.errors import ungrouped
from pipeline.image.codec import Image
from pipeline.image.frames import DIGEST_BYTES, PageRun
from pipeline.image.packing import PAGE_BYTES, ZERO_DIGEST, page_digests
from pipeline.image.schema import AddressSpace, Layer, Stored
from pipeline.kernel.pagemap import Range, intersect, merged, subtract
from pipeline.resources.memory.missing import RangeSet
from pipeline.stages.stored_pages import Located, Piece, StoredPages
from pipeline.transport.handover import worked
from pipeline.transport.storage import IMAGE, Storage, reference

#: no page has this digest, as far as anybody knows
_NONE = bytes(DIGEST_BYTES)
#: so many frames without digests are read at once
_READERS = min(4, len(os.sched_getaffinity(0)))


class _Known(NamedTuple):
    """Pages that lie together: their digests, one after the other, and where they are stored."""

    start: int
    end: int
    digests: bytes
    located: Located
    number: int


class _Space:
    """What the parent has of a space, ascending; and which pages are like that still."""

    def __init__(self, known: list[_Known]) -> None:
        self.known = known
        self._starts = [one.start for one in known]
        self.same = RangeSet()

    def digests(self, start: int, length: int) -> bytes:
        """The digests of the pages of a range, one after the other; `_NONE` for a page that is not known."""
        end = start + length
        found = bytearray()
        at = max(bisect_right(self._starts, start) - 1, 0)
        while start < end and at < len(self.known):
            one = self.known[at]
            at += 1
            first, last = max(start, one.start), min(end, one.end)
            if first < last:
                found += _NONE * ((first - start) // PAGE_BYTES)
                found += one.digests[_digests_of(first - one.start) : _digests_of(last - one.start)]
                start = last
            elif one.start >= end:
                break
        return bytes(found) + _NONE * ((end - start) // PAGE_BYTES)


class Lineage:
    """The pages of an image that another one may refer to; made by `read_lineage`.

    Args:
        parent: the image.
        storage: where the other one comes to be, whose layer 0 is its own.
        known: what is known of the parent's pages, by space.
    """

    def __init__(self, parent: StoredPages, storage: Storage, known: Mapping[int, Sequence[_Known]]) -> None:
        self._parent = parent
        self._known = known
        names = [
            (IMAGE, parent.own),
            *((parent.image.layers[n].name, one) for n, one in parent.layers.items()),
        ]
        #: of the other image
        self._layers = {
            located: Layer(
                index=index,
                at=reference(located.storage, storage),
                name=name,
                digest=located.index.end.digest,
            )
            for index, (name, located) in enumerate(names, 1)
        }
        self._spaces: dict[int, _Space] = {}

    def begin(self, image: Image) -> None:
        """Find the memories of a tree in the parent.

        Args:
            image: the draft of the tree.
        """
        theirs = self._parent.image
        for pid, process in image.processes.items():
            ancestor = theirs.processes.get(pid)
            if process.space is None or ancestor is None or ancestor.space is None:
                continue
            pairs = [(process.space, ancestor.space)]
            pairs += _shared(image.spaces[process.space], theirs.spaces[ancestor.space])
            for ours, other in pairs:
                if ours not in self._spaces:
                    self._spaces[ours] = _Space(sorted(self._known.get(other, ()), key=lambda one: one.start))

    def unchanged(
        self, space: int, segments: Sequence[tuple[int, int]], digests: Sequence[bytes]
    ) -> list[int]:
        """Which of these pages the parent has, by their place in `digests`; see `pipeline.image.packing.Packer`."""
        if (known := self._spaces.get(space)) is None:
            return []
        found: list[int] = []
        number = 0
        for start, length in segments:
            count = length // PAGE_BYTES
            theirs, ours = known.digests(start, length), digests[number : number + count]
            known.same.cut(start, start + length)
            if theirs == b"".join(ours):
                known.same.add(start, start + length)
                found += range(number, number + count)
            else:
                for page, digest in enumerate(ours):
                    if theirs[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES] == digest:
                        at = start + page * PAGE_BYTES
                        known.same.add(at, at + PAGE_BYTES)
                        found.append(number + page)
            number += count
        return found

    def refer(self, space: int, kept: Sequence[Range]) -> tuple[list[Range], list[Stored]]:
        """Divide what was stored of a space, and is still so, into what is in the dump's own layer and the parent's.

        Args:
            kept: pages, ascending.
        """
        if (known := self._spaces.get(space)) is None:
            return list(kept), []
        theirs = RangeSet(intersect(kept, list(known.same)))
        found: dict[tuple[Located, int], list[Range]] = defaultdict(list)
        for one in known.known:
            found[one.located, one.number] += theirs.within(one.start, one.end)
        return subtract(kept, list(theirs)), [
            Stored(space=space, layer=self._layers[located].index, number=number, runs=merged(sorted(runs)))
            for (located, number), runs in found.items()
            if runs
        ]

    def layers(self, stored: Iterable[Stored]) -> list[Layer]:
        """The records of the layers that are referred to."""
        wanted = {one.layer for one in stored}
        return [layer for layer in self._layers.values() if layer.index in wanted]


def _shared(ours: AddressSpace, theirs: AddressSpace) -> Iterator[tuple[int, int]]:
    """Shared memory that both have mapped at the same address, from the same place on: the space of each."""
    there = {(vma.start, vma.offset): vma.backing for vma in theirs.vmas if vma.kind == "shared"}
    for vma in ours.vmas:
        other = there.get((vma.start, vma.offset))
        if vma.kind == "shared" and vma.backing is not None and other is not None:
            yield vma.backing, other


def _digests_of(size_bytes: int) -> int:
    return size_bytes // PAGE_BYTES * DIGEST_BYTES


async def read_lineage(parent: StoredPages, storage: Storage) -> Lineage:
    """What `parent` has, for the image that comes to be in `storage`.

    Raises:
        ImageError, StorageError: pages of it have to be read, and cannot be.
    """
    known: dict[int, list[_Known]] = defaultdict(list)
    unknown = []
    for number, piece in enumerate(parent.pieces):
        known[piece.space] += _known(piece)
        pages = piece.frame.pages()
        if pages.segments and not pages.digests:
            unknown.append(number)
    left = iter(unknown)

    async def read_left() -> None:
        for number in left:
            found = await parent.load(number)
            try:
                pages = await worked(len(found.run.payload), _digested, found.run, parent.pieces[number])
            finally:
                found.lease.release()
            known[found.run.space] += pages

    with ungrouped():
        async with trio.open_nursery() as nursery:
            for _ in range(_READERS):
                nursery.start_soon(read_left)
    return Lineage(parent, storage, known)


def _digested(run: PageRun, piece: Piece) -> list[_Known]:
    """The same as `_known` of the pages of a piece that has no digests."""
    digests = b"".join(page_digests(run.payload, ()))
    number = piece.frame.pages().space
    found = []
    at = 0
    for start, length in run.segments:
        size = _digests_of(length)
        found.append(_Known(start, start + length, digests[at : at + size], piece.located, number))
        at += size
    return found


def _known(piece: Piece) -> Iterator[_Known]:
    """What a piece has, and what its image tells of it."""
    pages = piece.frame.pages()
    at = 0
    for start, length in pages.segments:
        if pages.digests:
            for a, b in intersect([(start, start + length)], piece.ranges):
                first = at + _digests_of(a - start)
                digests = pages.digests[first : first + _digests_of(b - a)]
                yield _Known(a, b, digests, piece.located, pages.space)
        at += _digests_of(length)
    for start, length in pages.zeros:
        for a, b in intersect([(start, start + length)], piece.ranges):
            yield _Known(a, b, ZERO_DIGEST * ((b - a) // PAGE_BYTES), piece.located, pages.space)
