"""Dumping a tree while it runs: the rounds before the stop of a dump.

::

    stop: capture, track ─ go on ─ round ─ round ─ ... ─ stop: capture ─ rest, records

The pages of the rounds become a layer: an object beside the image, complete before the tree is stopped for the last
time. The image then holds the records, the pages that were written since, and where in the layer the others are; or in
an earlier image, if there is one to compare with (`pipeline.stages.lineage`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import chain

import msgspec
import trio

from pipeline.ids import HostPid
from pipeline.image.codec import image_of
from pipeline.image.packing import Packer
from pipeline.image.schema import Layer, Record, Stored
from pipeline.kernel import smaps
from pipeline.kernel.procfs import ProcessGone
from pipeline.policy import DumpPolicy
from pipeline.progress import Progress, Round
from pipeline.remote.tracer import Tracer
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.stages import freeze
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.lineage import Lineage, read_lineage
from pipeline.stages.live_memory import LiveMemory
from pipeline.stages.memory import PageSource
from pipeline.stages.observe import Looks
from pipeline.stages.pacing import Pacing
from pipeline.stages.stored_pages import stored_pages
from pipeline.stages.write import write_pages
from pipeline.standstill import Standstill, begin_tracking, look_again, look_first
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import FrameWriter
from pipeline.transport.index import indexed
from pipeline.transport.storage import LAYER, Storage, index_of, open_storage
from pipeline.userns.externals import Externals

#: what a look at a process takes, and what a place takes of the memory that is written while it stands still, synced
_LOOK_S = 0.005
_STORED_BYTES_S = 200e6
#: of fewer processes both stops are short
_MANY = 8


async def rounds_pay(pid: int) -> bool:
    """Whether the tree below `pid` stands still for less, in all, if its memory is written in rounds.

    For these it is looked at twice; many small processes are written in less time than the second look takes.
    """
    return await trio.to_thread.run_sync(_rounds_pay, HostPid(pid))


def _rounds_pay(root: HostPid) -> bool:
    pids = freeze.walk(root)
    if len(pids) < _MANY:
        return True
    left_bytes = len(pids) * _LOOK_S * _STORED_BYTES_S
    for pid in pids:
        with suppress(OSError, ProcessGone):
            left_bytes -= smaps.written_share(pid)
        if left_bytes < 0:
            return True
    return False


class Rounds(msgspec.Struct, frozen=True):
    """How the rounds of a dump are paced: see `pipeline.dump`."""

    max_downtime_s: float = 0.3
    max_rounds: int = 30


class Precopy:
    """A tree whose memory is stored while it runs.

    Args:
        tracer, pid, externals, policy: see `pipeline.dump`.
        rounds: how they are paced.
        known: see `pipeline.standstill.standstill`.
        lineage: of an earlier image, with which pages are compared.
        progress: is told how far it is.

    Ownership: `close` lets go of everything; the tree runs on with nothing left in it.
    """

    def __init__(
        self,
        tracer: Tracer,
        pid: int,
        rounds: Rounds,
        externals: Externals | None,
        policy: DumpPolicy | None,
        known: Beforehand,
        lineage: Lineage | None,
        progress: Progress,
    ) -> None:
        self._lineage = lineage
        self._tracer = tracer
        self._pid = pid
        self._rounds = rounds
        self._externals = externals
        self._policy = policy
        self._known = known
        self._progress = progress
        self.memory = LiveMemory(stored=True)
        self._digest = b""
        self._is_kept = False
        self.rounds_done = 0
        self.page_bytes = 0
        self.bytes_written = 0
        #: how long the tree stood still for the first look
        self.draft_s = 0.0
        self.notes: list[str] = []

    async def store_rounds(self, storage: Storage, packer: Packer, pool: BufferPool) -> None:
        """Store the memory of the tree, as far as that can be done while it runs, as a layer."""
        if not await self._begin():
            return
        if self._lineage is not None:
            await trio.to_thread.run_sync(self._lineage.begin, self.memory.image)
            packer.unchanged = self._lineage.unchanged
        async with indexed(storage, LAYER, packer, pool) as writer:
            await self._write_rounds(writer)
            await writer.end(0, self.page_bytes)
            self._digest = writer.digest
            self.bytes_written = writer.bytes_written
        packer.unchanged = None

    async def _begin(self) -> bool:
        """Stop the tree for a moment, look at it, and begin to track it; whether that was possible."""
        self._progress.phase("draft")
        try:
            self.draft_s = await begin_tracking(
                self._tracer, self._pid, self._externals, self._policy, self.memory, self._known
            )
        except TrackingLost as error:
            self.close()
            self.notes.append(f"the memory was stored while the tree stood still: {error}")
            return False
        self.notes += self.memory.remarks
        return True

    async def _write_rounds(self, writer: FrameWriter) -> None:
        memory = self.memory
        await look_first(self._tracer, self._pid, memory)
        pacing = Pacing(self._rounds.max_downtime_s, self._rounds.max_rounds, self.draft_s)
        dirty = memory.left_bytes()
        while True:
            self._progress.phase(f"round {pacing.rounds}")
            begun_s, before = time.monotonic(), writer.bytes_written
            sources = await trio.to_thread.run_sync(lambda: memory.take(first=not pacing.rounds))
            self.page_bytes += await write_pages(writer, sources, self._progress)
            await writer.flush()
            seconds, written = time.monotonic() - begun_s, writer.bytes_written - before
            self.rounds_done += 1
            left = await look_again(self._tracer, self._pid, memory)
            rate = written / seconds
            pacing.untracked_bytes = await trio.to_thread.run_sync(memory.untracked_bytes)
            expected_s = pacing.expected_s(left, rate)
            self._progress.round(
                Round(pacing.rounds, dirty, written, seconds, rate, left / seconds, expected_s)
            )
            if pacing.judge(left, rate, memory.unknown_bytes()) != "again":
                memory.let_go_of_objects()
                return
            dirty = left

    @property
    def looks(self) -> Looks | None:
        """What the last stop has in common with the first; None if nothing was stored."""
        return self.memory.looks if self._digest else None

    def rest(self, still: Standstill) -> tuple[Iterable[Record], Sequence[PageSource]]:
        """What the image holds of the tree that stands still now: its records, and what the layer lacks. In any thread.

        Records are translated as they are taken, which needs the tree no longer.

        Raises:
            Refused: somebody else has begun to watch its memory; it cannot grow.
        """
        if not self._digest:
            return still.translated(), still.sources
        still.plan_anew()
        lacking, kept = self.memory.kept(image_of(record for record, _ in still.records), still.sources)
        layers = [Layer(index=0, name=LAYER, digest=self._digest)]
        stored: list[Stored] = []
        for space, runs in kept.items():
            if self._lineage is not None:
                runs, theirs = self._lineage.refer(space, runs)
                stored += theirs
            if runs:
                stored.append(Stored(space=space, layer=0, number=space, runs=runs))
        if self._lineage is not None:
            layers += self._lineage.layers(stored)
        return chain(still.translated(), layers, stored), lacking

    def keep(self) -> None:
        """The image is complete: what was stored belongs to it, whatever comes."""
        self._is_kept = True

    async def discard(self, storage: Storage) -> None:
        """Remove what was stored, unless it is kept."""
        if not self._is_kept:
            await storage.discard(LAYER)
            await storage.discard(index_of(LAYER))

    def close(self) -> None:
        """Let go; idempotent."""
        self.memory.close()


@asynccontextmanager
async def stored_before(
    tracer: Tracer,
    pid: int,
    storage: Storage,
    packer: Packer,
    pool: BufferPool,
    rounds: Rounds,
    externals: Externals | None,
    policy: DumpPolicy | None,
    known: Beforehand,
    parent: str | None,
    progress: Progress,
) -> AsyncIterator[Precopy]:
    """The memory of a tree, stored and still watched; the layer is not left if the block fails before it is kept.

    Args:
        storage: where to.
        packer, pool: see `FrameWriter`.
        parent: where an earlier image is, to whose pages this one may refer.
        tracer, pid, rounds, externals, policy, known, progress: see `Precopy`.
    """
    async with AsyncExitStack() as stack:
        lineage: Lineage | None = None
        if parent is not None:
            earlier = await stack.enter_async_context(stored_pages(open_storage(parent)))
            lineage = await read_lineage(earlier, storage)
        precopy = Precopy(tracer, pid, rounds, externals, policy, known, lineage, progress)
        try:
            try:
                await precopy.store_rounds(storage, packer, pool)
                yield precopy
            finally:
                with trio.CancelScope(shield=True):
                    await tracer.run(precopy.close)
        except BaseException:
            with trio.CancelScope(shield=True):
                await precopy.discard(storage)
            raise
