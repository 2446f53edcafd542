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
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgpack
import xxhash

from pipeline.errors import ImageError
from pipeline.image.codec import MAX_RECORD_BYTES, unpack

HEAD = struct.Struct("<4sB3sIIQQ")
MAGIC = b"PLFR"
_ZERO = bytes(3)
#: most bytes of pages in one frame
MAX_PAYLOAD_BYTES = 4 << 20
MAX_SEGMENTS = 1024
_PAGE_BYTES = 4096
_ADDRESS_END = 1 << 63
_SPACE_END = 1 << 24


class Kind(IntEnum):
    """What a frame holds."""

    RECORD = 1
    PAGES = 2
    MESSAGE = 3


@dataclass(frozen=True, slots=True)
class PageRun:
    """Pages of one space: segments of (address or offset, length) in bytes, and their bytes one after the other."""

    space: int
    segments: Sequence[tuple[int, int]]
    payload: memoryview


@dataclass(frozen=True, slots=True)
class FrameHead:
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


def encode_pages(run: PageRun) -> bytes:
    """Head and header of a PAGES frame; ``run.payload`` follows it."""
    packed: bytes = msgpack.packb([run.space, [list(segment) for segment in run.segments]])
    return encode(Kind.PAGES, packed, run.payload)


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


def decode_pages(header: bytes, payload: memoryview, where: str) -> PageRun:
    """A PAGES frame, whose checksums are right.

    Raises:
        ImageError: segments are not page aligned, out of order, or do not add up to the payload.
    """
    values = unpack(header)
    if not (
        isinstance(values, list)
        and len(values) == 2
        and isinstance(values[0], int)
        and 0 <= values[0] <= _SPACE_END
        and isinstance(values[1], list)
        and 0 < len(values[1]) <= MAX_SEGMENTS
    ):
        raise ImageError(f"{where}: this is no header of pages")
    space, pairs = values
    reached = total = 0
    segments = []
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
        ):
            raise ImageError(f"{where}: this is no header of pages")
        start, length = pair
        if start < reached or length <= 0 or (start | length) % _PAGE_BYTES or start + length > _ADDRESS_END:
            raise ImageError(f"{where}: segment {start:#x}+{length:#x} of space {space} is out of order")
        reached, total = start + length, total + length
        segments.append((start, length))
    if total != len(payload):
        raise ImageError(f"{where}: {total} bytes in segments, {len(payload)} bytes of payload")
    return PageRun(space, segments, payload)
