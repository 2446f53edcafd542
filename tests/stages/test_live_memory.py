"""What a child still has of its parent, while the parent writes (`pipeline.stages.live_memory`)."""

from typing import cast

from pipeline.ids import HostPid
from pipeline.kernel.pagemap import PAGE_BYTES, Range
from pipeline.resources.memory.tracking import Tracking, Written
from pipeline.stages.live_memory import _Space

PAGES: list[Range] = [(0, 4 * PAGE_BYTES)]
DROPPED: Range = (PAGE_BYTES, 2 * PAGE_BYTES)


class Writer:
    """The memory of a parent that has dropped a page, and writes it anew behind the first question about it."""

    def __init__(self) -> None:
        self.asked = 0

    def _is_there(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def content(self) -> list[Range]:
        there = self._is_there()
        return PAGES if there else [(0, DROPPED[0]), (DROPPED[1], PAGES[0][1])]

    def collect(self) -> Written:
        return Written([DROPPED] if self._is_there() else [], [])


def test_a_page_that_comes_back_between_two_questions_is_not_taken_for_the_child_s() -> None:
    """Its parent's was read while it was none, so that a child forked from what was sent would have zeros."""
    parent = _Space(HostPid(1), cast("Tracking", Writer()), PAGES)
    child = _Space(HostPid(2), cast("Tracking", None), PAGES, parent=parent, inherited=PAGES)
    assert child.differing() == [DROPPED]
