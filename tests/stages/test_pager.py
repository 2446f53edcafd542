"""The books of the pager, by events that the kernel tells late, and whose memory is not left behind."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import cast

import pytest
import trio
import trio.testing

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.paging import Dropped, Moved
from pipeline.remote.guard import Guard
from pipeline.resources.memory.missing import Missing
from pipeline.stages.lending import _holds_robust_mutexes
from pipeline.stages.pager import Pager, _Memory


class _NoGuard:
    def hold(self, _: Iterable[int]) -> None:
        """Nothing is watched."""

    watch_over = hold


def _missing_after(pause_s: float, unmapped: bool) -> bool:
    """Whether pages are missing where they were moved to, when news come that what was there is no more."""

    async def main() -> bool:
        pager = Pager([], [], cast(Guard, _NoGuard()))
        memory = _Memory(1, LocalFd(-1), Missing([(0, 0x4000)]))
        pager._take_in(memory, Moved(0, 0x8000, 0x4000))
        await trio.sleep(pause_s)
        pager._take_in(memory, Dropped(0x8000, 0xC000, unmapped))
        return bool(memory.missing)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("pause_s", "unmapped", "missing"), [(0.0, True, True), (1.0, True, False), (0.0, False, False)]
)
def test_news_of_an_unmapping_may_be_older_than_a_move(pause_s: float, unmapped: bool, missing: bool) -> None:
    assert _missing_after(pause_s, unmapped) == missing


@pytest.mark.parametrize(
    ("first", "pending", "holds"),
    [(0, 0, False), (64, 0, True), (0, 64, True)],
    ids=["none", "one", "pending"],
)
def test_robust_mutexes_are_seen(first: int, pending: int, holds: bool) -> None:
    """`first`: where the list begins, from its head on."""
    head = (ctypes.c_uint64 * 3)()
    address = ctypes.addressof(head)
    head[0], head[2] = address + first, pending
    assert _holds_robust_mutexes(HostPid(os.getpid()), address) == holds
