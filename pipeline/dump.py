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
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Literal, TypeVar

import msgspec
import trio
from msgspec import Struct

from pipeline.errors import ungrouped
from pipeline.image.manifest import Manifest
from pipeline.image.packing import Compression, PackedRun, Packer
from pipeline.image.schema import FORMAT_VERSION, Record
from pipeline.policy import DumpPolicy
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import freeze
from pipeline.stages.memory import BUFFER_BYTES, BUFFERS, PageSource, stream_memory
from pipeline.stages.translate import into_forest
from pipeline.standstill import CapturedRecords, refuse_early, standstill
from pipeline.transport.buffers import BufferPool, Lease, LeasedRun
from pipeline.transport.framing import FrameWriter
from pipeline.transport.storage import IMAGE, INDEX, MANIFEST, Storage
from pipeline.userns.externals import Externals
from pipeline.userns.forest import Forest

Leave = Literal["end", "running", "stopped"]
_Item = TypeVar("_Item")


class DumpResult(Struct, frozen=True):
    """What a dump did. `figures`: times in milliseconds, sizes in bytes, by QMP's names. `notes`: what went wrong.

    `compression`: what most of the pages were compressed with.
    `external_ends`: names of the ends outside of the tree, which a restore is to be given.
    """

    root_pid: int
    processes: int
    figures: dict[str, float]
    notes: list[str] = []
    external_ends: list[str] = []
    compression: str = "none"


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
    with ungrouped():
        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[Record](64)
            nursery.start_soon(translate_records, records, forest, send)
            return await write_translated(writer, receive, sources, progress)
    raise AssertionError("a nursery swallows nothing")


async def write_translated(
    writer: FrameWriter, records: AsyncIterable[Record], sources: Sequence[PageSource], progress: Progress
) -> int:
    """Records that are translated, the pages of `sources`, and the end; returns the bytes of pages."""
    count = 0

    async def write_records() -> None:
        nonlocal count
        async for record in records:
            await writer.record(record)
            count += 1

    page_bytes = await write_pages(writer, sources, progress, before=write_records)
    await writer.end(count, page_bytes)
    return page_bytes


async def nothing() -> None:
    """Comes before pages that nothing comes before."""


async def write_pages(
    writer: FrameWriter,
    sources: Sequence[PageSource],
    progress: Progress,
    before: Callable[[], Awaitable[None]] = nothing,
) -> int:
    """The pages of `sources`, read while `before` is written and then while others are on their way; their bytes."""
    pool = BufferPool(BUFFERS, BUFFER_BYTES)
    page_bytes = 0
    with ungrouped():
        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[LeasedRun](BUFFERS)
            packed_send, packed_receive = trio.open_memory_channel[tuple[PackedRun, Lease]](1)
            nursery.start_soon(stream_memory, sources, send, pool, progress)
            nursery.start_soon(_pack, writer, receive, packed_send)
            try:
                await before()
                async for packed, lease in packed_receive:
                    page_bytes += packed.page_bytes
                    await writer.packed(packed, lease.release)
            finally:
                _let_go(packed_receive, lambda item: item[1])
    return page_bytes


async def _pack(
    writer: FrameWriter,
    runs: trio.MemoryReceiveChannel[LeasedRun],
    send: trio.MemorySendChannel[tuple[PackedRun, Lease]],
) -> None:
    """Make frames of page runs, while the frame before is written."""
    try:
        async with send:
            async for leased in runs:
                try:
                    await send.send((await writer.pack(leased.run), leased.lease))
                except BaseException:
                    leased.lease.release()
                    raise
    finally:
        _let_go(runs, lambda leased: leased.lease)


def _let_go(channel: trio.MemoryReceiveChannel[_Item], lease_of: Callable[[_Item], Lease]) -> None:
    """Give back what is still in a channel that nobody reads any more."""
    while True:
        try:
            lease_of(channel.receive_nowait()).release()
        except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            break


async def _store(
    storage: Storage,
    records: CapturedRecords,
    sources: Sequence[PageSource],
    forest: Forest,
    progress: Progress,
    packer: Packer,
) -> Manifest:
    """Write the image and its index, then the manifest that says they are complete; none is left if that fails."""
    try:
        async with AsyncExitStack() as stack:
            index = await stack.enter_async_context(storage.create(INDEX)) if storage.has_manifest else None
            sink = await stack.enter_async_context(storage.create(IMAGE))
            writer = FrameWriter(sink, packer, index)
            page_bytes = await write_image(writer, records, sources, forest, progress)
            progress.phase("write")
        # the end of an upload is not cancelled: here is the last moment
        await trio.lowlevel.checkpoint_if_cancelled()
        manifest = Manifest(FORMAT_VERSION, writer.bytes_written, page_bytes, writer.index_bytes)
        if storage.has_manifest:
            async with storage.create(MANIFEST) as sink:
                await sink.write(msgspec.json.encode(manifest))
    except BaseException:
        with trio.CancelScope(shield=True):
            await storage.discard(IMAGE)
            await storage.discard(INDEX)
        raise
    return manifest


async def translate_records(
    records: CapturedRecords, forest: Forest, send: trio.MemorySendChannel[Record]
) -> None:
    """The namespace-translate stage: every id of every record moves into the forest."""
    async with send:
        for record, state in records:
            await send.send(into_forest(record, state, forest))


async def dump(
    pid: int,
    to: str,
    *,
    leave: Leave = "end",
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    compress: Compression = "none",
    progress: Progress | None = None,
) -> DumpResult:
    """Dump the tree below `pid` to the image `to`.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        to: a directory, a URL, or ``-``.
        leave: what becomes of the tree when the image is complete.
        externals: paths of namespaces, by kind, that are external instead of the caller's own.
        policy: decisions about states that have more than one good answer.
        compress: pages with ``lz4``, ``zstd``, not at all, or with what pays (``auto``).
        progress: is told how far it is.

    Raises:
        Refused: the tree cannot be carried; nothing was touched.
        PipelineError: it failed; the tree runs on.

    Cancellation: the tree runs on, and no image is left.
    """
    from pipeline.transport.storage import DirectoryStorage, open_storage

    progress = progress or NullProgress()
    begin = time.monotonic()
    storage = open_storage(to)
    await storage.require_free()
    place = storage.place if isinstance(storage, DirectoryStorage) else ""
    packer = Packer(compress)
    progress.phase("setup")
    await refuse_early(pid, externals, policy)
    async with tracer_thread() as tracer:
        progress.phase("freeze")
        async with standstill(tracer, pid, externals, policy, place) as still:
            progress.phase("memory")
            written = await _store(storage, still.records, still.sources, still.forest, progress, packer)
            await still.let_go_of_files()
            with trio.CancelScope(shield=True):
                if leave == "end":
                    await tracer.run(freeze.end, still.tree)
                    await tracer.run(still.holdings.ended)
                elif leave == "stopped":
                    await tracer.run(freeze.hold_stopped, still.tree)
        thawed = time.monotonic()
    return DumpResult(
        root_pid=pid,
        processes=still.processes,
        external_ends=still.external_ends(),
        figures={
            "total-time": 1e3 * (time.monotonic() - begin),
            "setup-time": 1e3 * (still.begun_s - begin),
            "downtime": 1e3 * (thawed - still.begun_s),
            "collect-time": 1e3 * (still.captured_s - still.begun_s),
            "transferred": written.image_bytes,
            "page-bytes": written.page_bytes,
            "injected-calls": still.injected_calls,
            **packer.figures(),
        },
        compression=packer.chosen(),
        notes=still.holdings.complaints,
    )
