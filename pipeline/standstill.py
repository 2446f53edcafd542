"""A tree that stands still: frozen, and everything about it captured. What dump and migrate have in common.

What is refused is refused before anything is touched. Some things stand in the way for a moment
only, such as a connection that is just being made: they are waited for, a little, before the
freeze; and where one shows only behind it, the tree is let go and stopped once more: behind closed doors, so that
it can accept the clients that wait (`pipeline.resources.tcp_doors`).
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress

import trio

from pipeline import garbage
from pipeline.errors import Blocker, PipelineError, Refused, TargetError, ungrouped
from pipeline.ids import HostPid
from pipeline.image.codec import image_of
from pipeline.image.schema import Record
from pipeline.kernel import descriptor_table, procfs, smaps
from pipeline.policy import DumpPolicy
from pipeline.remote.tracer import Tracer, tracer_thread
from pipeline.resources import identity
from pipeline.resources.external_state import ExternalState
from pipeline.resources.held import Held
from pipeline.resources.memory import tracking
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.resources.registry import kinds
from pipeline.resources.tasks.interrupted import Sleepers
from pipeline.resources.tcp_doors import Doors
from pipeline.stages import freeze, grace, translate
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.capture import Capture
from pipeline.stages.examine import early_blockers, tree_blockers
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.live_memory import LiveMemory
from pipeline.stages.memory import PageSource
from pipeline.stages.observe import Looks
from pipeline.stages.outliving import Outliving, large_memories
from pipeline.transport.buffers import BufferPool
from pipeline.userns.cradle import is_privileged
from pipeline.userns.externals import Externals
from pipeline.userns.forest import Forest

#: how often what may go away by itself is looked at again, before and behind the freeze
_TRANSIENT_TRIES = 5
_TRANSIENT_PAUSE_S = 0.2

#: each record with that of its kind, where it is an open file
CapturedRecords = Sequence[tuple[Record, Record | None]]


async def refuse_early(
    pid: int,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    known: Beforehand | None = None,
) -> None:
    """Raise Refused where something stops the tree that shows while it runs: with all that stops it, at once.

    Only for that it is stopped, for some milliseconds; else nothing is touched. What stops it by its open files alone
    is found at the first stop.

    `known`: remembers what is read, for whoever stops it then.
    """
    for attempt in range(_TRANSIENT_TRIES):
        if not await trio.to_thread.run_sync(early_blockers, pid, externals, policy, known):
            return
        async with tracer_thread() as tracer:
            blockers: Sequence[Blocker] = await tracer.run(tree_blockers, pid, externals, policy)
        if not blockers:
            return
        if attempt == _TRANSIENT_TRIES - 1 or not all(blocker.transient for blocker in blockers):
            raise Refused(blockers)
        await trio.sleep(_TRANSIENT_PAUSE_S)


class Standstill:
    """A frozen tree and what was captured of it; see `standstill`.

    `begun_s`, `frozen_s`, `captured_s`: when the freeze began, when everybody stood and when everything was known, on
    the clock of time.monotonic. `records`: as they are written. `sources`: of pages, in the order of the growth plan.
    `holdings`: what is held of the tree until it runs on, or is told that it has ended.
    """

    def __init__(
        self,
        tree: FrozenTree,
        capture: Capture,
        records: CapturedRecords,
        sources: Sequence[PageSource],
        begun_s: float,
        frozen_s: float,
        held: AsyncExitStack,
        holdings: Held,
        outliving: Outliving,
        known: Beforehand,
    ) -> None:
        self.tree = tree
        self._known = known
        self.records = records
        self.sources = sources
        self.forest: Forest = capture.forest()
        self.processes = len(capture.tree.pids)
        self.injected_calls = capture.injected_calls
        self.begun_s = begun_s
        self.frozen_s = frozen_s
        self.captured_s = time.monotonic()
        self._capture = capture
        self._held = held
        self._outliving = outliving
        self.holdings = holdings
        #: whether something that others see may be written at the end of the tree; see `prepare_end`
        self.end_may_be_seen = True

    def translated(self) -> Iterator[Record]:
        """The records, one by one, their ids in the forest of the image."""
        for record, state in self.records:
            yield translate.into_forest(record, state, self.forest)

    def plan_anew(self) -> None:
        """Let `records` and `sources` be those of a tree that grows from nothing, where they were not; in any thread.

        Raises:
            Refused: it cannot grow.
            TargetError: somebody has killed a process of it.
        """
        try:
            self.records, self.sources, blockers = self._capture.planned()
        except OSError as error:
            why = "the tree cannot be looked at any more; was a process of it killed while it stood still?"
            raise TargetError(f"{why} ({error})") from error
        if blockers:
            raise Refused(blockers)

    def external_ends(self) -> list[str]:
        """Names of the ends outside of the tree, in order."""
        names = {state.name for _, state in self.records if isinstance(state, ExternalState)}
        return sorted(map(os.fsdecode, names))

    def go_on(self) -> float:
        """Let the tree run on, before all is given back but its open files; in the tracer's thread.

        Returns:
            When that was, on the clock of time.monotonic.
        """
        self.holdings.close()
        self._capture.let_go_of_files()
        freeze.release(self.tree)
        since_s = time.monotonic()
        self._capture.close()
        return since_s

    async def let_go_of_files(self) -> None:
        """Close what is held of the tree's open files, and leave its networks: with the tree they end; idempotent."""
        await self._held.aclose()
        self._known.networks.close()

    def kill(self) -> None:
        """Let nothing of the tree run again, without waiting for its end, which `end` does."""
        freeze.kill(self.tree)

    def end(self) -> None:
        """Kill every process of the tree, and tell those that hold something of it; in the tracer's thread."""
        freeze.end(self.tree)
        self.holdings.ended()

    async def prepare_end(self, lasting: Collection[HostPid] = ()) -> None:
        """Let the end of the tree not wait for its memory, which is given back at the end of the standstill.

        And see what else it waits for: before `let_go_of_files`.

        Args:
            lasting: whose memory lasts longer than that.
        """
        memories = [one for one in large_memories(self.records, self.sources) if one.pid not in lasting]

        def prepare() -> None:
            self._outliving.hold(memories)
            self.end_may_be_seen = self._capture.end_may_be_seen()

        await trio.to_thread.run_sync(prepare)


@asynccontextmanager
async def standstill(
    tracer: Tracer,
    pid: int,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    image: str = "",
    looks: Looks | None = None,
    known: Beforehand | None = None,
) -> AsyncIterator[Standstill]:
    """The tree below `pid`, stopped and captured; runs on after the block, unless it was ended or held.

    Args:
        tracer, pid, externals, policy: see `pipeline.dump`.
        image: where the image comes to be, if that is a place of this host.
        looks: what it has in common with other stops of the same tree.
        known: what all looks at the tree have in common; stays the caller's.

    Raises:
        Refused: something that only showed when it stood still stops it; it runs on.
    """
    translate.prepare(kind.record for kind in kinds())
    for attempt in range(_TRANSIENT_TRIES):
        async with AsyncExitStack() as stopped:
            if attempt:
                await stopped.enter_async_context(_doors_closed(tracer, pid, externals, policy))
            # how long tasks have slept is asked before the freeze wakes them
            sleepers = Sleepers()
            before = known or stopped.enter_context(Beforehand())
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    # for files that are mapped, and were just written: the kernel lets one wait for it
                    nursery.start_soon(trio.to_thread.run_sync, identity.read_leases_ahead)
                    await tracer.run(lambda now=sleepers: now.look(freeze.walk(HostPid(pid))))
                    await tracer.run(_make_room_for_descriptors, HostPid(pid))
                    await tracer.run(lambda now=before: now.refresh(freeze.walk(HostPid(pid))))
            stopped.enter_context(garbage.held_off())
            begun_s = time.monotonic()
            try:
                tree = await stopped.enter_async_context(_frozen(tracer, pid))
                frozen_s = time.monotonic()
                holdings = await stopped.enter_async_context(_holding(tracer, image))
                held = await stopped.enter_async_context(AsyncExitStack())
                capture, records, sources = await held.enter_async_context(
                    _captured(tracer, tree, sleepers, externals, policy, holdings, before, looks)
                )
            except Refused as refused:
                last = attempt == _TRANSIENT_TRIES - 1
                if last or not all(blocker.transient for blocker in refused.blockers):
                    raise
            else:
                outliving = await stopped.enter_async_context(_outliving())
                async with _told_of_the_killed(tracer, tree):
                    yield Standstill(
                        tree, capture, records, sources, begun_s, frozen_s, held, holdings, outliving, before
                    )
                return
        await trio.sleep(_TRANSIENT_PAUSE_S)


async def begin_tracking(
    tracer: Tracer,
    pid: int,
    externals: Externals | None,
    policy: DumpPolicy | None,
    memory: LiveMemory,
    known: Beforehand,
) -> float:
    """Stop the tree for a moment, look at it, and begin to track its memory; how long it stood still, in seconds.

    Args:
        tracer, pid, externals, policy: see `pipeline.dump`.
        memory: what tracks it, until it is closed by the caller.
        known: see `standstill`.

    Raises:
        Refused: something stops the tree that does not go away by itself.
        TrackingLost: it cannot be tracked; the text says why.
    """
    await trio.to_thread.run_sync(_prepare_tracking, pid)
    try:
        async with standstill(tracer, pid, externals, policy, looks=memory.looks, known=known) as still:
            await tracer.run(memory.begin, image_of(still.translated()), still.tree, still.sources)
            begun_s = still.begun_s
    except OSError as error:
        raise TrackingLost(f"its writes cannot be tracked here ({error.strerror})") from None
    except Refused as refused:
        if not all(blocker.transient for blocker in refused.blockers):
            raise
        raise TrackingLost(str(refused)) from None
    except TargetError as error:
        raise TrackingLost(str(error)) from None
    return time.monotonic() - begun_s


def _prepare_tracking(pid: int) -> None:
    tracking.prepare(freeze.walk(HostPid(pid)))


async def look_first(tracer: Tracer, pid: int, memory: LiveMemory) -> None:
    """Ask what there is of memory that is tracked since its tree has stood still; raises as `look_again`."""
    await trio.to_thread.run_sync(memory.first_look)
    await tracer.run(grace.wait, HostPid(pid))


async def look_again(tracer: Tracer, pid: int, memory: LiveMemory) -> int:
    """Ask what the tree below `pid` has written since the last time; how many bytes are to be sent.

    They may be read behind it: no system call that was writing them is under way any more.

    Raises:
        TrackingLost: see `LiveMemory.look`.
        Refused, TargetError: it cannot be stopped for it.
    """
    if not memory.stands_still:
        left_bytes = await trio.to_thread.run_sync(memory.look)
        await tracer.run(grace.wait, HostPid(pid))
        return left_bytes
    await trio.to_thread.run_sync(_prepare_tracking, pid)
    sleepers = Sleepers()
    await tracer.run(lambda: sleepers.look(freeze.walk(HostPid(pid))))
    async with _frozen(tracer, pid) as tree:
        return await tracer.run(_look_at, tree, sleepers, memory)


def _look_at(tree: FrozenTree, sleepers: Sleepers, memory: LiveMemory) -> int:
    """`LiveMemory.look` at a stopped tree, in which nobody's time to wait begins anew."""
    sleepers.prepare_all(tree.tids())
    return memory.look()


async def warm(pool: BufferPool, pid: int) -> None:
    """Touch the buffers that the memory of the tree below `pid` goes through, before it stands still."""
    await pool.warm(await trio.to_thread.run_sync(_added_up, HostPid(pid), procfs.resident_bytes))


async def private_bytes(pid: int) -> int:
    """About how much private memory the tree below `pid` has; what its processes share counts once."""
    return await trio.to_thread.run_sync(_added_up, HostPid(pid), smaps.anonymous_share)


def _added_up(root: HostPid, bytes_of: Callable[[HostPid], int]) -> int:
    """Over all processes of a tree that runs, as far as they can be asked."""
    found = 0
    for pid in freeze.walk(root):
        with suppress(OSError, procfs.ProcessGone):
            found += bytes_of(pid)
    return found


def _make_room_for_descriptors(root: HostPid) -> None:
    """Once, before the tree stands still; for what can be seen of it from here."""
    count = 0
    for pid in freeze.walk(root):
        with suppress(OSError):
            count += len(procfs.list_dir(pid, "fd"))
    descriptor_table.make_room(count)


@asynccontextmanager
async def _frozen(tracer: Tracer, pid: int) -> AsyncIterator[FrozenTree]:
    tree = await tracer.run(freeze.freeze, HostPid(pid), is_privileged())
    try:
        yield tree
    finally:
        with trio.CancelScope(shield=True):
            await tracer.run(freeze.release, tree)


@asynccontextmanager
async def _doors_closed(
    tracer: Tracer, pid: int, externals: Externals | None, policy: DumpPolicy | None
) -> AsyncIterator[None]:
    """Nobody new connects to the tree, which goes on to run: another try would meet the next one who waits."""
    doors = Doors()

    def close() -> None:
        with (
            freeze.stopped_for_a_look(HostPid(pid), is_privileged()) as tree,
            Capture(tree.pids(), tree.zombies(), externals=externals, policy=policy) as capture,
        ):
            capture.files.collect(capture.living, still=False)
            doors.close(capture.files)

    try:
        with suppress(PipelineError, procfs.ProcessGone, OSError):  # then it is tried without
            await tracer.run(close)
            await tracer.run(doors.wait)
        yield
    finally:
        with trio.CancelScope(shield=True):
            await tracer.run(doors.open)


@asynccontextmanager
async def _told_of_the_killed(tracer: Tracer, tree: FrozenTree) -> AsyncIterator[None]:
    """What fails in the block because somebody has killed a process of the tree is a TargetError that says so."""
    try:
        with ungrouped():
            yield
    except OSError as error:
        with trio.CancelScope(shield=True):
            gone = await tracer.run(freeze.killed, tree)
        if not gone:
            raise
        raise TargetError(
            f"pid {gone[0]} was killed while it stood still; what is left of the tree runs on"
        ) from error


@asynccontextmanager
async def _outliving() -> AsyncIterator[Outliving]:
    outliving = Outliving()
    try:
        yield outliving
    finally:
        if not outliving.is_empty:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(outliving.close)


@asynccontextmanager
async def _holding(tracer: Tracer, image: str) -> AsyncIterator[Held]:
    held = Held(image)
    try:
        yield held
    finally:
        if not held.is_empty:
            with trio.CancelScope(shield=True):
                await tracer.run(held.close)


@asynccontextmanager
async def _captured(
    tracer: Tracer,
    tree: FrozenTree,
    sleepers: Sleepers,
    externals: Externals | None,
    policy: DumpPolicy | None,
    held: Held,
    known: Beforehand,
    looks: Looks | None,
) -> AsyncIterator[tuple[Capture, CapturedRecords, Sequence[PageSource]]]:
    capture, records, sources = await tracer.run(
        _capture, tree, sleepers, externals, policy, held, known, looks
    )
    try:
        yield capture, records, sources
    finally:
        with trio.CancelScope(shield=True):
            await tracer.run(capture.close)


def _capture(
    tree: FrozenTree,
    sleepers: Sleepers,
    externals: Externals | None,
    policy: DumpPolicy | None,
    held: Held,
    known: Beforehand,
    looks: Looks | None,
) -> tuple[Capture, CapturedRecords, Sequence[PageSource]]:
    """In the tracer's thread; whoever gets the capture closes it there."""
    with ExitStack() as stack:
        try:
            capture = Capture(tree.pids(), tree.zombies(), sleepers, externals, policy, held, known, looks)
            stack.callback(capture.close)
            records, sources, blockers = capture.take(tree)
        except (OSError, TargetError) as error:
            if gone := list(freeze.check_killed(tree)):
                raise Refused(gone) from error
            raise
        blockers += freeze.check_killed(tree)
        if blockers:
            raise Refused(blockers)
        stack.pop_all()
    return capture, records, sources
