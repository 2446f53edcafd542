"""Sending a tree while it runs: the rounds before the switch of a live migration.

::

    stop: capture, track ─ go on ─ draft ─ round ─ round ─ ... ─ stop: capture ─ rest

What the destination gets first is a draft of the tree, from which it builds; then, round by round, the pages that were
written since. In the last stop, which is the recipe's (`pipeline.migrate`), it is told what is different.

A tree that outruns the link can be held back meanwhile (`pipeline.stages.throttle`).

Processes that come and go meanwhile are mended in the last stop. If much memory is mapped anew, or comes with new
processes, the draft is void, and another one begins; a few times.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import trio

from pipeline.errors import PeerError, PipelineError
from pipeline.ids import HostPid
from pipeline.image.codec import Image, image_of
from pipeline.image.delta import Draft, condensed
from pipeline.image.schema import Absent, Record
from pipeline.kernel.pagemap import Range
from pipeline.policy import DumpPolicy
from pipeline.progress import Progress, Round
from pipeline.remote.tracer import Tracer
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.stages import draft
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.lending import Lent, split
from pipeline.stages.live_memory import LiveMemory
from pipeline.stages.memory import PageSource
from pipeline.stages.observe import Looks
from pipeline.stages.pacing import Pacing
from pipeline.stages.throttle import Throttle
from pipeline.stages.write import InOrder, write_pages, write_records, write_translated
from pipeline.standstill import Standstill, begin_tracking, look_again, look_first
from pipeline.transport.protocol import Begin, CatchUp, CaughtUp
from pipeline.transport.tcp import Channel
from pipeline.userns.externals import Externals

OnTimeout = Literal["switch", "cancel", "postcopy"]

_DRAFTS = 3
#: so much newly mapped memory is worth another draft
_LATE_BYTES = 64 << 20
#: a round of more bytes than this tells the rate of the link
_TELLING_BYTES = 1 << 20
#: what the destination does in the pause whatever is left, as a first guess
_FINISH_S = 0.03


class Rounds(msgspec.Struct, frozen=True):
    """How a live migration is paced; see `pipeline.migrate`."""

    max_downtime_s: float
    max_rounds: int
    on_timeout: OnTimeout
    #: a tree that writes faster than it can be sent is held back
    auto_converge: bool = False
    #: what is left after the rounds comes when the tree runs (`pipeline.stages.lending`)
    later: bool = False
    #: there are none: the destination gets a draft to build by, without the pages that may come later
    only_draft: bool = False


class LiveSource:
    """A tree on its way to a destination while it runs.

    Args:
        tracer, pid, externals, policy: see `pipeline.migrate`.
        channel: to a destination that has accepted.
        rounds: how they are paced.
        known: see `pipeline.standstill.standstill`.
        progress: is told how far it is.

    Ownership: `close` lets go of everything; the tree runs on with nothing left in it.
    """

    def __init__(
        self,
        tracer: Tracer,
        pid: int,
        channel: Channel,
        rounds: Rounds,
        externals: Externals | None,
        policy: DumpPolicy | None,
        known: Beforehand,
        progress: Progress,
    ) -> None:
        self._tracer = tracer
        self._pid = pid
        self._channel = channel
        self._rounds = rounds
        self._externals = externals
        self._policy = policy
        self._known = known
        self._progress = progress
        self._later = rounds.later
        #: runs beside; whoever stops the tree lets go of it first
        self.throttle = Throttle(tracer, HostPid(pid))
        self.memory = LiveMemory()
        self._has_draft = False
        self._draft: Draft | None = None
        self.begun_s = time.monotonic()
        self.page_bytes = 0
        self.rounds_done = 0
        #: how long the tree stood still for the drafts
        self.draft_s = 0.0
        self.notes: list[str] = []

    async def send_rounds(self) -> None:
        """Send the tree until it is time to stop it.

        Raises:
            PipelineError: it cannot be kept up with, and `on_timeout` is ``cancel``; or the destination refuses.
        """
        reason = ""
        for attempt in range(_DRAFTS):
            self._drop_draft()
            if not await self._begin():
                return
            try:
                if await self._send_draft(is_last=attempt == _DRAFTS - 1):
                    self.memory.let_go_of_objects()
                    return
            except TrackingLost as lost:
                reason = str(lost)
        self._drop_draft()
        self.notes.append(f"the tree was sent whole in the end: it changes too fast ({reason})")

    @property
    def looks(self) -> Looks | None:
        """What the last stop has in common with the draft; None without a draft."""
        return self.memory.looks if self._has_draft else None

    def _drop_draft(self) -> None:
        self.memory.close()
        self.memory = LiveMemory()
        self._has_draft = False

    async def _begin(self) -> bool:
        """Stop the tree for a moment, look at it, and begin to track it; whether that was possible."""
        self._progress.phase("draft")
        try:
            async with self._not_held_back():
                self.draft_s = await begin_tracking(
                    self._tracer, self._pid, self._externals, self._policy, self.memory, self._known
                )
        except TrackingLost as error:
            self._drop_draft()
            if not self._rounds.only_draft:
                self.notes.append(f"the tree was sent while it stood still: {error}")
            return False
        self._has_draft = True
        self.notes += [remark for remark in self.memory.remarks if remark not in self.notes]
        return True

    async def _send_draft(self, *, is_last: bool) -> bool:
        """The draft and its rounds; False: it is void, which the last one never is. TrackingLost: it is of no use."""
        memory = self.memory
        async with self._not_held_back():
            await look_first(self._tracer, self._pid, memory)
        pacing = Pacing(
            self._rounds.max_downtime_s,
            self._rounds.max_rounds,
            self.draft_s + _FINISH_S,
            self._rounds.auto_converge,
            self.throttle.percentage,
        )
        dirty, rate = memory.left_bytes(), 0.0
        while True:
            begun_s, written_before = time.monotonic(), self._channel.writer.total_bytes()
            await (self._first_round() if not pacing.rounds else self._next_round(pacing.rounds))
            sent = self._channel.writer.total_bytes() - written_before
            if not rate or sent > _TELLING_BYTES:
                rate = sent / (time.monotonic() - begun_s)
            if not pacing.rounds:
                await self._wait_for_draft()
            if self._rounds.only_draft:
                return True
            seconds = time.monotonic() - begun_s
            async with self._not_held_back():
                left = await look_again(self._tracer, self._pid, memory)
            late = await trio.to_thread.run_sync(memory.late_bytes)
            if late > _LATE_BYTES and not is_last:
                return False
            pacing.untracked_bytes = await trio.to_thread.run_sync(memory.untracked_bytes)
            expected_s = pacing.expected_s(left, rate)
            number, verdict = pacing.rounds, pacing.judge(left, rate, memory.unknown_bytes())
            percentage = pacing.throttle_percentage
            if percentage != self.throttle.percentage:
                await self.throttle.set(percentage)
            self._progress.round(
                Round(number, dirty, sent, seconds, rate, left / seconds, expected_s, percentage)
            )
            dirty = left
            if verdict == "too long" and self._rounds.on_timeout == "cancel":
                remedy = "" if self._rounds.auto_converge else "say --auto-converge, "
                raise PipelineError(
                    f"the tree writes faster than it can be sent: it would stand still for {expected_s:.1f} s; raise "
                    f"--max-downtime, {remedy}or say --on-timeout switch"
                )
            self._later |= verdict == "too long" and self._rounds.on_timeout == "postcopy"
            if verdict != "again":
                return True

    @asynccontextmanager
    async def _not_held_back(self) -> AsyncIterator[None]:
        """The throttle has stopped nobody in the block, in which others stop the tree."""
        percentage = self.throttle.percentage
        await self.throttle.set(0)
        try:
            yield
        finally:
            if percentage:
                await self.throttle.set(percentage)

    async def _first_round(self) -> None:
        memory = self.memory
        await self._channel.say(Begin("draft"))
        without_later = self._rounds.only_draft
        sources = await trio.to_thread.run_sync(lambda: memory.take(first=True, without_later=without_later))
        self._draft = Draft(memory.image)
        records = list(memory.image.records())
        self.page_bytes += await write_translated(
            self._channel.writer, InOrder(records), sources, self._progress, eager=True
        )
        self.rounds_done += 1

    async def _wait_for_draft(self) -> None:
        """Until the destination has built what the draft tells of, with all that it holds.

        What it is sent lies in buffers for a while: a small tree would stand still for all of that.

        Raises:
            PeerRefused: it cannot be built there.
        """
        await self._channel.say(CatchUp())
        if not isinstance(await self._channel.hear(), CaughtUp):
            raise PeerError(f"{self._channel.peer} was to build a draft, and does not say that it has")

    async def _next_round(self, number: int) -> None:
        memory = self.memory
        self._progress.phase(f"round {number}")
        await self._channel.say(Begin("round"))
        sources = await trio.to_thread.run_sync(lambda: memory.take(first=False))
        self.page_bytes += await write_pages(self._channel.writer, sources, self._progress)
        self.rounds_done += 1

    @property
    def later(self) -> bool:
        """Whether what is left after the rounds comes when the tree runs."""
        return self._later

    async def send_rest(self, still: Standstill, lasting: Collection[HostPid]) -> list[Lent]:
        """Send what the destination lacks of the tree that stands still now; returns what comes later.

        Args:
            still: the tree.
            lasting: whose memory lasts, so that its pages may come later.
        """
        if self._has_draft:
            now = await self._send_records(still)
            if (lacking := await self._lacking(now, still)) is not None:
                return await self._send_lacking(now, len(still.records), *lacking, lasting)
            await self._tracer.run(still.plan_anew)
        records = list(still.translated())
        await self._channel.say(Begin("whole"))
        sources, lent = split(image_of(records), still.sources, lasting)
        await self._send([*records, *_absent({}, lent)], sources)
        return lent

    async def _send_records(self, still: Standstill) -> Image:
        """What the tree is: the destination begins with that while it is reckoned here what it lacks."""
        now, draft = Image(), self._draft
        assert draft is not None

        def translated() -> Iterator[tuple[Record, int | None]]:
            for found in still.translated():
                record, number = draft.known(found)
                now.add(record)  # type: ignore[arg-type]
                yield record, number

        await self._channel.say(Begin("still", len(still.records)))
        await write_records(self._channel.writer, InOrder(condensed(translated())), eager=True)
        return now

    async def _send_lacking(
        self,
        now: Image,
        before: int,
        sources: Sequence[PageSource],
        dropped: Mapping[int, list[Range]],
        lasting: Collection[HostPid],
    ) -> list[Lent]:
        """Send what is left of the tree, of which `before` records are sent; returns what comes later."""
        sources, lent = split(now, sources, lasting)
        absent = _absent(dropped, lent)
        await self._channel.say(Begin("rest", len(absent)))
        await self._send(absent, sources, before)
        return lent

    async def _send(self, records: Sequence[Record], sources: Sequence[PageSource], before: int = 0) -> None:
        self.page_bytes += await write_translated(
            self._channel.writer, InOrder(records), sources, self._progress, eager=True, before=before
        )

    async def _lacking(
        self, now: Image, still: Standstill
    ) -> tuple[list[PageSource], dict[int, list[Range]]] | None:
        """What the destination lacks of the tree that stands still, see `LiveMemory.finish`; None: all of it."""
        mending = draft.mending(self.memory.image, now)
        reasons = list(mending.reasons)
        if not reasons:
            try:
                return await trio.to_thread.run_sync(
                    self.memory.finish, now, still.sources, mending.new_spaces
                )
            except TrackingLost as lost:
                reasons = [str(lost)]
        self.notes.append(f"the tree was sent whole in the end: {'; '.join(reasons)}")
        return None

    def close(self) -> None:
        """Let go; idempotent."""
        self.memory.close()


def _absent(dropped: Mapping[int, list[Range]], lent: Sequence[Lent]) -> list[Absent]:
    """What is to be said of address spaces beyond their records, by their numbers."""
    later = {one.space: list(one.runs) for one in lent}
    return [
        Absent(space=space, dropped=dropped.get(space, []), later=later.get(space, []))
        for space in sorted(dropped.keys() | later.keys())
        if dropped.get(space) or later.get(space)
    ]
