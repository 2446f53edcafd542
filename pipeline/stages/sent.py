"""What was sent of memory while it changes, to send again only what is new of it.

Of private memory the kernel tells what was written, which may have the content again that it had (`LastSent`). What
is shared is read and compared (`Sent`), all of it, or what may have been written of it where that is known.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import xxhash

from pipeline.ids import LocalFd
from pipeline.kernel.pagemap import PAGE_BYTES, Range, intersect, merged, subtract, total_bytes, union
from pipeline.resources.memory.pages import Segment, compact, data_runs, read_segments, segments_of

#: Fills a buffer and says what is in it: segments, bytes. Runs in a worker thread.
Fill = Callable[[memoryview], tuple[Sequence[Segment], int]]


class LastSent:
    """Private pages as they were sent last: some that are written have the content then that they had before.

    A reference is counted up and down again; half of what a program writes all the time is of that kind. Copies are
    kept, since whoever can make two pages with the same digest could have one taken for the other.

    `compared`, `same`: how many pages were looked up that had been sent before, and how many of them were the same.
    """

    def __init__(self) -> None:
        #: by their addresses
        self._pages: dict[int, bytes] = {}
        self.compared = 0
        self.same = 0

    def __len__(self) -> int:
        """Their number."""
        return len(self._pages)

    def unknown_bytes(self, runs: Iterable[Range]) -> int:
        """How much of `runs` is not among them."""
        pages = (page for start, end in runs for page in range(start, end, PAGE_BYTES))
        return PAGE_BYTES * sum(page not in self._pages for page in pages)

    def forget(self, runs: Sequence[Range]) -> None:
        """The destination does not have these, or has others by now; they may be many more than are known."""
        known = [(page, page + PAGE_BYTES) for page in sorted(self._pages)] if runs else []
        for start, end in intersect(known, runs):
            for page in range(start, end, PAGE_BYTES):
                del self._pages[page]

    def clear(self) -> None:
        """Nothing is known any more of what was sent."""
        self._pages.clear()

    def news(
        self, wanted: Sequence[Segment], view: memoryview, *, is_last: bool = False
    ) -> tuple[Sequence[Segment], int]:
        """What of `wanted` is not as it was sent, and is from now on; in any thread.

        Args:
            view: its content, one behind the other; that of what is left is moved to the front, so many bytes.
            is_last: nobody asks again: no copies are made.
        """
        found: list[Range] = []
        kept: list[Range] = []
        at = known = 0
        for start, length in wanted:
            for page in range(start, start + length, PAGE_BYTES):
                before = self._pages.get(page)
                content = None if is_last and before is None else bytes(view[at : at + PAGE_BYTES])
                known += before is not None
                if content is None or content != before:
                    if content is not None and not is_last:
                        self._pages[page] = content
                    found.append((page, page + PAGE_BYTES))
                    kept.append((at, at + PAGE_BYTES))
                at += PAGE_BYTES
        same = at // PAGE_BYTES - len(found)
        self.compared += known
        self.same += same
        if not same:
            return wanted, at
        return segments_of(merged(found)), compact(view, merged(kept))


class _Chunk(NamedTuple):
    """What was sent of a chunk: where it had data, and the digests of that data, page by page."""

    runs: list[Range]
    digests: bytes


class Sent:
    """What was sent of an object, so that only pages that have changed are sent again.

    It is looked at chunk by chunk: a database writes pages of 8 KiB here and there.

    `bytes`: how many were sent so far.
    """

    CHUNK_BYTES = 1 << 20

    def __init__(self) -> None:
        self._chunks: dict[int, _Chunk] = {}
        #: nobody can know which pages have the same digests
        self._seed = secrets.randbits(64)
        self._of_zeros = self._digests(memoryview(bytes(PAGE_BYTES)))
        self.bytes = 0

    def chunks(self, runs: Sequence[Range], size_bytes: int) -> Iterator[tuple[int, list[Range]]]:
        """Every chunk that has data, or had when it was sent: its offset, and where it has data now; ascending."""
        size = self.CHUNK_BYTES
        firsts = {at for start, end in runs for at in range(start // size, -(-end // size))}
        for offset in sorted({at * size for at in firsts} | self._chunks.keys()):
            if offset < size_bytes:
                yield offset, intersect(runs, [(offset, offset + size)])

    def reading(
        self, offset: int, runs: list[Range], read: Callable[[Sequence[Segment], memoryview], int]
    ) -> Fill:
        """What reads of a chunk what was not sent as it is now; what is a hole by now is sent as zeros.

        Args:
            offset, runs: see `chunks`.
            read: reads segments into a buffer.
        """

        def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
            wanted = segments_of(runs)
            count = read(wanted, view) if wanted else 0
            now = _Chunk(runs, self._digests(view[:count]))
            before = self._chunks.get(offset, _NOT_SENT)
            if before == now:
                return [], 0
            if before.runs == runs and len(before.digests) == len(now.digests):
                wanted, count = _changed(wanted, view[:count], before.digests, now.digests)
            elif subtract(before.runs, runs):
                wanted = segments_of(union(before.runs, runs))
                count = read(wanted, view)
                # somebody may have written to it between the two
                now = _Chunk(runs, b"".join(self._digests(view[a:b]) for a, b in _places(wanted, runs)))
            self._chunks[offset] = now
            self.bytes += count
            return wanted, count

        return fill

    def written_pieces(self, written: Iterable[Range], size_bytes: int) -> Iterator[list[Segment]]:
        """Pages that may have been written, in pieces of at most this size; none has a chunk in common with another."""
        size = self.CHUNK_BYTES
        parts = (
            (at, (max(start, at), min(end, at + size)))
            for start, end in written
            for at in range(start - start % size, end, size)
        )
        piece: list[Segment] = []
        room = size_bytes
        for _, group in groupby(parts, key=itemgetter(0)):
            of_chunk = segments_of(part for _, part in group)
            length = sum(length for _, length in of_chunk)
            if length > room:
                yield piece
                piece, room = [], size_bytes
            piece += of_chunk
            room -= length
        if piece:
            yield piece

    def reading_written(
        self, wanted: Sequence[Segment], read: Callable[[Sequence[Segment], memoryview], int]
    ) -> Fill:
        """What reads of these pages, one of `written_pieces`, those that were not sent as they are now.

        A page that was none when its chunk was looked at is taken for zeros, as it is wherever it was not sent.
        """

        def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
            content = view[: read(wanted, view)]
            pages = [page for start, length in wanted for page in range(start, start + length, PAGE_BYTES)]
            known = b"".join(map(self._digest_of, pages))
            now = self._digests(content)
            if known == now:
                return [], 0
            for at, page in enumerate(pages):
                if known[8 * at : 8 * at + 8] != now[8 * at : 8 * at + 8]:
                    self._note(page, now[8 * at : 8 * at + 8])
            segments, count = _changed(wanted, content, known, now)
            self.bytes += count
            return segments, count

        return fill

    def _digest_of(self, page: int) -> bytes:
        chunk = self._chunks.get(page - page % self.CHUNK_BYTES, _NOT_SENT)
        at = _index(chunk.runs, page)
        return self._of_zeros if at is None else chunk.digests[8 * at : 8 * at + 8]

    def _note(self, page: int, digest: bytes) -> None:
        offset = page - page % self.CHUNK_BYTES
        runs, digests = self._chunks.get(offset, _NOT_SENT)
        at = _index(runs, page)
        if at is not None:
            self._chunks[offset] = _Chunk(runs, digests[: 8 * at] + digest + digests[8 * at + 8 :])
            return
        before = total_bytes(intersect(runs, [(offset, page)])) // PAGE_BYTES
        runs = union(runs, [(page, page + PAGE_BYTES)])
        self._chunks[offset] = _Chunk(runs, digests[: 8 * before] + digest + digests[8 * before :])

    def ranges(self, size_bytes: int) -> list[Range]:
        """The pages that had data when it was sent, as far as they are within a size."""
        end = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        return intersect(sorted(run for chunk in self._chunks.values() for run in chunk.runs), [(0, end)])

    def has_changed(self, fd: LocalFd, size_bytes: int) -> bool:
        """Whether a file is not what was sent of it."""
        view = memoryview(bytearray(self.CHUNK_BYTES))
        for offset, runs in self.chunks(data_runs(fd, size_bytes), size_bytes):
            count = read_segments(fd, segments_of(runs), view) if runs else 0
            if self._chunks.get(offset, _NOT_SENT) != _Chunk(runs, self._digests(view[:count])):
                return True
        return False

    def _digests(self, content: memoryview) -> bytes:
        return b"".join(
            xxhash.xxh3_64_digest(content[at : at + PAGE_BYTES], self._seed)
            for at in range(0, len(content), PAGE_BYTES)
        )


_NOT_SENT = _Chunk([], b"")


def _index(runs: Sequence[Range], page: int) -> int | None:
    """Which of the pages of `runs` this is; None: none of them."""
    before = 0
    for start, end in runs:
        if page < end:
            return (before + page - start) // PAGE_BYTES if page >= start else None
        before += end - start
    return None


def _changed(
    segments: Sequence[Segment], content: memoryview, before: bytes, now: bytes
) -> tuple[list[Segment], int]:
    """The pages of `segments` whose digests differ; their content is moved to the front of `content`, so many bytes."""
    parts = merged(
        (at // 8 * PAGE_BYTES, min((at // 8 + 1) * PAGE_BYTES, len(content)))
        for at in range(0, len(now), 8)
        if before[at : at + 8] != now[at : at + 8]
    )
    return list(_within(segments, parts)), compact(content, parts)


def _places(segments: Sequence[Segment], runs: Sequence[Range]) -> Iterator[Range]:
    """Where the content of `runs` is in that of `segments`, which lies one behind the other; all ascending."""
    at = 0
    for address, length in segments:
        for start, end in intersect([(address, address + length)], runs):
            yield at + start - address, at + end - address
        at += length


def _within(segments: Sequence[Segment], parts: Sequence[Range]) -> Iterator[Segment]:
    """What of `segments`, whose content lies one behind the other, has its content in `parts`; both ascending."""
    at = 0
    for address, length in segments:
        for start, end in intersect([(at, at + length)], parts):
            yield address + start - at, end - start
        at += length
