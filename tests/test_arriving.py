"""What comes of a tree that stands still by now: records first, then what is lacking, read to the border of a frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pipeline import arriving
from pipeline.errors import ImageError, RebuildError
from pipeline.image.codec import Image
from pipeline.image.delta import Draft
from pipeline.image.schema import Absent, Record, Unchanged, UserNamespace
from pipeline.ledger import LEDGER
from pipeline.progress import NullProgress
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import fill
from pipeline.stages.building import bring_up_to_date
from pipeline.transport import protocol
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import FrameReader, FrameWriter
from pipeline.transport.protocol import Begin, Commit
from tests.cli import test_inspect
from tests.harness.made_images import PAGE, SPACE, Memory, run

_PAGES = [run(0x1000 + at * PAGE, b"x" * PAGE) for at in range(3)]


class _Tree:
    """What was built of a draft; remembers what became of it."""

    def __init__(self, *, is_draft_of_it: bool = True, fails: bool = False) -> None:
        self.is_draft_of_it, self.fails = is_draft_of_it, fails
        self.image: Image | None = None
        self.equipped = 0
        #: files that came along are not made yet
        self.lacks_files = False
        self.has_births = False
        self.contents = SimpleNamespace(place=lambda space: space, finish_fill=lambda _: None)

    def update(self, image: Image) -> bool:
        assert not any(space.dropped for space in image.spaces.values()), "nobody knows that yet"
        self.image = image
        return self.is_draft_of_it

    def equip_early(self, is_enough: Callable[[], bool]) -> bool:
        self.equipped += 1
        if self.fails:
            raise RebuildError("its address is taken")
        return not is_enough()

    def change(self) -> None:
        assert self.image is not None
        self.dropped = self.image.spaces[SPACE].dropped

    def last_fills(self) -> list[int]:
        return [SPACE]

    def place_of(self, space: int) -> int:
        return space


async def _run(act: Callable[..., Any], *args: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return act(*args)


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """The pages that found their place."""
    found: list[tuple[int, bytes]] = []
    monkeypatch.setattr(
        fill, "write_run", lambda _, one: found.append((one.segments[0][0], bytes(one.payload)))
    )
    return found


_RECORDS = list(test_inspect.image().image.records())


async def _sent(
    *, rest: Begin, absent: Sequence[Record] = (), records: Sequence[Record] = _RECORDS
) -> tuple[Any, int]:
    """A connection over which a source has sent `records` of its tree; and how many there should be."""
    wire = Memory()
    writer = FrameWriter(wire)
    for record in records:
        await writer.record(record)
    await writer.message(protocol.encode(rest))
    for one in absent:
        await writer.record(one)
    for pages in _PAGES:
        await writer.pages(pages)
    await writer.end(len(_RECORDS), sum(len(one.payload) for one in _PAGES))
    await writer.message(protocol.encode(Commit()))
    return _channel(wire), len(_RECORDS)


def _channel(wire: Memory) -> Any:
    reader = FrameReader(wire, BufferPool(2, 1 << 20), "wire")
    return SimpleNamespace(reader=reader, peer="there", understand=lambda item: protocol.decode(item.content))


async def _come(tree: _Tree, channel: Any, records: int) -> tuple[int, Begin]:
    tracer, draft = SimpleNamespace(run=_run), Draft(test_inspect.image().image)
    return await arriving._come_to_rest(channel, tree, draft, records, tracer, NullProgress())  # type: ignore[arg-type]


async def test_the_rest_is_taken_in_and_what_is_absent_is_known_before_mappings_change(written: list[Any]):
    gone = [(0x9000, 0xA000)]
    channel, records = await _sent(rest=Begin("rest", 1), absent=[Absent(space=SPACE, dropped=gone)])
    tree = _Tree()
    count, begin = await _come(tree, channel, records)
    assert (count, begin.what) == (3 * PAGE, "rest")
    assert written == [(0x1000 + at * PAGE, b"x" * PAGE) for at in range(3)]
    assert tree.dropped == gone
    assert tree.equipped == 1


async def test_what_comes_whole_is_left_to_who_builds_it():
    channel, records = await _sent(rest=Begin("whole"))
    tree = _Tree(is_draft_of_it=False)
    assert await _come(tree, channel, records) == (0, Begin("whole"))
    assert tree.equipped == 0


async def test_what_a_source_leaves_out_was_in_the_draft():
    channel, records = await _sent(rest=Begin("rest"))
    with pytest.raises(ImageError, match="no draft"):
        await _come(_Tree(is_draft_of_it=False), channel, records)


async def test_what_is_refused_is_said_though_nothing_was_changed():
    class Lacking(_Tree):
        def update(self, image: Image) -> bool:
            raise RebuildError("a file is not the same here")

    channel, records = await _sent(rest=Begin("rest"))
    with trio.fail_after(20), pytest.raises(RebuildError, match="not the same"):
        await _come(Lacking(), channel, records)


async def test_what_fails_beside_the_pages_is_said_where_the_peer_can_be_heard(written: list[Any]):
    """Else what is in the connection behind that could not be told apart any more."""
    channel, records = await _sent(rest=Begin("rest"))
    held = LEDGER.held()
    with pytest.raises(RebuildError, match="address is taken"):
        await _come(_Tree(fails=True), channel, records)
    assert len(written) == len(_PAGES)
    assert channel.understand(await channel.reader.next()) == Commit()
    assert LEDGER.held() == held


@pytest.mark.parametrize("lost", [1, 2])
async def test_fewer_records_than_were_announced(lost: int):
    channel, records = await _sent(rest=Begin("rest"), records=_RECORDS[:-lost])
    held = LEDGER.held()
    with pytest.raises(ImageError, match="a protocol message stands among the records"):
        await _come(_Tree(), channel, records)
    assert LEDGER.held() == held


async def test_what_is_unchanged_is_that_of_the_draft():
    unchanged = Unchanged(first=1, count=len(_RECORDS) - 1)
    channel, records = await _sent(rest=Begin("rest"), records=[_RECORDS[0], unchanged])
    tree = _Tree()
    count, _ = await _come(tree, channel, records)
    assert tree.image is not None
    assert count == 3 * PAGE
    assert list(tree.image.records()) == _RECORDS


@pytest.mark.parametrize(
    ("unchanged", "why"),
    [
        (Unchanged(first=1, count=len(_RECORDS)), "of a draft are said to be unchanged, which has"),
        (Unchanged(first=0, count=len(_RECORDS)), "more records came than the"),
        (Unchanged(first=0, count=1), "two heads"),
    ],
)
async def test_what_is_said_to_be_unchanged_is_in_the_draft(unchanged: Unchanged, why: str):
    channel, records = await _sent(rest=Begin("rest"), records=[_RECORDS[0], unchanged])
    with pytest.raises(ImageError, match=why):
        await _come(_Tree(), channel, records)


async def test_only_what_is_absent_comes_behind_the_records():
    """What refers to others would not be checked any more."""
    channel, records = await _sent(rest=Begin("rest", 1), absent=[UserNamespace(index=9, parent=77)])
    with pytest.raises(ImageError, match="UserNamespace stands among those of kind Absent"):
        await _come(_Tree(), channel, records)


async def test_pages_where_records_were_announced():
    channel, records = await _sent(rest=Begin("rest", 1))
    held = LEDGER.held()
    with pytest.raises(ImageError, match="fewer records came than the 1"):
        await _come(_Tree(), channel, records)
    assert LEDGER.held() == held


async def test_what_stands_is_changed_between_two_files(written: list[Any]):
    """Its pages then come while the others are made."""

    class Busy(_Tree):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[str] = []

        def equip_early(self, is_enough: Callable[[], bool]) -> bool:
            self.steps.append("files" if self.equipped == 0 else "the other files")
            self.equipped += 1
            give_up_s = time.monotonic() + 20
            while self.equipped == 1 and not is_enough():
                assert time.monotonic() < give_up_s, "what outlives a process has waited for all files"
                time.sleep(0.001)
            return self.equipped > 1

        def change(self) -> None:
            super().change()
            self.steps.append("change")

    channel, records = await _sent(rest=Begin("rest"))
    tree = Busy()
    async with tracer_thread() as tracer:
        draft = Draft(test_inspect.image().image)
        count, _ = await arriving._come_to_rest(channel, tree, draft, records, tracer, NullProgress())  # type: ignore[arg-type]
    assert (count, len(written)) == (3 * PAGE, 3)
    assert tree.steps == ["files", "change", "the other files"]


async def test_what_outlives_a_process_gets_its_pages_while_the_tracer_makes_files():
    """Only what touches processes waits for it."""
    filled = trio.Event()
    done: list[object] = []

    class Busy:
        async def run(self, act: Callable[..., Any], *args: Any) -> Any:
            await filled.wait()
            return act(*args)

    class Pages:
        async def fill(self, space: int, place: str) -> None:
            await trio.lowlevel.checkpoint()
            done.append((space, place))

        async def expect_end(self) -> None:
            await trio.lowlevel.checkpoint()

        def close(self) -> None:
            done.append("closed")

    tree = SimpleNamespace(
        contents=SimpleNamespace(place="file {}".format, finish_fill=done.append),
        change=lambda: done.append("changed"),
        last_fills=lambda: [SPACE],
        place_of="memory {}".format,
        has_births=False,
    )
    image: Any = SimpleNamespace(shared_memory={1: None}, contents={2: None})
    with trio.fail_after(20):
        await bring_up_to_date(tree, image, Pages(), Busy(), filled)  # type: ignore[arg-type]
    shared = [(1, "file 1"), 1, (2, "file 2"), 2]
    assert done == [*shared, "changed", (SPACE, f"memory {SPACE}"), "closed"]
