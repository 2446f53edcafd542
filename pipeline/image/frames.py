"""Frames: how records, pages and messages stand one after the other in a stream. Pure.

A frame is a fixed head, a msgpack header and a raw payload::

    offset  size  what
    0       4     magic "PLFR"
    4       1     kind (see `Kind`)
    5       3     zero
    8       4     header length in bytes
    12      4     payload length in bytes
    16      8     xxh3_64 of the header
    24      8     xxh3_64 of the payload

All numbers are little-endian. Only PAGES have a payload; it can be received straight
into a buffer of the caller's. Every length is checked against a cap before anything
is allocated, every checksum before anything is used.

The checksum of a payload is that of the bytes that follow, compressed or not: damage is seen
before a decompressor sees it, the checksums of a stream can be verified without unpacking it, and
fewer bytes are summed. What a payload unpacks to is the sum of its segments, within the same cap.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgpack
import msgspec
import xxhash

from pipeline.errors import ImageError
from pipeline.image.codec import MAX_RECORD_BYTES, unpack

HEAD = struct.Struct("<4sB3sIIQQ")
MAGIC = b"PLFR"
_ZERO = bytes(3)
#: most bytes of pages in one frame
MAX_PAYLOAD_BYTES = 4 << 20
MAX_SEGMENTS = 1024
#: of the digest of a page
DIGEST_BYTES = 16
_PAGE_BYTES = 4096
_ADDRESS_END = 1 << 63
_SPACE_END = 1 << 24


class Kind(IntEnum):
    """What a frame holds."""

    RECORD = 1
    PAGES = 2
    MESSAGE = 3


class Codec(IntEnum):
    """What the payload of a PAGES frame is compressed with: nothing, an LZ4 block, one Zstandard frame."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


class PageRun(msgspec.Struct, frozen=True):
    """Pages of one space: segments of (address or offset, length) in bytes, and their bytes one after the other.

    `zeros`: ranges of the space that are zero, whatever is there now; nothing of them is in the payload.
    """

    space: int
    segments: Sequence[tuple[int, int]]
    payload: memoryview
    zeros: Sequence[tuple[int, int]] = ()


class FrameHead(msgspec.Struct, frozen=True):
    """A parsed head: what follows it, and what it must add up to."""

    kind: Kind
    header_bytes: int
    payload_bytes: int
    header_sum: int
    payload_sum: int


def encode(kind: Kind, header: bytes, payload: memoryview | bytes = b"") -> bytes:
    """Head and header of a frame; the payload follows it unchanged (it is not copied here)."""
    sums = xxhash.xxh3_64_intdigest(header), xxhash.xxh3_64_intdigest(payload)
    return HEAD.pack(MAGIC, kind, _ZERO, len(header), len(payload), *sums) + header


def encode_pages(
    run: PageRun,
    codec: Codec = Codec.NONE,
    packed: memoryview | bytes | None = None,
    digests: bytes = b"",
) -> bytes:
    """Head and header of a PAGES frame; ``run.payload`` follows it, or what it was `packed` into with `codec`.

    `digests`: see `PagesHeader`.
    """
    header: list[object] = [run.space, run.segments]
    if run.zeros or codec != Codec.NONE or digests:
        header += [int(codec), run.zeros]
    if digests:
        header.append(digests)
    return encode(Kind.PAGES, msgpack.packb(header), run.payload if packed is None else packed)


def decode_head(raw: bytes | memoryview, where: str) -> FrameHead:
    """Parse the fixed head.

    Raises:
        ImageError: wrong magic, unknown kind, or a length over its cap; `where` says which frame.
    """
    magic, kind, zero, header_bytes, payload_bytes, header_sum, payload_sum = HEAD.unpack(raw)
    if magic != MAGIC or zero != _ZERO:
        raise ImageError(f"{where}: this is no frame (damaged, or not an image of ours)")
    if kind not in Kind.__members__.values():
        raise ImageError(f"{where}: frame kind {kind} is not known")
    if header_bytes > MAX_RECORD_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ImageError(f"{where}: lengths {header_bytes} and {payload_bytes} are out of bounds")
    if payload_bytes and kind != Kind.PAGES:
        raise ImageError(f"{where}: a payload where none belongs")
    if not payload_bytes:
        check_sum(b"", payload_sum, where)
    return FrameHead(Kind(kind), header_bytes, payload_bytes, header_sum, payload_sum)


def check_sum(content: bytes | memoryview, expected: int, where: str) -> None:
    """Raise ImageError if `content` does not have the checksum it was sent with."""
    if xxhash.xxh3_64_intdigest(content) != expected:
        raise ImageError(f"{where}: the checksum does not fit: the data is damaged")


class PagesHeader(msgspec.Struct, frozen=True):
    """The header of a PAGES frame: see `PageRun`; `page_bytes` is what the payload holds when it is unpacked.

    `digests`: `DIGEST_BYTES` of the SHA-256 of each page of the payload, one after the other; or nothing.
    """

    space: int
    segments: Sequence[tuple[int, int]]
    zeros: Sequence[tuple[int, int]]
    codec: Codec
    page_bytes: int
    digests: bytes = b""


def decode_pages(header: bytes, payload_bytes: int, where: str) -> PagesHeader:
    """The header of a PAGES frame, whose checksum is right.

    Raises:
        ImageError: ranges are not page aligned, out of order, too large, or do not add up to the payload.
    """
    values = unpack(header)
    if not isinstance(values, list) or len(values) not in {2, 4, 5}:
        raise ImageError(f"{where}: this is no header of pages")
    absent: list[Any] = [0, [], b""]
    space, pairs, number, zero_pairs, digests = values + absent[len(values) - 2 :]
    if not (
        isinstance(space, int)
        and 0 <= space <= _SPACE_END
        and isinstance(number, int)
        and number in Codec.__members__.values()
    ):
        raise ImageError(f"{where}: this is no header of pages, or is compressed with a codec unknown here")
    codec = Codec(number)
    segments, total = _ranges(pairs, space, where)
    zeros, _ = _ranges(zero_pairs, space, where)
    if not segments and not zeros:
        raise ImageError(f"{where}: this is no header of pages")
    if codec == Codec.NONE and total != payload_bytes:
        raise ImageError(f"{where}: {total} bytes in segments, {payload_bytes} bytes of payload")
    if codec != Codec.NONE and not (total and payload_bytes):
        raise ImageError(f"{where}: a compressed payload of nothing")
    wanted = {0, total // _PAGE_BYTES * DIGEST_BYTES}
    if not isinstance(digests, bytes) or len(digests) not in wanted:
        raise ImageError(f"{where}: there is not one digest for each page")
    return PagesHeader(space, segments, zeros, codec, total, digests)


def _ranges(pairs: object, space: int, where: str) -> tuple[list[tuple[int, int]], int]:
    """Ascending ranges within the caps, and how many bytes they are."""
    if not isinstance(pairs, list) or len(pairs) > MAX_SEGMENTS:
        raise ImageError(f"{where}: this is no header of pages")
    reached = total = 0
    found = []
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
        ):
            raise ImageError(f"{where}: this is no header of pages")
        start, length = pair
        if start < reached or length <= 0 or (start | length) % _PAGE_BYTES or start + length > _ADDRESS_END:
            raise ImageError(f"{where}: segment {start:#x}+{length:#x} of space {space} is out of order")
        reached, total = start + length, total + length
        found.append((start, length))
    if total > MAX_PAYLOAD_BYTES:
        raise ImageError(f"{where}: {total} bytes in segments of space {space} are out of bounds")
    return found, total
