"""Frames: what is written is read again, and nothing else is."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError
from pipeline.image import frames
from pipeline.image.codec import MAX_RECORD_BYTES
from pipeline.image.frames import (
    DIGEST_BYTES,
    HEAD,
    MAGIC,
    MAX_PAYLOAD_BYTES,
    MAX_SEGMENTS,
    Codec,
    Kind,
    PageRun,
)

PAGE = 4096


def packed(space: object, segments: object) -> bytes:
    return msgpack.packb([space, segments])


@given(st.sampled_from(Kind), st.binary(max_size=200))
def test_a_head_comes_back_as_it_was(kind: Kind, header: bytes):
    raw = frames.encode(kind, header)
    head = frames.decode_head(raw[: HEAD.size], "here")
    assert (head.kind, head.header_bytes, head.payload_bytes) == (kind, len(header), 0)
    frames.check_sum(raw[HEAD.size :], head.header_sum, "here")


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=20),
    st.integers(0, 1 << 24),
)
def test_page_runs_come_back_as_they_were(gaps: list[tuple[int, int]], space: int):
    segments, reached = [], 0
    for gap, pages in gaps:
        segments.append((reached + gap * PAGE, pages * PAGE))
        reached = sum(segments[-1])
    payload = memoryview(bytes(sum(length for _, length in segments)))
    raw = frames.encode_pages(PageRun(space, segments, payload))
    head = frames.decode_head(raw[: HEAD.size], "here")
    assert head.payload_bytes == len(payload)
    pages = frames.decode_pages(raw[HEAD.size :], len(payload), "here")
    assert (pages.space, pages.segments, pages.zeros) == (space, segments, [])
    assert (pages.codec, pages.page_bytes) == (Codec.NONE, len(payload))


@pytest.mark.parametrize(
    "raw",
    [
        HEAD.pack(b"ELF!", 1, bytes(3), 0, 0, 0, 0),
        HEAD.pack(MAGIC, 9, bytes(3), 0, 0, 0, 0),
        HEAD.pack(MAGIC, 1, b"\0\1\0", 0, 0, 0, 0),
        HEAD.pack(MAGIC, 1, bytes(3), MAX_RECORD_BYTES + 1, 0, 0, 0),
        HEAD.pack(MAGIC, 2, bytes(3), 0, MAX_PAYLOAD_BYTES + 1, 0, 0),
        HEAD.pack(MAGIC, 1, bytes(3), 0, 1, 0, 0),
        HEAD.pack(MAGIC, 3, bytes(3), 0, 1, 0, 0),
    ],
    ids=["magic", "kind", "reserved", "long header", "long payload", "record payload", "message payload"],
)
def test_a_wrong_head_is_refused_and_placed(raw: bytes):
    with pytest.raises(ImageError, match="frame 7 at byte 99"):
        frames.decode_head(raw, "frame 7 at byte 99")


def test_a_changed_byte_does_not_have_the_checksum():
    raw = frames.encode(Kind.RECORD, b"abc")
    head = frames.decode_head(raw[: HEAD.size], "here")
    with pytest.raises(ImageError, match=r"here: .*damaged"):
        frames.check_sum(b"abd", head.header_sum, "here")


@pytest.mark.parametrize(
    ("space", "segments", "size"),
    [
        (1, [], 0),
        (-1, [[0, PAGE]], PAGE),
        (1 << 25, [[0, PAGE]], PAGE),
        ("1", [[0, PAGE]], PAGE),
        (1, [[1, PAGE]], PAGE),
        (1, [[0, 100]], 100),
        (1, [[0, 0]], 0),
        (1, [[0, -PAGE]], 0),
        (1, [[PAGE, PAGE], [0, PAGE]], 2 * PAGE),
        (1, [[0, 2 * PAGE], [PAGE, PAGE]], 3 * PAGE),
        (1, [[(1 << 64) - PAGE, PAGE]], PAGE),
        (1, [[0, PAGE]], 2 * PAGE),
        (1, [[0, PAGE, 0]], PAGE),
        (1, [[0, PAGE]] * (MAX_SEGMENTS + 1), PAGE),
        (1, {"a": 1}, PAGE),
    ],
)
def test_wrong_segments_are_refused(space: object, segments: object, size: int):
    with pytest.raises(ImageError):
        frames.decode_pages(packed(space, segments), size, "here")


@given(st.binary(max_size=100))
def test_any_bytes_as_a_page_header_are_taken_or_refused(header: bytes):
    try:
        run = frames.decode_pages(header, 0, "here")
    except ImageError:
        return
    assert run.segments or run.zeros


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ([1, [[0, PAGE]], 3, []], 10),
        ([1, [[0, PAGE]], -1, []], 10),
        ([1, [[0, PAGE]], "lz4", []], 10),
        ([1, [[0, PAGE]], 1], 10),
        ([1, [[0, PAGE]], 1, [], 0], 10),
        ([1, [[0, PAGE]], 1, [], b"short"], 10),
        ([1, [[0, PAGE]], 1, [], bytes(2 * DIGEST_BYTES)], 10),
        ([1, [[0, PAGE]], 1, [], bytes(DIGEST_BYTES), 0], 10),
        ([1, [[0, PAGE]], 1, None], 10),
        ([1, [[0, PAGE]], 1, [[PAGE, 1]]], 10),
        ([1, [[0, PAGE]], 1, []], 0),
        ([1, [], 1, [[0, PAGE]]], 10),
        ([1, [], 0, [[0, PAGE]]], PAGE),
        ([1, [], 0, []], 0),
        ([1, [[0, MAX_PAYLOAD_BYTES + PAGE]], 1, []], 10),
        ([1, [[0, 1 << 50]], 2, []], 10),
        ([1, [[0, MAX_PAYLOAD_BYTES], [MAX_PAYLOAD_BYTES, PAGE]], 2, []], 10),
        ([1, [], 0, [[0, 1 << 50]]], 0),
    ],
)
def test_headers_that_promise_too_much_or_nonsense_are_refused(header: object, size: int):
    with pytest.raises(ImageError):
        frames.decode_pages(msgpack.packb(header), size, "here")
