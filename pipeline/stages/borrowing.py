"""The borrower: the destination's side of a tree that runs before its memory is there (`pipeline.stages.lending`).

Connections come and go; the `Pager` stays until no page is missing. What somebody waits for is asked for on whichever
connection attends, again on the next one if that broke.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from pipeline.errors import ImageError, PeerError, RebuildError, ungrouped
from pipeline.ids import HostPid
from pipeline.remote.guard import Guard
from pipeline.stages.pager import Pager, Watched
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.protocol import MAX_LACKING, Accept, Completed, Lacking, Want, Whole
from pipeline.transport.tcp import Channel

#: how long the source may take to hear that all is there
_FAREWELL_S = 5.0


class Borrowing:
    """What a tree with missing pages needs of us, from its offer to its last page.

    Ownership: holds the guard, and from `prepare` on the pager with it, until `run` ends or `give_up`.
    """

    def __init__(self) -> None:
        self._guard: Guard | None = Guard()
        self._pager: Pager | None = None
        self._scope = trio.CancelScope()
        self._begun = trio.Event()
        #: no page comes any more: all are there, or the tree is ended
        self._over = trio.Event()
        #: the source knows that it is over, or had time enough to hear of it
        self._told = trio.Event()

    def give_up(self) -> None:
        """The tree does not come to run, and is ended; nothing after `begin`."""
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None
        elif self._pager is not None and not self.begun:
            self._pager.give_up()

    def prepare(self, watched: Sequence[Watched], victims: Sequence[HostPid]) -> None:
        """Have all that bringing pages takes, before the source may end its tree; once.

        Args:
            watched: owned from now on.
            victims: whose end is the end of the tree.

        Raises:
            RebuildError, OSError: it is not to be had; `give_up` is still to be called.
        """
        assert self._guard is not None
        guard, self._guard = self._guard, None
        self._pager = Pager(watched, victims, guard)

    def begin(self) -> None:
        """The tree is about to run: `run` is to follow. Raises as `Pager.take_another_guard`."""
        self.pager.take_another_guard()
        self._begun.set()

    @property
    def begun(self) -> bool:
        """Whether the tree runs."""
        return self._begun.is_set()

    @property
    def pager(self) -> Pager:
        """Who brings the pages; behind `prepare`."""
        assert self._pager is not None
        return self._pager

    async def run(self) -> None:
        """Until every page is there, and the source has heard of it; otherwise, or by `stop`, the tree is killed."""
        try:
            with self._scope:
                await self.pager.run()
        finally:
            self._over.set()
        with trio.move_on_after(_FAREWELL_S):
            await self._told.wait()

    def stop(self) -> None:
        """The tree was not let run after all; behind `begin`."""
        self._scope.cancel()
        self._told.set()

    async def attend(self, channel: Channel) -> None:
        """Ask for pages, and put in place what comes, until the connection ends."""
        await channel.say(Accept())
        await self._begun.wait()

        async def ask() -> None:
            async for space, address in self.pager.wanted():
                await channel.say(Want(space, address))

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await self._take_in(channel)
                nursery.cancel_scope.cancel()

    async def resume(self, channel: Channel, completed: Completed) -> None:
        """Say what is missing to a source that has come back, then that its tree runs; and take that in.

        Raises as `take_all`.
        """
        for space, ranges in self.pager.lacking().items():
            for at in range(0, len(ranges), MAX_LACKING):
                await channel.say(Lacking(space, ranges[at : at + MAX_LACKING]))
        await channel.say(completed)
        await self.take_all(channel)

    async def take_all(self, channel: Channel) -> None:
        """Take in what the source sends unasked; when nothing is missing any more, tell it.

        Raises:
            PeerError: the connection broke.
            RebuildError: the tree is ended.
        """

        async def tell() -> None:
            await self._over.wait()
            if not self.pager.whole.is_set():
                raise RebuildError("the tree is ended: pages of it could not be put in place any more")
            await channel.say(Whole())

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell)
                await self._take_in(channel)
                nursery.cancel_scope.cancel()
        if not self.pager.whole.is_set():
            raise PeerError(f"{channel.peer} went away, and pages are missing: whoever needs one waits")
        self._told.set()

    async def _take_in(self, channel: Channel) -> None:
        try:
            while (item := await channel.reader.next()) is not None:
                if not isinstance(item, LeasedRun):
                    raise PeerError(f"{channel.peer} sends something else than pages")
                try:
                    await self.pager.bring(item.run)
                finally:
                    item.lease.release()
        except ImageError as error:
            raise PeerError(f"{channel.peer}: {error}") from error
