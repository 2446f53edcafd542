"""Which pages an earlier image has, by their digests."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from pipeline.errors import ImageError
from pipeline.image.frames import PageRun
from pipeline.image.packing import Packer, page_digest
from pipeline.image.schema import Layer, Stored
from pipeline.resources.memory.missing import RangeSet
from pipeline.stages.lineage import Lineage, read_lineage
from pipeline.stages.stored_pages import Located, StoredPages
from pipeline.transport.framing import FrameWriter
from pipeline.transport.index import read_index, read_layer_index
from pipeline.transport.storage import open_storage
from tests.harness.made_images import PAGE, SPACE, Memory, made, run

PARENT, CHILD = open_storage("/images/parent"), open_storage("/images/child")
#: what the address space is called in the layer
THERE = 3
OLD = [os.urandom(PAGE) for _ in range(8)]


async def image_with(
    runs: Sequence[PageRun], layer: Sequence[PageRun] = (), digests: bool = True
) -> StoredPages:
    image, raw = await made(runs, digests=digests)
    records, index = await read_index(raw, "index")
    layers = {}
    if layer:
        written, of = Memory(name="layer"), Memory()
        writer = FrameWriter(written, Packer(digests=digests), of)
        for one in layer:
            await writer.pages(one)
        await writer.end(0, sum(len(one.payload) for one in layer))
        layers[0] = Located(await read_layer_index(of, "layer"), written, PARENT)
        records.layers[0] = Layer(index=0, name="pages", digest=writer.digest)
        runs_there = list(RangeSet((a, a + length) for one in layer for a, length in one.segments))
        records.stored[SPACE, 0] = Stored(space=SPACE, layer=0, number=THERE, runs=runs_there)
    return StoredPages(records, Located(index, image, PARENT), layers)


async def lineage_of(parent: StoredPages) -> Lineage:
    lineage = await read_lineage(parent, CHILD)
    lineage.begin(parent.image)
    return lineage


def asked(lineage: Lineage, start: int, pages: Sequence[bytes], space: int = SPACE) -> list[int]:
    """Which of these pages, that lie together, are in the parent."""
    return list(lineage.unchanged(space, [(start, len(pages) * PAGE)], [page_digest(page) for page in pages]))


async def test_pages_are_known_by_content_and_address():
    zero = bytes(PAGE)
    parent = await image_with(
        [run(0, OLD[0] + zero + OLD[2] + OLD[3]), run(1 << 20, OLD[4]), run(1 << 30, zero)]
    )
    lineage = await lineage_of(parent)
    assert asked(lineage, 0, [OLD[0], zero, OLD[2], OLD[3]]) == [0, 1, 2, 3]
    assert asked(lineage, 0, [OLD[0], OLD[1], zero, OLD[3], OLD[4]]) == [0, 3]
    assert asked(lineage, PAGE, [OLD[0], OLD[2]]) == [1]
    assert asked(lineage, 1 << 20, [OLD[4], OLD[4]]) == [0]
    assert asked(lineage, (1 << 20) - PAGE, [OLD[3], OLD[4]]) == [1]
    assert asked(lineage, 1 << 30, [zero]) == [0]
    assert asked(lineage, 1 << 40, OLD) == []
    assert asked(lineage, 0, OLD[:1], space=SPACE + 1) == []
    several = [(0, PAGE), (2 * PAGE, PAGE), (1 << 20, PAGE)]
    digests = [page_digest(OLD[0]), page_digest(OLD[5]), page_digest(OLD[4])]
    assert lineage.unchanged(SPACE, several, digests) == [0, 2]


async def test_the_last_answer_about_a_page_counts():
    lineage = await lineage_of(await image_with([run(0, b"".join(OLD))]))
    asked(lineage, 0, OLD)
    asked(lineage, 2 * PAGE, [os.urandom(PAGE)] * 2)
    asked(lineage, 3 * PAGE, [OLD[3]])
    ours, theirs = lineage.refer(SPACE, [(0, 4 * PAGE), (6 * PAGE, 7 * PAGE), (1 << 20, (1 << 20) + PAGE)])
    assert ours == [(2 * PAGE, 3 * PAGE), (1 << 20, (1 << 20) + PAGE)]
    runs = [(0, 2 * PAGE), (3 * PAGE, 4 * PAGE), (6 * PAGE, 7 * PAGE)]
    assert theirs == [Stored(space=SPACE, layer=1, number=SPACE, runs=runs)]
    assert [(layer.index, layer.at, layer.name) for layer in lineage.layers(theirs)] == [
        (1, "../parent", "image")
    ]
    assert lineage.refer(SPACE + 1, [(0, PAGE)]) == ([(0, PAGE)], [])


async def test_pages_of_a_layer_of_the_parent_are_referred_to_there():
    layer = [
        PageRun(THERE, [(1 << 20, 4 * PAGE)], memoryview(bytearray(b"".join(OLD[:4])))),
        PageRun(THERE, [(1 << 20, PAGE)], memoryview(bytearray(OLD[7]))),
    ]
    lineage = await lineage_of(await image_with([run(0, b"".join(OLD[4:6]))], layer))
    assert asked(lineage, 1 << 20, OLD[:4]) == [1, 2, 3]
    assert asked(lineage, 1 << 20, OLD[7:]) == [0]
    assert asked(lineage, 0, OLD[4:6]) == [0, 1]
    ours, theirs = lineage.refer(SPACE, [(0, PAGE), (1 << 20, (1 << 20) + 4 * PAGE)])
    assert ours == []
    assert sorted((one.layer, one.number, one.runs) for one in theirs) == [
        (1, SPACE, [(0, PAGE)]),
        (2, THERE, [(1 << 20, (1 << 20) + 4 * PAGE)]),
    ]
    assert [layer.name for layer in lineage.layers(theirs)] == ["image", "pages"]
    assert [layer.name for layer in lineage.layers(theirs[:1])] == ["image"]


async def test_pages_without_digests_are_read():
    zero = bytes(PAGE)
    layer = [
        PageRun(THERE, [(1 << 20, 4 * PAGE)], memoryview(bytearray(b"".join(OLD[:4])))),
        PageRun(THERE, [((1 << 20) + PAGE, PAGE)], memoryview(bytearray(OLD[7]))),
    ]
    parent = await image_with([run(0, OLD[0] + zero + OLD[2] + OLD[3])], layer, digests=False)
    lineage = await lineage_of(parent)
    assert parent.bytes_read > 8 * PAGE
    assert asked(lineage, 0, [OLD[0], zero, OLD[2], OLD[4]]) == [0, 1, 2]
    assert asked(lineage, 1 << 20, [OLD[0], OLD[7], OLD[2], OLD[4]]) == [0, 1, 2]
    _, theirs = lineage.refer(SPACE, [(0, 3 * PAGE), (1 << 20, (1 << 20) + 3 * PAGE)])
    assert sorted((one.layer, one.number, one.runs) for one in theirs) == [
        (1, SPACE, [(0, 3 * PAGE)]),
        (2, THERE, [(1 << 20, (1 << 20) + 3 * PAGE)]),
    ]


async def test_pages_that_have_digests_are_not_read():
    parent = await image_with([run(0, b"".join(OLD))], [run(1 << 20, OLD[0], THERE)])
    before = parent.bytes_read
    assert asked(await lineage_of(parent), 0, OLD) == list(range(8))
    assert parent.bytes_read == before


async def test_pages_without_digests_that_are_damaged_are_told():
    parent = await image_with([run(0, b"".join(OLD))], digests=False)
    image = parent.own.source
    assert isinstance(image, Memory)
    image.raw[parent.pieces[0].frame.payload_at] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        await read_lineage(parent, CHILD)
