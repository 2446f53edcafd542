"""Pages of an image in any order: which come first, which count, and what becomes of them when they cannot be read."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pipeline.errors import ImageError, StorageError
from pipeline.image.frames import PageRun
from pipeline.image.schema import Layer, Stored
from pipeline.kernel.pagemap import Range
from pipeline.ledger import LEDGER
from pipeline.progress import NullProgress
from pipeline.resources.memory.missing import RangeSet
from pipeline.stages.bringing import Bringing
from pipeline.stages.pager import Wanted
from pipeline.stages.stored_pages import Located, StoredPages
from pipeline.transport.framing import FrameWriter
from pipeline.transport.index import Index, read_index, read_layer_index
from pipeline.transport.storage import open_storage
from tests.harness.made_images import PAGE, SPACE, Memory, content, made, run

NOWHERE = open_storage("nowhere")


class Store(Memory):
    """An image that is read slowly, and not at all while `error` is set; `reads` says where, in their order."""

    def __init__(self, raw: bytes, seconds: float = 1.0) -> None:
        super().__init__(raw, "store")
        self.error: Exception | None = None
        self.seconds = seconds
        self.reads: list[int] = []
        self.under_way = self.most = 0

    async def read_at(self, offset: int, view: memoryview) -> None:
        self.reads.append(offset)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error
        await super().read_at(offset, view)


class Tree:
    """Stands for the pager: a memory that has no pages yet, of which a test wants some."""

    def __init__(self, missing: Sequence[Range]) -> None:
        self.missing = RangeSet(missing)
        self.memory: dict[int, bytes] = {}
        self.whole = trio.Event()
        self.bytes_done = 0
        self._wants, self._wanted = trio.open_memory_channel[Wanted](math.inf)

    def touch(self, address: int) -> None:
        self._wants.send_nowait(Wanted(SPACE, address))

    async def wanted(self) -> AsyncIterator[Wanted]:
        async for one in self._wanted:
            yield one

    async def bring(self, run: PageRun) -> None:
        at = 0
        for start, length in run.segments:
            for page in range(start, start + length, PAGE):
                if self.missing.cut(page, page + PAGE):
                    self.memory[page] = bytes(run.payload[at : at + PAGE])
                at += PAGE
        self.bytes_done += at
        if not self.missing:
            self.whole.set()


class Told(NullProgress):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.messages: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)


class Scene(NamedTuple):
    store: Store
    index: Index
    stored: StoredPages
    content: dict[int, bytes]
    tree: Tree
    told: Told

    async def bring(self) -> None:
        later = {SPACE: list(self.tree.missing)}
        held = LEDGER.held()
        await Bringing(self.stored, self.tree, later, self.told, self.told.messages.append).run()  # type: ignore[arg-type]
        assert LEDGER.held() == held

    def places(self) -> list[int]:
        """The pages that were read, by number of their frame."""
        numbers = {frame.payload_at: number for number, frame in enumerate(self.index.frames)}
        return [numbers[offset] for offset in self.store.reads]


async def scene(runs: Sequence[PageRun]) -> Scene:
    image, index = await made(runs)
    store = Store(bytes(image.raw))
    content: dict[int, bytes] = {}
    for one in runs:
        at = 0
        for start, length in one.segments:
            for page in range(start, start + length, PAGE):
                content[page] = bytes(one.payload[at : at + PAGE])
                at += PAGE
    records, located = await read_index(index, "index")
    stored = StoredPages(records, Located(located, store, NOWHERE), {})
    return Scene(store, located, stored, content, Tree([(page, page + PAGE) for page in content]), Told())


def frames(count: int) -> list[PageRun]:
    """One page each, 1 MiB apart."""
    return [run(number << 20, os.urandom(PAGE)) for number in range(count)]


async def test_everything_comes_some_at_once(autojump_clock: MockClock):
    found = await scene(frames(10))
    await found.bring()
    assert found.tree.memory == found.content
    assert found.store.most == 4
    assert sorted(found.places()) == list(range(10))
    assert found.told.phases == ["postcopy"]


async def test_what_somebody_waits_for_comes_next_and_what_is_behind_it_then(autojump_clock: MockClock):
    found = await scene(frames(40))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.bring)
        await trio.sleep(0.5)
        found.tree.touch((30 << 20) + 0)
        await trio.sleep(0.6)
        # the four that were on their way are there, and no other was begun while somebody waits
        assert len(found.places()) == 5
        assert found.places()[4] == 30
        await trio.sleep(1)
        assert sorted(found.places()[5:9]) == [31, 32, 33, 34]
    assert found.tree.memory == found.content
    assert len(found.places()) == 40


async def test_what_is_on_its_way_is_not_asked_for_twice(autojump_clock: MockClock):
    found = await scene(frames(6))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.bring)
        await trio.sleep(0.5)
        for number in (0, 1, 5, 5):
            found.tree.touch(number << 20)
    assert sorted(found.places()) == list(range(6))


async def test_a_store_that_is_away_is_waited_for(autojump_clock: MockClock):
    found = await scene(frames(10))
    found.store.error = StorageError("store: no route to it")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.bring)
        await trio.sleep(3600)
        assert found.tree.memory == {}
        assert found.told.phases == ["postcopy", "postcopy-paused"]
        (message,) = found.told.messages
        assert message.startswith("store: no route to it: the tree waits")
        found.store.error = None
    assert found.tree.memory == found.content
    assert found.told.phases == ["postcopy", "postcopy-paused", "postcopy"]


async def test_who_waits_for_a_store_can_be_cancelled(autojump_clock: MockClock):
    found = await scene(frames(10))
    found.store.error = StorageError("store: no route to it")
    held = LEDGER.held()
    with trio.move_on_after(10) as scope:
        await found.bring()
    assert scope.cancelled_caught
    assert LEDGER.held() == held


@pytest.mark.parametrize("error", ["replaced", "damaged"])
async def test_what_never_will_be_right_ends_it(autojump_clock: MockClock, error: str):
    found = await scene(frames(10))
    if error == "replaced":
        found.store.error = ImageError("store: the object was replaced")
    else:
        found.store.raw[found.index.frames[4].payload_at] ^= 1
    held = LEDGER.held()
    with pytest.raises(ImageError, match=r"replaced|pages at byte \d+: the checksum does not fit"):
        await Bringing(
            found.stored,
            found.tree,
            {SPACE: list(found.tree.missing)},
            found.told,
            found.told.messages.append,
        ).run()  # type: ignore[arg-type]
    assert LEDGER.held() == held
    assert all(found.content[page] == content for page, content in found.tree.memory.items())


async def test_pages_of_another_image_are_never_taken_for_those_of_this_one():
    """Of the same size, at the same places, with the same records."""
    found, other = await scene(frames(3)), await scene(frames(3))
    assert len(found.store.raw) == len(other.store.raw)
    found.store.raw = other.store.raw
    found.store.seconds = 0
    with pytest.raises(ImageError, match="checksum does not fit"):
        await found.bring()
    assert found.tree.memory == {}


async def test_of_pages_that_are_there_twice_the_last_ones_count(autojump_clock: MockClock):
    """As for who reads the image from its begin."""
    twice = [
        run(0, os.urandom(8 * PAGE)),
        run(16 * PAGE, os.urandom(2 * PAGE)),
        run(2 * PAGE, os.urandom(3 * PAGE)),
        run(4 * PAGE, os.urandom(PAGE)),
        run(16 * PAGE, os.urandom(2 * PAGE)),
    ]
    found = await scene(twice)
    assert found.stored.ranges(SPACE) == [(0, 8 * PAGE), (16 * PAGE, 18 * PAGE)]
    for page in (4, 3, 7, 16):
        found.tree.touch(page * PAGE)
    await found.bring()
    assert found.tree.memory == found.content


async def test_what_comes_sooner_is_in_the_order_of_the_image_and_without_what_comes_later():
    found = await scene(
        [run(0, os.urandom(8 * PAGE)), run(1 << 20, os.urandom(PAGE)), run(2 << 20, os.urandom(PAGE))]
    )
    found.store.seconds = 0
    later = [(2 * PAGE, 5 * PAGE), (1 << 20, (1 << 20) + PAGE)]
    tree = Tree([(page, page + PAGE) for page in found.content])
    for load in found.stored.sooner(SPACE, later):
        leased = await load()
        await tree.bring(leased.run)
        leased.lease.release()
    assert list(tree.missing) == later
    assert found.places() == [0, 2]
    assert all(found.content[page] == content for page, content in tree.memory.items())


# -- layers -------------------------------------------------------------------------------------


#: what the address space is called in the layer
THERE = 3


async def layered(
    own: Sequence[PageRun], layer: Sequence[PageRun], runs: Sequence[tuple[int, int]]
) -> StoredPages:
    """An image with pages of its own, whose `runs` are in a layer."""
    written, index = Memory(name="layer"), Memory(name="index of the layer")
    writer = FrameWriter(written, index=index)
    page_bytes = 0
    for one in layer:
        packed = await writer.pack(replace(one, space=THERE))
        page_bytes += packed.page_bytes
        await writer.packed(packed)
    await writer.end(0, page_bytes)
    image, raw = await made(own)
    records, located = await read_index(raw, "index")
    records.layers[0] = Layer(index=0, name="layer", digest=writer.digest)
    records.stored[SPACE, 0] = Stored(space=SPACE, layer=0, number=THERE, runs=list(runs))
    there = Located(await read_layer_index(index, "index of the layer"), written, NOWHERE)
    return StoredPages(records, Located(located, image, NOWHERE), {0: there})


async def all_of(stored: StoredPages) -> dict[int, bytes]:
    """By page; none comes twice."""
    found: dict[int, bytes] = {}
    for load in stored.sooner(SPACE):
        leased = await load()
        now = content(leased.run)
        assert leased.run.space == SPACE
        assert not found.keys() & now.keys()
        found |= now
        leased.lease.release()
    return found


async def test_the_last_of_a_layer_counts_and_the_image_more():
    old, new, own = (os.urandom(8 * PAGE) for _ in range(3))
    stored = await layered(
        [run(6 * PAGE, own[: 2 * PAGE]), run(1 << 20, bytes(PAGE))],
        [run(0, old), run(0, new[: 2 * PAGE]), run(1 << 21, old), run(2 * PAGE, bytes(PAGE))],
        [(0, 4 * PAGE), (5 * PAGE, 7 * PAGE)],
    )
    whole = new[: 2 * PAGE] + bytes(PAGE) + old[3 * PAGE : 4 * PAGE]
    assert await all_of(stored) == {
        **{page * PAGE: whole[page * PAGE :][:PAGE] for page in range(4)},
        5 * PAGE: old[5 * PAGE : 6 * PAGE],
        6 * PAGE: own[:PAGE],
        7 * PAGE: own[PAGE : 2 * PAGE],
        1 << 20: bytes(PAGE),
    }
    assert stored.ranges(SPACE) == [(0, 4 * PAGE), (5 * PAGE, 8 * PAGE), (1 << 20, (1 << 20) + PAGE)]


@pytest.mark.parametrize("runs", [[(0, 9 * PAGE)], [(1 << 22, (1 << 22) + PAGE)]])
async def test_pages_that_are_not_in_their_layer_are_missed_at_once(runs: list[tuple[int, int]]):
    with pytest.raises(ImageError, match="layer: pages of space 7 are missing"):
        await layered([], [run(0, os.urandom(8 * PAGE))], runs)
