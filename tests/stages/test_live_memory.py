"""What is known of memory while somebody writes to it (`pipeline.stages.live_memory`)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.ids import HostPid, LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, SharedMemory, Vma
from pipeline.kernel.pagemap import PAGE_BYTES, Range, union
from pipeline.progress import NullProgress
from pipeline.resources.memory.classify import MAP_GROWSDOWN
from pipeline.resources.memory.objects import SharedObject
from pipeline.resources.memory.tracking import Tracking, TrackingLost, Written
from pipeline.stages import live_memory
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.live_memory import LiveMemory, _Space
from pipeline.stages.memory import FilePages, PageSource, ProcessPages, SharedPages
from pipeline.stages.write import write_pages
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import FrameWriter
from tests.harness.made_images import Memory

PAGE: list[Range] = [(0, PAGE_BYTES)]
#: what happens to the page between two steps
ACTS = list(chain.from_iterable(product(("write", "drop"), repeat=count) for count in range(3)))


class Parent:
    """A process with one page, of content 1 when it was looked at, and what becomes of it between the questions."""

    def __init__(
        self, before_read: Sequence[str], behind: Iterator[Sequence[str]], *, stands_still: bool
    ) -> None:
        self.stands_still = stands_still
        self._content = 1
        self._is_protected = True
        self._behind = behind
        self._act(before_read)
        self.read = self._content

    def _act(self, acts: Sequence[str]) -> None:
        for act in acts:
            self._is_protected = False
            self._content = self._content + 1 if act == "write" else 0

    def untouched(self) -> list[Range]:
        self._act(next(self._behind, ()))
        return PAGE if self._content and self._is_protected else []

    def collect(self) -> Written:
        assert not self.stands_still, "nobody has stopped it"
        self._act(next(self._behind, ()))
        was_written = bool(self._content) and not self._is_protected
        self._is_protected = bool(self._content)
        return Written(PAGE if was_written else [], [])


@pytest.mark.parametrize("before_read", ACTS)
@pytest.mark.parametrize("behind", ACTS)
@pytest.mark.parametrize("between", ACTS)
@pytest.mark.parametrize("stands_still", [False, True], ids=("write-protected", "soft-dirty"))
def test_whatever_a_parent_does_with_a_page_its_child_has_its_own(
    before_read: Sequence[str], behind: Sequence[str], between: Sequence[str], stands_still: bool
) -> None:
    """What is forked from the parent as it was read, has the page of the fork, or is sent that."""
    tracking = Parent(before_read, iter([behind, between]), stands_still=stands_still)
    parent = _Space(HostPid(os.getpid()), cast("Tracking", tracking), PAGE)
    child = _Space(HostPid(1), cast("Tracking", None), PAGE, parent=parent, inherited=PAGE)
    differing = child.differing()
    assert tracking.read == 1 or differing == PAGE
    if not (before_read or behind or between):
        assert not differing


class AtRest:
    """A process with one page that nobody writes to."""

    stands_still = False

    def collect(self) -> Written:
        return Written([], [])

    def check(self) -> None:
        """It is there."""

    def may_watch(self, start: int, end: int) -> bool:
        """It is asked when that is in doubt."""
        raise AssertionError(start, end)


@pytest.mark.parametrize("when", ["never", "in between", "at a look"])
def test_where_a_device_could_write_at_a_look_nothing_counts_as_sent(tmp_path: Path, when: str) -> None:
    """What has been written at the last stop is another question."""
    space = _Space(HostPid(os.getpid()), cast("Tracking", AtRest()), PAGE, sent=PAGE)
    space.look_again()
    if when != "never":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        if when == "at a look":
            space.look_again()
        os.close(fd)
    space.look_again()
    assert space.right(PAGE) == ([] if when == "at a look" else PAGE)


SIZE = 3 << 20


@pytest.fixture
def shared() -> Iterator[LocalFd]:
    """Memory without a hole."""
    fd = LocalFd(os.memfd_create("shared"))
    try:
        os.pwrite(fd, bytes(range(1, 251)) * (SIZE // 250 + 1), 0)
        os.truncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


def beginning(*sources: PageSource) -> LiveMemory:
    memory = LiveMemory()
    memory.begin(Image(), cast("FrozenTree", SimpleNamespace(pids=list, living=list)), sources)
    return memory


async def sent_in_a_round(memory: LiveMemory, *, first: bool = False) -> int:
    writer = FrameWriter(Memory(), pool=BufferPool(6, 4 << 20))
    return await write_pages(writer, memory.take(first=first), NullProgress())


async def test_each_round_sends_what_has_changed_of_what_is_shared(shared: LocalFd) -> None:
    """And as much as the last one has found is taken to be left."""
    memory = beginning(FilePages(1, shared, SIZE))
    try:
        assert await sent_in_a_round(memory, first=True) == SIZE
        assert memory.left_bytes() == 0
        assert memory.unknown_bytes() == SIZE
        os.pwrite(shared, b"new", PAGE_BYTES)
        os.pwrite(shared, b"new", 2 << 20)
        for pages in (2, 0):
            assert await sent_in_a_round(memory) == pages * PAGE_BYTES
            assert memory.unknown_bytes() == 0
            assert memory.left_bytes() == pages * PAGE_BYTES
        os.pwrite(shared, b"newer", 0)
        await sent_in_a_round(memory)
        memory.let_go_of_objects()
        assert memory.left_bytes() == 0
    finally:
        memory.close()


@pytest.mark.parametrize("way", ["of a namespace", "read out of a process"])
async def test_what_may_not_change_or_go_is_sent_once_while_the_tree_runs(shared: LocalFd, way: str) -> None:
    record = SharedMemory(space=1, kind="anon", size_bytes=0)
    memory = beginning(
        FilePages(1, shared, SIZE, early=True)
        if way == "of a namespace"
        else SharedPages(1, SharedObject(record, None))
    )
    try:
        assert len(memory.take(first=True)) == 1
        assert memory.unknown_bytes() == 0
        assert not memory.take(first=False)
    finally:
        memory.close()


class Ours:
    """Memory of our own that is sent, of which is written what a test says."""

    def __init__(self, pages: int) -> None:
        self._memory = mmap.mmap(-1, pages * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.live = LiveMemory()
        tracking = cast("Tracking", AtRest())
        self.space = self.live._spaces[1] = _Space(HostPid(os.getpid()), tracking, [self.run(0, pages)])

    def run(self, first: int, count: int = 1) -> Range:
        return self._start + first * PAGE_BYTES, self._start + (first + count) * PAGE_BYTES

    def write(self, first: int, content: bytes, count: int = 1) -> None:
        """Each of `count` pages is full of that now, and has to be looked at."""
        self._memory[first * PAGE_BYTES : (first + count) * PAGE_BYTES] = content * PAGE_BYTES * count
        self.space.pending = union(self.space.pending, [self.run(first, count)])


async def test_pages_that_are_as_they_were_sent_are_sent_once() -> None:
    ours = Ours(8)
    ours.write(0, b"a", 8)
    assert await sent_in_a_round(ours.live) == 8 * PAGE_BYTES
    ours.write(0, b"a", 8)
    ours.write(3, b"b")
    assert await sent_in_a_round(ours.live) == PAGE_BYTES


async def test_what_was_sent_without_a_copy_is_not_taken_for_what_was_sent_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round of more than copies are kept of: what a page was before it, counts no longer."""
    monkeypatch.setattr(live_memory, "_COPIED_BYTES", 4 * PAGE_BYTES)
    ours = Ours(8)
    ours.write(0, b"a")
    assert await sent_in_a_round(ours.live) == PAGE_BYTES
    ours.write(0, b"b", 8)
    assert await sent_in_a_round(ours.live) == 8 * PAGE_BYTES
    ours.write(0, b"a")
    assert await sent_in_a_round(ours.live) == PAGE_BYTES
    assert len(ours.space.last) == 1


async def test_no_more_copies_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_memory, "_COPIED_BYTES", 4 * PAGE_BYTES)
    ours = Ours(8)
    for first in range(0, 8, 2):
        ours.write(first, b"a", 2)
        assert await sent_in_a_round(ours.live) == 2 * PAGE_BYTES
        assert len(ours.space.last) <= 4
    ours.write(6, b"a", 2)
    assert await sent_in_a_round(ours.live) == 0


async def test_a_store_gets_all_that_was_written() -> None:
    """What an image has of a process is said before its pages are read."""
    ours = Ours(2)
    ours.live._is_stored = True
    for _ in range(2):
        ours.write(0, b"a", 2)
        assert await sent_in_a_round(ours.live) == 2 * PAGE_BYTES


@pytest.mark.parametrize("is_another", [False, True], ids=("the same mapping", "another one"))
async def test_pages_of_a_mapping_that_is_another_one_are_sent_though_they_are_the_same(
    is_another: bool,
) -> None:
    """The destination has mapped it anew, too, and has nothing there."""
    ours = Ours(4)
    start, end = ours.run(0, 4)
    images = Image(), Image()
    for image, flags in zip(images, (0, MAP_GROWSDOWN if is_another else 0), strict=True):
        vma = Vma(start=start, end=end, kind="anon", prot=3, flags=mmap.MAP_PRIVATE | flags)
        image.spaces[1] = AddressSpace(space=1, vmas=[vma], exe=1, layout=[0] * 11, auxv=b"")
    ours.live._image = images[0]
    ours.write(0, b"a", 4)
    await sent_in_a_round(ours.live)
    ours.write(1, b"a", 3)
    ours.write(2, b"b")
    lacking, dropped = ours.live.finish(images[1], [ProcessPages(1, ours.space.pid, [(start, end)])], ())
    writer = FrameWriter(Memory(), pool=BufferPool(6, 4 << 20))
    assert await write_pages(writer, lacking, NullProgress()) == (4 if is_another else 1) * PAGE_BYTES
    assert dropped == {1: []}


@pytest.mark.parametrize(
    ("pages", "same", "is_looked_for"), [(300, 10, False), (300, 20, True), (200, 1, True)]
)
async def test_where_hardly_anything_stays_the_same_it_is_not_looked_for(
    pages: int, same: int, is_looked_for: bool
) -> None:
    """Of some hundreds of pages that is told, not of fewer."""
    ours = Ours(pages)
    for first, content in (0, b"a"), (same, b"b"):
        ours.write(0, b"a", pages)
        ours.write(first, content, pages - first)
        assert await sent_in_a_round(ours.live) == (pages - first) * PAGE_BYTES
    ours.write(0, b"a", same)
    ours.write(same, b"b", pages - same)
    assert await sent_in_a_round(ours.live) == (0 if is_looked_for else pages * PAGE_BYTES)


@pytest.mark.parametrize("lacking", [8, 9])
async def test_in_the_pause_no_copies_are_made_and_few_are_not_looked_at(lacking: int) -> None:
    """A tree that outruns the link has much to send then, of which little is known."""
    ours = Ours(16)
    image = Image()
    start, end = ours.run(0, 16)
    vma = Vma(start=start, end=end, kind="anon", prot=3, flags=mmap.MAP_PRIVATE)
    image.spaces[1] = AddressSpace(space=1, vmas=[vma], exe=1, layout=[0] * 11, auxv=b"")
    ours.live._image = image
    ours.write(0, b"a", 2)
    await sent_in_a_round(ours.live)
    ours.write(2, b"b", 14)
    sources, _ = ours.live.finish(image, [ProcessPages(1, ours.space.pid, [ours.run(0, lacking)])], ())
    writer = FrameWriter(Memory(), pool=BufferPool(6, 4 << 20))
    sent = await write_pages(writer, sources, NullProgress())
    assert sent == (lacking - 2 if lacking == 8 else lacking) * PAGE_BYTES
    assert len(ours.space.last) == 2


async def test_of_what_a_child_has_inherited_no_copies_are_made() -> None:
    """It may be much more than what is counted, when its parent has written to it."""
    ours = Ours(4)
    ours.space.inherited = [ours.run(0, 2)]
    ours.write(2, b"a", 2)
    await sent_in_a_round(ours.live, first=True)
    assert len(ours.space.last) == 0
    ours.write(2, b"b", 2)
    await sent_in_a_round(ours.live)
    assert len(ours.space.last) == 2


def test_who_may_not_be_looked_at_any_more_is_tracked_no_more() -> None:
    """It has executed a program of somebody else: nothing is known of its memory, which goes in the end."""

    def refused() -> Written:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    closed = []
    tracking = SimpleNamespace(collect=refused, close=lambda: closed.append(1), stands_still=False)
    space = _Space(HostPid(os.getpid()), cast(Tracking, tracking), PAGE, pending=list(PAGE))
    with pytest.raises(TrackingLost, match="may not be looked at any more"):
        space.look_again()
    memory = LiveMemory(stored=True)
    memory._pids, memory._spaces = [space.pid], {0: space}
    assert memory.look() == 0
    assert space.is_lost
    assert closed == [1]
