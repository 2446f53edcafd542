"""The index of an image: it says what is there, and nothing in it is believed that its end does not vouch for."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import pairwise

import pytest

from pipeline.errors import ImageError
from pipeline.image.frames import HEAD, PageRun
from pipeline.image.packing import Compression
from pipeline.image.schema import Content
from pipeline.transport.framing import FrameWriter, unpacked
from pipeline.transport.index import HeadsOf, read_index
from tests.harness.made_images import PAGE, SPACE, Memory, content, made, run

RUNS = [
    run(0, os.urandom(PAGE)),
    PageRun(
        SPACE, [(at, PAGE) for at in range(1 << 20, 1 << 21, 2 * PAGE)], memoryview(os.urandom(128 * PAGE))
    ),
    run(1 << 30, b"alike" + bytes(PAGE - 5) + bytes(2 * PAGE)),
    run(1 << 31, bytes(PAGE)),
    run(1 << 32, os.urandom(300 * PAGE)),
]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
async def test_it_says_where_each_page_is(compression: Compression):
    image, raw = await made(RUNS, compression)
    records, index = await read_index(raw, "index")
    assert (index.image_bytes, index.index_bytes) == (len(image.raw), len(raw.raw))
    assert list(records.processes) == [10, 11]
    assert len(index.frames) == len(RUNS)
    for frame, wanted in zip(index.frames, RUNS, strict=True):
        payload = bytearray(frame.head.payload_bytes)
        await image.read_at(frame.payload_at, memoryview(payload))
        found = await unpacked(frame.head, frame.header, memoryview(payload), "here")
        assert content(found) == content(wanted)


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_an_image_is_its_own_index(compression: Compression):
    """Taken from the image itself it is what would have been written."""
    image, raw = await made(RUNS, compression)
    heads, taken, view = HeadsOf(image), bytearray(), memoryview(bytearray(1000))
    while size := await heads.read_into(view):
        taken += view[:size]
    assert taken == raw.raw


async def test_it_is_small():
    """A frame costs its head and some bytes, whatever is in it; a further run of pages in it some more."""
    none, one, runs = [len((await made(RUNS[:count]))[1].raw) for count in (0, 1, 2)]
    assert one - none < 64
    assert runs - one < 64 + 128 * 10


async def test_a_cut_at_any_byte_is_seen():
    image, raw = await made(RUNS)
    for cut in [*range(0, len(raw.raw), 61), len(raw.raw) - 1]:
        with pytest.raises(ImageError):
            await read_index(Memory(raw.raw[:cut]), "index")
    for cut in [*range(0, len(image.raw), 40_001), len(image.raw) - 1]:
        with pytest.raises(ImageError):
            await read_index(HeadsOf(Memory(image.raw[:cut])), "image")


async def test_a_change_of_any_byte_is_seen():
    _, raw = await made(RUNS)
    for at in range(0, len(raw.raw), 7):
        changed = bytearray(raw.raw)
        changed[at] ^= 0x10
        with pytest.raises(ImageError):
            await read_index(Memory(changed), "index")


async def test_frames_that_are_missing_double_or_out_of_order_are_seen():
    _, raw = await made(RUNS)
    ends = [0]
    while ends[-1] < len(raw.raw):
        header_bytes = HEAD.unpack_from(raw.raw, ends[-1])[3]
        ends.append(ends[-1] + HEAD.size + header_bytes)
    pieces = [raw.raw[a:b] for a, b in pairwise(ends)]
    for number in range(len(pieces) - 1):
        for wrong in (
            [*pieces[:number], *pieces[number + 1 :]],
            [*pieces[: number + 1], *pieces[number:]],
            [*pieces[:number], pieces[number + 1], pieces[number], *pieces[number + 2 :]],
        ):
            with pytest.raises(ImageError):
                await read_index(Memory(b"".join(wrong)), "index")


@pytest.mark.parametrize("what", ["message", "record behind pages", "too few pages"])
async def test_what_does_not_belong_there_is_refused(what: str):
    """Even where the digest is right."""
    _, raw = await made([])
    index = Memory()
    writer = FrameWriter(Memory(), index=index)
    source = Memory(raw.raw)
    records = (await read_index(source, "index"))[0].records()
    for record in records:
        await writer.record(record)
    await writer.pages(RUNS[0])
    match what:
        case "message":
            await writer.message(b"\x01")
        case "record behind pages":
            await writer.record(Content(space=90, size_bytes=PAGE))
    await writer.end(0, 0 if what == "too few pages" else PAGE)
    with pytest.raises(ImageError, match=r"message|record stands|otherwise"):
        await read_index(Memory(index.raw), "index")


async def test_bytes_of_anything_are_refused():
    for _ in range(200):
        with suppress(ImageError):
            await read_index(Memory(os.urandom(200)), "index")
            pytest.fail("taken for an index")
