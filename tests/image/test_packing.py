"""Payloads: what is packed comes back, zero pages are left out, nothing hostile unpacks."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from hashlib import sha256

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError
from pipeline.image import frames
from pipeline.image.choice import Chooser
from pipeline.image.frames import (
    DIGEST_BYTES,
    HEAD,
    MAX_PAYLOAD_BYTES,
    Codec,
    PageRun,
    decode_head,
    decode_pages,
)
from pipeline.image.packing import PAGE_BYTES as PAGE
from pipeline.image.packing import Compression, PackedRun, Packer, compress, sift, uncompress, zero_pages

CODECS = pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD], ids=lambda codec: codec.name)


def page(kind: str) -> bytes:
    """``z`` a zero page, ``t`` nearly one, a digit: text, ``r``: random."""
    if kind == "z":
        return bytes(PAGE)
    if kind == "t":
        return bytes(1000) + b"x" + bytes(PAGE - 1001)
    if kind == "r":
        return random.Random(7).randbytes(PAGE)
    return (f"page {kind} ".encode() * PAGE)[:PAGE]


def run_of(kinds: str, gaps: list[int] | None = None, space: int = 3) -> PageRun:
    """Pages from address 0 on, with `gaps` pages before each of them."""
    segments: list[tuple[int, int]] = []
    reached = 0
    for index, _ in enumerate(kinds):
        reached += PAGE * (gaps[index] if gaps else 0)
        if segments and sum(segments[-1]) == reached:
            segments[-1] = (segments[-1][0], segments[-1][1] + PAGE)
        else:
            segments.append((reached, PAGE))
        reached += PAGE
    return PageRun(space, segments, memoryview(bytearray(b"".join(map(page, kinds)))))


def laid_out(run: PageRun) -> dict[int, bytes]:
    """Address -> page, of what `run` says."""
    found, at = {}, 0
    for start, length in run.segments:
        for address in range(start, start + length, PAGE):
            found[address] = bytes(run.payload[at : at + PAGE])
            at += PAGE
    assert at == len(run.payload)
    for start, length in run.zeros:
        for address in range(start, start + length, PAGE):
            assert address not in found
            found[address] = bytes(PAGE)
    return found


def read(packed: PackedRun) -> PageRun:
    """What the other side makes of a frame."""
    head = frames.decode_head(packed.head[: HEAD.size], "here")
    frames.check_sum(packed.payload, head.payload_sum, "here")
    assert head.payload_bytes == len(packed.payload)
    pages = frames.decode_pages(packed.head[HEAD.size :], len(packed.payload), "here")
    payload = memoryview(packed.payload)
    if pages.codec != Codec.NONE:
        payload = uncompress(pages.codec, payload, pages.page_bytes, "here")
    return PageRun(pages.space, pages.segments, payload, pages.zeros)


@given(
    st.lists(st.tuples(st.sampled_from("zzt1r"), st.sampled_from([0, 0, 0, 1, 5])), min_size=1, max_size=40),
    st.sampled_from(["none", "lz4", "zstd", "auto"]),
)
def test_pages_come_back_and_no_zero_page_is_sent(pages: list[tuple[str, int]], compression: Compression):
    kinds, gaps = "".join(kind for kind, _ in pages), [gap for _, gap in pages]
    before = laid_out(run_of(kinds, gaps))
    packer = Packer(compression)
    packed = packer.pack(run_of(kinds, gaps))
    after = read(packed)
    assert laid_out(after) == before
    assert sum(length for _, length in after.zeros) == PAGE * kinds.count("z") == packer.zero_bytes
    assert packed.page_bytes == len(after.payload) == PAGE * (len(kinds) - kinds.count("z"))
    assert packer.figures()["duplicate"] == kinds.count("z")


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_what_compresses_is_small_and_what_does_not_is_sent_as_it_is(compression: Compression):
    packer = Packer(compression)
    text = packer.pack(run_of("12345678" * 16))
    assert len(text.payload) < len(text.head) + text.page_bytes / 8
    noise = packer.pack(PageRun(1, [(0, 1 << 20)], memoryview(random.Random(1).randbytes(1 << 20))))
    assert (noise.codec, len(noise.payload)) == (Codec.NONE, 1 << 20)
    assert packer.chosen() == "none"  # most bytes
    assert packer.figures()["compression-rate"] > 1


def test_a_run_that_cannot_be_written_is_sifted_in_a_copy():
    run = run_of("1z2")
    sifted = sift(PageRun(run.space, run.segments, memoryview(bytes(run.payload))), zero_pages(run.payload))
    assert laid_out(sifted) == laid_out(run_of("1z2"))


# -- digests ----------------------------------------------------------------------------------


@CODECS
def test_pages_that_are_unchanged_are_left_out_and_the_others_told_by_digest(codec: Codec):
    run = run_of("1z2z3")
    contents = [bytes(run.payload[at : at + PAGE]) for at in range(0, len(run.payload), PAGE)]
    asked = []

    def unchanged(space: int, segments: Sequence[tuple[int, int]], digests: Sequence[bytes]) -> list[int]:
        asked.append((space, list(segments), list(digests)))
        return [2, 3]

    packer = Packer("lz4" if codec == Codec.LZ4 else "zstd", digests=True, unchanged=unchanged)
    segments = list(run.segments)
    packed = packer.pack(run)
    assert asked == [(run.space, segments, [sha256(one).digest()[:DIGEST_BYTES] for one in contents])]
    head = decode_head(packed.head[: HEAD.size], "here")
    pages = decode_pages(packed.head[HEAD.size :], len(packed.payload), "here")
    assert head.payload_bytes == len(packed.payload)
    kept = [0, 4]
    assert pages.digests == b"".join(sha256(contents[page]).digest()[:DIGEST_BYTES] for page in kept)
    payload = memoryview(packed.payload)
    if pages.codec != Codec.NONE:
        payload = uncompress(pages.codec, payload, pages.page_bytes, "here")
    assert bytes(payload) == b"".join(contents[page] for page in kept)
    places = [at for start, length in segments for at in range(start, start + length, PAGE)]
    assert [at for start, length in pages.segments for at in range(start, start + length, PAGE)] == [
        places[page] for page in kept
    ]
    assert pages.zeros == [(places[1], PAGE)]


def test_a_run_of_which_nothing_has_changed_is_no_frame():
    packer = Packer(digests=True, unchanged=lambda _space, _segments, digests: range(len(digests)))
    assert packer.pack(run_of("1z2")).head == b""


# -- hostile ----------------------------------------------------------------------------------


@CODECS
def test_a_bomb_allocates_no_more_than_its_segments(codec: Codec):
    bomb = memoryview(compress(codec, memoryview(bytes(64 << 20))))
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="here: the payload does not unpack"):
            uncompress(codec, bomb, PAGE, "here")
        with pytest.raises(ImageError):
            uncompress(codec, bomb, 64 << 20, "here")
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_PAYLOAD_BYTES
    finally:
        tracemalloc.stop()


def test_zstandard_frames_that_do_not_say_their_size_or_lie_are_refused():
    content = page("1") * 4
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(content)
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    ).compress(content)
    good = zstandard.ZstdCompressor().compress(content)
    for hostile in (silent, wide, good + b"more", good[:-1], good + good, b"", b"\x28\xb5\x2f\xfd"):
        with pytest.raises(ImageError):
            uncompress(Codec.ZSTD, memoryview(hostile), len(content), "here")
    assert uncompress(Codec.ZSTD, memoryview(good), len(content), "here") == content


def test_lz4_blocks_of_another_size_are_refused():
    good = lz4.block.compress(page("1") * 4, store_size=False)
    for size in (3 * PAGE, 5 * PAGE):
        with pytest.raises(ImageError):
            uncompress(Codec.LZ4, memoryview(good), size, "here")


@CODECS
@given(content=st.binary(max_size=300), size=st.sampled_from([0, PAGE, MAX_PAYLOAD_BYTES, 1 << 40]))
def test_any_bytes_unpack_to_the_size_or_are_refused(codec: Codec, content: bytes, size: int):
    try:
        unpacked = uncompress(codec, memoryview(content), size, "here")
    except ImageError:
        return
    assert len(unpacked) == size


@CODECS
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_changed_bit_unpacks_to_the_size_or_is_refused(codec: Codec, position: int, bit: int):
    packed = bytearray(compress(codec, run_of("123r").payload))
    packed[position % len(packed)] ^= 1 << bit
    try:
        unpacked = uncompress(codec, memoryview(packed), 4 * PAGE, "here")
    except ImageError:
        return
    assert len(unpacked) == 4 * PAGE


# -- what pays ------------------------------------------------------------------------------------


class Link:
    """A way out and codecs of known rates, in MB/s, without a clock that anybody waits for."""

    def __init__(self, link: float, codecs: dict[Codec, tuple[float, float]]) -> None:
        self.link, self.codecs, self.now = link, codecs, 0.0
        self.chooser = Chooser(self.compress, lambda: self.now)

    def compress(self, codec: Codec, content: memoryview) -> bytes:
        rate, ratio = self.codecs[codec]
        self.now += len(content) / rate / 1e6
        return bytes(int(len(content) / ratio))

    def send(self, buffers: int) -> list[Codec]:
        used = []
        buffer = memoryview(bytes(1 << 20))
        for _ in range(buffers):
            codec = self.chooser.next(buffer)
            used.append(codec)
            if codec == Codec.NONE:
                self.chooser.sent(len(buffer), len(buffer) / self.link / 1e6)
            else:
                begin = self.now
                out = len(self.compress(codec, buffer))
                self.chooser.compressed(codec, len(buffer), out, self.now - begin)
        return used


@pytest.mark.parametrize(
    ("link", "codecs", "expected"),
    [
        (2000, {Codec.LZ4: (600, 1.6), Codec.ZSTD: (400, 3)}, Codec.NONE),
        (300, {Codec.LZ4: (600, 1.6), Codec.ZSTD: (400, 1.2)}, Codec.LZ4),
        (12, {Codec.LZ4: (600, 1.6), Codec.ZSTD: (400, 3)}, Codec.ZSTD),
        (12, {Codec.LZ4: (16000, 1), Codec.ZSTD: (8000, 1)}, Codec.NONE),
    ],
    ids=["fast link", "lz4 pays", "slow link", "noise"],
)
def test_auto_takes_what_pays(link: float, codecs: dict[Codec, tuple[float, float]], expected: Codec):
    used = Link(link, codecs).send(200)
    assert used[:3] == [Codec.NONE] * 3
    assert used.count(expected) > 190


def test_auto_sees_that_the_link_or_the_content_changed():
    link = Link(12, {Codec.LZ4: (600, 1.6), Codec.ZSTD: (400, 3)})
    assert link.send(20)[-1] == Codec.ZSTD
    link.link = 3000
    assert link.send(400)[-1] == Codec.NONE
    link.link = 12
    assert link.send(20)[-1] == Codec.ZSTD
    link.codecs = {Codec.LZ4: (16000, 1), Codec.ZSTD: (8000, 1)}
    assert link.send(400)[-1] == Codec.NONE
