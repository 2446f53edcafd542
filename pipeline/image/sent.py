"""What the other side has of each page: pages that went back to the same content are not sent again. Pure.

Eight bytes a page: an xxh3_64 with a seed of its own for each migration, so that nobody who decides
what a program has in its memory can make two pages that look alike. Two different pages in one place are
taken for the same once in 2^64.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence

import xxhash

_PAGE_BYTES = 4096
_CHUNK_PAGES = 512
_CHUNK_BYTES = _CHUNK_PAGES * _PAGE_BYTES


class SentPages:
    """Hashes of the pages that were sent, by space and address.

    Whoever knows that the other side lost or changed a page otherwise (it was unmapped, mapped anew,
    discarded, moved) calls `forget`; a page is then sent whatever it holds.

    Args:
        max_pages: how many are remembered, in steps of 512; what is beyond is always sent.
    """

    def __init__(self, max_pages: int = 64 << 20) -> None:
        self._seed = secrets.randbits(64)
        #: (space, number of 2 MiB) -> hash of each page of it; 0 where it is not known
        self._chunks: dict[tuple[int, int], array[int]] = {}
        self._free = -(-max_pages // _CHUNK_PAGES)

    def again(self, space: int, segments: Sequence[tuple[int, int]], payload: memoryview) -> list[int]:
        """Numbers of the pages of `payload` that the other side has; the others count as sent from now on.

        Args:
            segments: [start, length] in bytes of what is in `payload`, one after the other.
        """
        digest, seed = xxhash.xxh3_64_intdigest, self._seed
        size = len(payload)
        hashes = array(
            "Q", [digest(payload[at : at + _PAGE_BYTES], seed) for at in range(0, size, _PAGE_BYTES)]
        )
        found: list[int] = []
        done = 0
        for start, length in segments:
            reached, end = start, start + length
            while reached < end:
                chunk, inside = divmod(reached, _CHUNK_BYTES)
                count = (min(end, (chunk + 1) * _CHUNK_BYTES) - reached) // _PAGE_BYTES
                self._compare(space, chunk, inside // _PAGE_BYTES, hashes, done, count, found)
                done += count
                reached += count * _PAGE_BYTES
        return found

    def _compare(
        self, space: int, chunk: int, at: int, hashes: array[int], done: int, count: int, found: list[int]
    ) -> None:
        known = self._chunks.get((space, chunk))
        now = hashes[done : done + count]
        if known is None:
            if not self._free:
                return
            self._free -= 1
            known = self._chunks[space, chunk] = array("Q", bytes(8 * _CHUNK_PAGES))
        before = known[at : at + count]
        if before == now:
            found += range(done, done + count)
        else:
            found += [done + i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a == b and b]
        known[at : at + count] = now

    def forget(self, space: int, start: int, end: int) -> None:
        """The other side does not have [start, end) of `space` any more."""
        chunks = range(start // _CHUNK_BYTES, -(-end // _CHUNK_BYTES))
        some = (
            chunks
            if len(chunks) < len(self._chunks)
            else [n for s, n in self._chunks if s == space and n in chunks]
        )
        for chunk in some:
            known = self._chunks.get((space, chunk))
            if known is not None:
                begin = chunk * _CHUNK_BYTES
                first = max(0, start - begin) // _PAGE_BYTES
                last = -(-min(_CHUNK_BYTES, end - begin) // _PAGE_BYTES)
                known[first:last] = array("Q", bytes(8 * (last - first)))

    def forget_space(self, space: int) -> None:
        """The other side has nothing of `space` any more."""
        for key in [key for key in self._chunks if key[0] == space]:
            del self._chunks[key]
            self._free += 1
