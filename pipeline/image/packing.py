"""Payloads of PAGES frames: zero pages taken out, what is left compressed where that is wanted. Pure.

Pages may be told by digests, too, so that a later image need not hold those that are as they were. Content that
somebody chooses with care must not be able to pass for other content, which leaves cryptographic digests only: SHA-256,
cut to 128 bits.

A frame says with what its payload was compressed. The size that it unpacks to is the sum of its
segments, which is bounded like every payload *before* anything is allocated; what would
unpack to more, or to less, is refused. Neither codec is believed about sizes: LZ4 blocks carry none, and
that of a Zstandard frame is compared first, as is its window.

Sources: lz4 block format (LZ4_decompress_safe writes no more than it was given), RFC 8878.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

import msgspec

from pipeline.errors import ImageError
from pipeline.image import frames
from pipeline.image.choice import Chooser
from pipeline.image.frames import Codec, PageRun

Compression = Literal["none", "lz4", "zstd", "auto"]

PAGE_BYTES = 4096
_ZERO_PAGE = bytes(PAGE_BYTES)
_WORDS = PAGE_BYTES // 8
#: Zstandard's fastest level of the regular ones: 3 is half as fast for a few percent less
_ZSTD_LEVEL = 1
#: what saves less than a sixteenth is sent as it is
_WORTH = 15 / 16
_ZERO, _UNCHANGED = 1, 2
_ALIKE = re.compile(rb"\x00+|\x01+|\x02+")


def compress(codec: Codec, content: memoryview) -> bytes:
    """`content` compressed with `codec`; the interpreter is free for others meanwhile."""
    packed: bytes
    if codec == Codec.LZ4:
        import lz4.block

        packed = lz4.block.compress(content, store_size=False)
    else:
        import zstandard

        packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(content)
    return packed


def uncompress(codec: Codec, content: memoryview, size_bytes: int, where: str) -> memoryview:
    """What `content` unpacks to.

    Args:
        size_bytes: what it must unpack to, within bounds already.

    Raises:
        ImageError: it does not.
    """
    unpacked = b""
    if 0 < size_bytes <= frames.MAX_PAYLOAD_BYTES:
        try:
            unpacked = _LIBRARIES[codec](content, size_bytes)
        except (ValueError, MemoryError) as error:
            raise ImageError(f"{where}: the payload does not unpack: {error}") from None
    if len(unpacked) != size_bytes:
        raise ImageError(f"{where}: the payload does not unpack to the {size_bytes} bytes of its segments")
    return memoryview(unpacked)


def _lz4(content: memoryview, size_bytes: int) -> bytes:
    import lz4.block

    try:
        unpacked: bytes = lz4.block.decompress(content, uncompressed_size=size_bytes)
    except lz4.block.LZ4BlockError as error:
        raise ValueError(str(error)) from None
    return unpacked


def _zstd(content: memoryview, size_bytes: int) -> bytes:
    import zstandard

    try:
        says = zstandard.get_frame_parameters(content)
        if says.content_size != size_bytes or says.window_size > frames.MAX_PAYLOAD_BYTES or says.dict_id:
            raise ValueError(f"it says that it holds {says.content_size} bytes")
        reader = zstandard.ZstdDecompressor(max_window_size=frames.MAX_PAYLOAD_BYTES)
        return reader.decompress(content, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


_LIBRARIES = {Codec.LZ4: _lz4, Codec.ZSTD: _zstd}


def zero_pages(content: memoryview) -> list[int]:
    """Numbers of the pages of `content` that are zero, ascending.

    The first, a middle and the last word of every page are looked at for all pages at once; only
    what may be zero by them is looked at as a whole.
    """
    words = content.cast("Q")
    heads = words[::_WORDS].tolist()
    if 0 not in heads:
        return []
    middles, tails = words[_WORDS // 2 :: _WORDS].tolist(), words[_WORDS - 1 :: _WORDS].tolist()
    return [
        page
        for page, (head, middle, tail) in enumerate(zip(heads, middles, tails, strict=True))
        if not (head or middle or tail)
        and content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes() == _ZERO_PAGE
    ]


def page_digest(page: memoryview | bytes) -> bytes:
    """The digest by which a page is known again."""
    return sha256(page).digest()[: frames.DIGEST_BYTES]


#: of a page of zeros
ZERO_DIGEST = page_digest(_ZERO_PAGE)


def page_digests(content: memoryview, zeros: Iterable[int]) -> list[bytes]:
    """The digest of every page.

    Args:
        content: of the pages.
        zeros: numbers of those that are known to be zero.
    """
    known = dict.fromkeys(zeros, ZERO_DIGEST)
    return [
        known.get(page) or page_digest(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        for page in range(len(content) // PAGE_BYTES)
    ]


def sift(run: PageRun, zeros: Iterable[int], unchanged: Iterable[int] = ()) -> PageRun:
    """`run` with its zero pages told as ranges, and without those that are unchanged.

    Args:
        run: what is left of its payload moves together in it (in a copy, if it cannot be written).
        zeros, unchanged: numbers of pages of its payload.
    """
    flags = bytearray(len(run.payload) // PAGE_BYTES)
    for page in zeros:
        flags[page] = _ZERO
    for page in unchanged:
        flags[page] = _UNCHANGED
    if not any(flags):
        return run
    content = run.payload if not run.payload.readonly else memoryview(bytearray(run.payload))
    segments: list[tuple[int, int]] = []
    found: list[tuple[int, int]] = []
    page = kept = 0
    for start, length in run.segments:
        count = length // PAGE_BYTES
        for alike in _ALIKE.finditer(flags, page, page + count):
            first, size = alike.start(), (alike.end() - alike.start()) * PAGE_BYTES
            where = start + (first - page) * PAGE_BYTES
            if flags[first] == _ZERO:
                found.append((where, size))
            elif flags[first] != _UNCHANGED:
                segments.append((where, size))
                at = first * PAGE_BYTES
                if at != kept:
                    content[kept : kept + size] = content[at : at + size]
                kept += size
        page += count
    return PageRun(run.space, segments, content[:kept], found)


class PackedRun(msgspec.Struct, frozen=True):
    """A PAGES frame ready to be written; `payload` is what follows `head`.

    Args:
        page_bytes: of pages in the payload, unpacked.
        codec: what the payload is compressed with.
    """

    head: bytes
    payload: memoryview | bytes
    page_bytes: int
    codec: Codec


@dataclass
class Packer:
    """Makes frames of page runs, in whatever threads, several at once; what it chose is in its figures.

    Args:
        compression: what is wanted; with ``auto`` what pays is found out, and looked at again now and then.
        digests: whether frames tell the digests of their pages.
        unchanged: told of every run its space, its segments and the digests of its pages: the numbers of those that
            need not be written.
    """

    compression: Compression = "none"
    digests: bool = False
    unchanged: Callable[[int, Sequence[tuple[int, int]], Sequence[bytes]], Sequence[int]] | None = None
    page_bytes: int = 0
    zero_bytes: int = 0
    _before: int = 0
    _after: int = 0
    _by_codec: dict[Codec, int] = field(default_factory=lambda: dict.fromkeys(Codec, 0))
    _chooser: Chooser | None = None
    #: held around all that is counted and chosen, not around the work on bytes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.compression == "auto":
            self._chooser = Chooser(compress)

    def pack(self, run: PageRun) -> PackedRun:
        """The frame of `run`; without a head if there is nothing to write of it."""
        zeros = zero_pages(run.payload)
        digests: list[bytes] = []
        unchanged: Sequence[int] = ()
        if self.digests:
            digests = page_digests(run.payload, zeros)
            if self.unchanged is not None:
                with self._lock:
                    unchanged = self.unchanged(run.space, run.segments, digests)
            gone = {*zeros, *unchanged}
            digests = [digest for page, digest in enumerate(digests) if page not in gone]
        run = sift(run, zeros, unchanged)
        if not run.segments and not run.zeros:
            return PackedRun(b"", b"", 0, Codec.NONE)
        codec, payload = self._compressed(run.payload)
        with self._lock:
            self.zero_bytes += sum(length for _, length in run.zeros)
            self.page_bytes += len(run.payload)
            self._by_codec[codec] += len(run.payload)
        head = frames.encode_pages(run, codec, payload, b"".join(digests))
        return PackedRun(head, payload, len(run.payload), codec)

    def _compressed(self, payload: memoryview) -> tuple[Codec, memoryview | bytes]:
        codec = self._chosen_for(payload)
        if codec == Codec.NONE or not payload:
            return Codec.NONE, payload
        begin = time.perf_counter()
        packed = compress(codec, payload)
        seconds = time.perf_counter() - begin
        pays = len(packed) <= _WORTH * len(payload)
        with self._lock:
            if self._chooser is not None:
                self._chooser.compressed(codec, len(payload), len(packed), seconds)
            self._before += len(payload)
            self._after += len(packed) if pays else len(payload)
        return (codec, packed) if pays else (Codec.NONE, payload)

    def _chosen_for(self, payload: memoryview) -> Codec:
        if self._chooser is None:
            return Codec[self.compression.upper()]
        with self._lock:
            return self._chooser.next(payload)

    def wrote(self, run: PackedRun, seconds: float) -> None:
        """`run` took so long on its way out."""
        if self._chooser is not None and run.codec == Codec.NONE:
            with self._lock:
                self._chooser.sent(len(run.payload), seconds)

    def chosen(self) -> str:
        """The codec that most of the pages were compressed with."""
        most = max(self._by_codec, key=lambda codec: (self._by_codec[codec], -codec))
        return most.name.lower()

    def figures(self) -> dict[str, float]:
        """By QMP's names: how many zero pages there were, and what compression made of what it was given."""
        found: dict[str, float] = {"duplicate": self.zero_bytes // PAGE_BYTES}
        if self._after:
            found["compression-rate"] = round(self._before / self._after, 3)
        return found
