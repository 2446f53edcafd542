"""What is known of memory while somebody writes to it (`pipeline.stages.live_memory`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.ids import HostPid, LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import SharedMemory
from pipeline.kernel.pagemap import PAGE_BYTES, Range
from pipeline.progress import NullProgress
from pipeline.resources.memory.objects import SharedObject
from pipeline.resources.memory.tracking import Tracking, Written
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.live_memory import LiveMemory, _Space
from pipeline.stages.memory import FilePages, PageSource, SharedPages
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
        assert not memory.is_left_known
        os.pwrite(shared, b"new", PAGE_BYTES)
        os.pwrite(shared, b"new", 2 << 20)
        for pages in (2, 0):
            assert await sent_in_a_round(memory) == pages * PAGE_BYTES
            assert memory.is_left_known
            assert memory.left_bytes() == pages * PAGE_BYTES
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
        assert memory.is_left_known
        assert not memory.take(first=False)
    finally:
        memory.close()
