"""Dumping: a tree that runs becomes an image, and then ends, runs on, or stays stopped.

::

    check ─ freeze ─ capture ─┬─ namespace-translate ─┬─ write ─ (end the tree)
                              └─ memory-stream ───────┘

What is refused is refused before anything is touched. From the freeze to the end of
the recipe, every failure and every cancellation leads to the tree running on as it
was; only a complete and synced image lets it end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import trio
from msgspec import Struct

from pipeline.errors import Blocker, Refused, ungrouped
from pipeline.ids import HostPid
from pipeline.image.schema import FORMAT_VERSION, Record
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import Tracer, tracer_thread
from pipeline.resources.tasks.interrupted import Sleepers
from pipeline.stages import freeze
from pipeline.stages.capture import Capture
from pipeline.stages.examine import tree_blockers
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.memory import BUFFER_BYTES, BUFFERS, PageSource, stream_memory
from pipeline.stages.translate import into_forest
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameWriter
from pipeline.transport.storage import IMAGE, MANIFEST, Storage
from pipeline.userns.cradle import is_privileged
from pipeline.userns.forest import Forest

Leave = Literal["end", "running", "stopped"]
#: a blocker that may go away by itself (a connection in flight) is looked at again this often
_TRANSIENT_TRIES = 5
_TRANSIENT_PAUSE_S = 0.2

CapturedRecords = Sequence[tuple[Record, Record | None]]


class DumpResult(Struct, frozen=True):
    """What a dump did. `figures`: times in milliseconds, sizes in bytes, by QMP's names."""

    root_pid: int
    processes: int
    figures: dict[str, float]


@asynccontextmanager
async def frozen(tracer: Tracer, pid: int) -> AsyncIterator[FrozenTree]:
    """The tree below `pid`, stopped inside the block; runs on after it, unless it was ended or held."""
    tree = await tracer.run(freeze.freeze, HostPid(pid), is_privileged())
    try:
        yield tree
    finally:
        with trio.CancelScope(shield=True):
            await tracer.run(freeze.release, tree)


@asynccontextmanager
async def captured(
    tracer: Tracer, tree: FrozenTree, sleepers: Sleepers
) -> AsyncIterator[tuple[Capture, CapturedRecords, Sequence[PageSource]]]:
    """Everything about the frozen tree.

    Raises:
        Refused: something that only showed now stops it.
    """
    capture = await tracer.run(_open_capture, tree, sleepers)
    try:
        records, sources, blockers = await tracer.run(capture.take, tree)
        if blockers:
            raise Refused(blockers)
        yield capture, records, sources
    finally:
        with trio.CancelScope(shield=True):
            await tracer.run(capture.__exit__, None, None, None)


def _open_capture(tree: FrozenTree, sleepers: Sleepers) -> Capture:
    return Capture(tree.pids(), [p.pid for p in tree.processes.values() if p.zombie], sleepers)


async def looked_at_sleepers(tracer: Tracer, pid: int) -> Sleepers:
    """How long the tasks of a running tree have slept: asked before they are woken by the freeze."""
    sleepers = Sleepers()
    await tracer.run(lambda: sleepers.look(freeze.walk(HostPid(pid))))
    return sleepers


async def refuse_early(pid: int) -> None:
    """Raise Refused with everything that stops the tree, all of it at once; nothing is touched.

    A blocker that may go away by itself is waited for, a little.
    """
    for attempt in range(_TRANSIENT_TRIES):
        blockers: Sequence[Blocker] = await trio.to_thread.run_sync(lambda: list(tree_blockers(pid)))
        if not blockers:
            return
        if attempt == _TRANSIENT_TRIES - 1 or not all(blocker.transient for blocker in blockers):
            raise Refused(blockers)
        await trio.sleep(_TRANSIENT_PAUSE_S)


async def write_image(
    writer: FrameWriter,
    records: CapturedRecords,
    sources: Sequence[PageSource],
    forest: Forest,
    progress: Progress,
) -> int:
    """Run the stages that carry a captured tree to `writer`; returns the bytes of pages.

    Records first, so that the other side can begin to build; then pages as they are read; then the end.
    """
    pool = BufferPool(BUFFERS, BUFFER_BYTES)
    page_bytes = 0
    count = 0
    with ungrouped():
        async with trio.open_nursery() as nursery:
            record_send, record_receive = trio.open_memory_channel[Record](64)
            page_send, page_receive = trio.open_memory_channel[LeasedRun](BUFFERS)
            nursery.start_soon(translate_records, records, forest, record_send)
            nursery.start_soon(stream_memory, sources, page_send, pool, progress)
            try:
                async for record in record_receive:
                    await writer.record(record)
                    count += 1
                async for leased in page_receive:
                    try:
                        await writer.pages(leased.run)
                        page_bytes += len(leased.run.payload)
                    finally:
                        leased.lease.release()
            finally:
                while True:  # what is still in the channel when we are cancelled
                    try:
                        page_receive.receive_nowait().lease.release()
                    except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                        break
    await writer.end(count, page_bytes)
    return page_bytes


class Manifest(Struct, frozen=True):
    """What stands beside a complete image."""

    format: int
    image_bytes: int
    page_bytes: int


async def _store(
    storage: Storage,
    records: CapturedRecords,
    sources: Sequence[PageSource],
    forest: Forest,
    progress: Progress,
) -> Manifest:
    """Write the image, then the manifest that says it is complete; neither is left if that fails."""
    try:
        async with storage.create(IMAGE) as sink:
            writer = FrameWriter(sink)
            page_bytes = await write_image(writer, records, sources, forest, progress)
            progress.phase("write")
        manifest = Manifest(FORMAT_VERSION, writer.bytes_written, page_bytes)
        if storage.has_manifest:
            async with storage.create(MANIFEST) as sink:
                await sink.write(msgspec.json.encode(manifest))
    except BaseException:
        with trio.CancelScope(shield=True):
            await storage.discard(IMAGE)
        raise
    return manifest


async def translate_records(
    records: CapturedRecords, forest: Forest, send: trio.MemorySendChannel[Record]
) -> None:
    """The namespace-translate stage: every id of every record moves into the forest."""
    async with send:
        for record, state in records:
            await send.send(into_forest(record, state, forest))


async def dump(pid: int, to: str, *, leave: Leave = "end", progress: Progress | None = None) -> DumpResult:
    """Dump the tree below `pid` to the image `to`.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        to: a directory, a URL, or ``-``.
        leave: what becomes of the tree when the image is complete.
        progress: is told how far it is.

    Raises:
        Refused: the tree cannot be carried; nothing was touched.
        PipelineError: it failed; the tree runs on.

    Cancellation: the tree runs on, and no image is left.
    """
    from pipeline.transport.storage import open_storage

    progress = progress or NullProgress()
    begin = time.monotonic()
    storage = open_storage(to)
    await storage.require_free()
    progress.phase("setup")
    await refuse_early(pid)
    async with tracer_thread() as tracer:
        progress.phase("freeze")
        sleepers = await looked_at_sleepers(tracer, pid)
        freeze_begin = time.monotonic()
        async with frozen(tracer, pid) as tree:
            async with captured(tracer, tree, sleepers) as (capture, records, sources):
                collected = time.monotonic()
                progress.phase("memory")
                written = await _store(storage, records, sources, capture.forest(), progress)
                injected, processes = capture.injected_calls, len(capture.tree.pids)
            with trio.CancelScope(shield=True):
                if leave == "end":
                    await tracer.run(freeze.end, tree)
                elif leave == "stopped":
                    await tracer.run(freeze.hold_stopped, tree)
        thawed = time.monotonic()
    return DumpResult(
        root_pid=pid,
        processes=processes,
        figures={
            "total-time": 1e3 * (time.monotonic() - begin),
            "setup-time": 1e3 * (freeze_begin - begin),
            "downtime": 1e3 * (thawed - freeze_begin),
            "collect-time": 1e3 * (collected - freeze_begin),
            "transferred": written.image_bytes,
            "page-bytes": written.page_bytes,
            "injected-calls": injected,
        },
    )
