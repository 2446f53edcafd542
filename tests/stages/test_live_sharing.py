"""Of shared memory only what may have been written is looked at again, where that is known."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.image.schema import SharedMemory
from pipeline.kernel import userfaultfd
from pipeline.kernel.pagemap import PAGE_BYTES, Range
from pipeline.resources.memory import shared_tracking
from pipeline.resources.memory.objects import SharedObject
from pipeline.stages import freeze
from pipeline.stages.asking import inside
from pipeline.stages.live_sharing import LiveSharing
from pipeline.stages.memory import SharedPages
from tests.resources.sharedtarget import SIZE, SPACE, Family

pytestmark = pytest.mark.root


class Shared:
    """What a family shares, and is sent while it runs: open in another way than the family has it."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.fd = family.opened()
        self.live = LiveSharing()

    def source(self, *, is_open: bool = False) -> SharedPages:
        """As a look at the stopped family finds it."""
        record = SharedMemory(space=SPACE, kind="anon", size_bytes=SIZE)
        return SharedPages(
            SPACE, SharedObject(record, self.fd, self.family.windows()[SPACE], is_open=is_open)
        )

    def begin(self) -> None:
        pid = self.family.pid
        tree = freeze.freeze(pid, suspend_seccomp=True)
        try:
            self.live.add(self.source())
            with inside(pid, [pid]) as task:
                self.live.watch(pid, task.syscall)
        finally:
            freeze.release(tree)
        self.live.look_first(pid)
        assert self.taken(first=True) is None, "all of it"

    def look(self) -> None:
        self.live.look(self.family.pid)

    def taken(self, *, first: bool = False) -> list[Range] | None:
        """What a round sends of it; None: all that it finds to have changed."""
        (source,) = self.live.take(first=first)
        assert isinstance(source, SharedPages)
        return None if source.written is None else list(source.written)

    def lacking(self, *, is_open: bool = False, doubtful: Collection[HostPid] = ()) -> list[Range] | None:
        source = self.source(is_open=is_open)
        self.live.look_last([source], set(doubtful))
        found = self.live.lacking(source)
        assert isinstance(found, SharedPages)
        return None if found.written is None else list(found.written)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    if not userfaultfd.is_asynchronous():
        pytest.skip("this kernel has no asynchronous write protection")
    monkeypatch.setattr(shared_tracking, "_LARGE_BYTES", SIZE)
    family = Family()
    try:
        shared = Shared(family)
        try:
            yield shared
        finally:
            shared.live.close()
            os.close(shared.fd)
        assert not family.watched()
    finally:
        family.close()


def page(number: int) -> Range:
    return number * PAGE_BYTES, (number + 1) * PAGE_BYTES


def test_each_round_and_the_end_have_what_was_written_since(shared: Shared) -> None:
    shared.begin()
    shared.family.do("write 3")
    shared.look()
    shared.family.do("write 50")
    shared.look()
    assert shared.live.left_bytes() == 2 * PAGE_BYTES
    assert shared.live.unknown_bytes() == 0
    assert shared.taken() == [page(3), page(50)]
    assert shared.live.left_bytes() == 0
    shared.family.do("write 4")
    shared.look()
    shared.family.do("write 5")
    assert shared.lacking() == [(page(4)[0], page(5)[1])]


def test_what_somebody_outside_has_mapped_is_compared(shared: Shared) -> None:
    with mmap.mmap(shared.fd, SIZE) as ours:
        shared.begin()
        ours[7 * PAGE_BYTES] = 1
        for _ in range(2):
            shared.look()
            assert shared.taken() is None
        assert shared.lacking() is None


def test_somebody_who_is_born_is_known_when_he_was_looked_at(shared: Shared) -> None:
    shared.begin()
    shared.family.do("bear")
    shared.look()
    assert shared.taken() is None
    shared.family.do("child_writes 9")
    shared.look()
    assert shared.taken() == [page(9)]
    shared.family.do("by_a_child_that_ends 8")
    assert shared.lacking() is None


@pytest.mark.parametrize("when", ["in between", "at a look", "at the end"])
def test_where_a_device_could_write_at_a_look_all_is_compared(
    shared: Shared, tmp_path: Path, when: str
) -> None:
    """Whoever stops the tree says who could then."""
    shared.begin()
    shared.family.do(f"open_directly {tmp_path}/file")
    if when == "at a look":
        shared.look()
    shared.family.do("close")
    shared.look()
    shared.family.do("write 4")
    doubtful = [shared.family.pid] if when == "at the end" else []
    assert shared.lacking(doubtful=doubtful) == ([page(4)] if when == "in between" else None)


def test_what_the_tree_has_a_descriptor_of_by_now_is_compared(shared: Shared) -> None:
    shared.begin()
    shared.look()
    shared.taken()
    assert shared.lacking(is_open=True) is None
    assert shared.lacking() == []
