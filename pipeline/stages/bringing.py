"""Bringing what comes later of an image: first what somebody waits for, until no page is missing.

Several reads are under way at once, because a store that is far away answers late. The many go in order, from the
place on where somebody asked last, and begin no read while one is under way that somebody waits for.

What cannot be read now is tried again until it can, and whoever needs it waits as long; but what is damaged, or is not
what it was when it was opened, never will be what is missing, and ends the tree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

import trio

from pipeline.errors import StorageError, ungrouped
from pipeline.kernel.pagemap import Range, total_bytes
from pipeline.progress import Progress
from pipeline.stages.pager import Pager
from pipeline.stages.stored_pages import StoredPages
from pipeline.transport.buffers import LeasedRun

#: reads of the many
_AT_ONCE = 4
#: between two attempts to read what cannot be read
_PAUSE_S = 0.5
_HOW_LONG = "they are asked for again and again (cancelling, as by ^C, gives up, and the tree is lost)"


class Bringing:
    """See the module.

    Args:
        stored: the pages.
        pager: who puts them in place.
        later: which of them come later: ranges by space, ascending.
        progress: is told how far it is, and while it waits for the place where the image is.
        on_message: is told what it waits for.
    """

    def __init__(
        self,
        stored: StoredPages,
        pager: Pager,
        later: Mapping[int, Sequence[Range]],
        progress: Progress,
        on_message: Callable[[str], None],
    ) -> None:
        self._stored = stored
        self._pager = pager
        self._progress = progress
        self._on_message = on_message
        self._total_bytes = sum(total_bytes(ranges) for ranges in later.values())
        #: numbers of the pieces that are still to be read, ascending
        self._left = stored.later(later)
        #: where the many go on
        self._next = 0
        #: reads that somebody waits for; the event is set, and replaced, when there are none
        self._urgent = 0
        self._calm = trio.Event()
        #: reads that wait for the place where the image is
        self._stuck = 0

    async def run(self) -> None:
        """Bring until no page is missing.

        Raises:
            ImageError: the image is damaged, or another one now.
        """
        self._progress.phase("postcopy")
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bring_wanted, nursery)
                for _ in range(_AT_ONCE):
                    nursery.start_soon(self._bring_many)
                await self._pager.whole.wait()
                nursery.cancel_scope.cancel()

    async def _bring_many(self) -> None:
        while self._left:
            if self._urgent:
                await self._calm.wait()
                continue
            at = bisect_left(self._left, self._next)
            number = self._left.pop(at if at < len(self._left) else 0)
            self._next = number + 1
            await self._bring(number)

    async def _bring_wanted(self, nursery: trio.Nursery) -> None:
        async for space, address in self._pager.wanted():
            number = self._stored.piece_of(space, address)
            at = bisect_left(self._left, number)
            if at < len(self._left) and self._left[at] == number:
                self._left.pop(at)
                self._next = number + 1
                self._urgent += 1
                nursery.start_soon(self._bring_urgently, number)

    async def _bring_urgently(self, number: int) -> None:
        try:
            await self._bring(number)
        finally:
            self._urgent -= 1
            if not self._urgent:
                self._calm.set()
                self._calm = trio.Event()

    async def _bring(self, number: int) -> None:
        leased = await self._load(number)
        try:
            await self._pager.bring(leased.run)
        finally:
            leased.lease.release()
        self._progress.advance(min(self._pager.bytes_done, self._total_bytes), self._total_bytes)

    async def _load(self, number: int) -> LeasedRun:
        """Read a piece, as soon as it can be read."""
        is_stuck = False
        while True:
            try:
                leased = await self._stored.load(number)
            except StorageError as error:
                if not is_stuck:
                    is_stuck = True
                    self._stuck += 1
                    if self._stuck == 1:
                        self._progress.phase("postcopy-paused")
                        self._on_message(f"{error}: the tree waits for its pages; {_HOW_LONG}")
                await trio.sleep(_PAUSE_S)
                continue
            if is_stuck:
                self._stuck -= 1
                if not self._stuck:
                    self._progress.phase("postcopy")
            return leased
