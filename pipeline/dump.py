"""Dumping: a tree that runs becomes an image, and then ends, runs on, or stays stopped.

::

    check ─ freeze ─ capture ─┬─ namespace-translate ─┬─ write ─ (end the tree)
                              └─ memory-stream ───────┘

With ``precopy`` most of the memory is written before the freeze (`pipeline.precopy`).

What is refused is refused before anything is touched. From the freeze to the end of
the recipe, every failure and every cancellation leads to the tree running on as it
was; only a complete and synced image lets it end.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Literal

import trio
from msgspec import Struct

from pipeline.errors import PipelineError, StorageError, UsageError, ungrouped
from pipeline.ids import HostPid
from pipeline.image.packing import Compression, Packer
from pipeline.image.schema import FORMAT_VERSION
from pipeline.interrupts import interruptible
from pipeline.policy import DumpPolicy
from pipeline.precopy import Precopy, Rounds, rounds_pay, stored_before
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import freeze
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.image_place import check_place
from pipeline.stages.write import InOrder, write_image, write_translated
from pipeline.standstill import Standstill, private_bytes, refuse_early, standstill, warm
from pipeline.transport.buffers import BUFFER_BYTES, BUFFERS, BufferPool
from pipeline.transport.framing import FrameWriter
from pipeline.transport.index import indexed
from pipeline.transport.manifest import Manifest, write_manifest
from pipeline.transport.storage import IMAGE, INDEX, MANIFEST, DirectoryStorage, Storage, open_storage
from pipeline.userns.externals import Externals

Leave = Literal["end", "running", "stopped"]
Mode = Literal["stop", "precopy"]


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


async def _store(
    storage: Storage,
    packer: Packer,
    pool: BufferPool,
    progress: Progress,
    way: trio.CancelScope,
    room_bytes: int,
    write: Callable[[FrameWriter], Awaitable[int]],
) -> Manifest:
    """Write the image and its index, then the manifest that says they are complete; none is left if that fails.

    Args:
        storage: where to.
        packer, pool: see `FrameWriter`.
        way: is shielded before the manifest is written: from then on the dump goes to its end.
        room_bytes: about as much will be written while the tree stands still.
        write: writes records and pages, to their end; returns the bytes of pages.
    """
    begun = [IMAGE, INDEX]
    try:
        async with indexed(storage, IMAGE, packer, pool, room_bytes) as writer:
            page_bytes = await write(writer)
            progress.phase("write")
        # the end of an upload is not cancelled: here is the last moment
        await trio.lowlevel.checkpoint_if_cancelled()
        way.shield = True
        manifest = Manifest(FORMAT_VERSION, writer.bytes_written, page_bytes, writer.index_bytes)
        begun.insert(0, MANIFEST)
        await write_manifest(storage, manifest)
    except BaseException:
        with trio.CancelScope(shield=True):
            for name in begun:
                await storage.discard(name)
        raise
    return manifest


@contextmanager
def _remains_told(storage: Storage) -> Iterator[None]:
    """What ends the block says what is left in the storage, which did not let it be removed: a StorageError then."""
    try:
        yield
    except BaseException as error:
        if not storage.remains:
            raise
        why = str(error) if isinstance(error, PipelineError) else "cancelled"
        left = ", ".join(storage.remains)
        raise StorageError(f"{why}; {storage.name} could not be tidied up, and may keep {left}") from error


class _Storing:
    """The image of a tree on its way to where it is stored; `begin` says when the tree stands still.

    `all_read`: it needs the tree no longer. `may_encode`: somebody waits for records to be written, or nobody for the
    interpreter. `complete`: it is stored, and `manifest` says what was.
    """

    def __init__(self, precopy: Precopy | None, progress: Progress, way: trio.CancelScope) -> None:
        self._way = way
        self._still: Standstill | None = None
        self._stands_still = trio.Event()
        self._precopy = precopy
        self._progress = progress
        self.all_read = trio.Event()
        self.complete = trio.Event()
        self.may_encode = trio.Event()
        self.manifest: Manifest | None = None

    def begin(self, still: Standstill) -> None:
        """This is what is stored."""
        self._still = still
        self._stands_still.set()

    async def run(
        self,
        storage: Storage,
        packer: Packer,
        pool: BufferPool,
        room_bytes: int,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Store it, see `_store`; started when there is room made for it."""

        async def write(writer: FrameWriter) -> int:
            task_status.started()
            return await self._write(writer)

        self.manifest = await _store(storage, packer, pool, self._progress, self._way, room_bytes, write)
        if self._precopy is not None:
            self._precopy.keep()
        self.complete.set()

    async def _write(self, writer: FrameWriter) -> int:
        await self._stands_still.wait()
        still, progress, read, turn = self._still, self._progress, self.all_read.set, self.may_encode.wait
        assert still is not None
        writer.pool.on_shortage = self.may_encode.set
        if self._precopy is None:
            return await write_image(
                writer, still.records, still.sources, still.forest, progress, read, turn=turn
            )
        records, sources = await trio.to_thread.run_sync(self._precopy.rest, still)
        return await write_translated(writer, InOrder(records), sources, progress, read, turn=turn)


@interruptible
async def dump(
    pid: int,
    to: str,
    *,
    leave: Leave = "end",
    mode: Mode | None = None,
    max_downtime: float = 0.3,
    max_rounds: int = 30,
    parent: str | None = None,
    digests: bool = False,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    compress: Compression = "none",
    progress: Progress | None = None,
) -> DumpResult:
    """Dump the tree below `pid` to the image `to`.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        to: a directory, a URL, or ``-``.
        leave: what becomes of the tree: ``end`` and ``stopped`` when the image is complete; ``running``: it runs on as
            soon as all of it was read, while the rest is still on its way to where it is stored.
        mode: ``stop``: the tree stands still while its memory is written; ``precopy``: its memory is written in rounds
            while it runs, and it stands still for what is left after them. By default ``precopy``, and ``stop`` for a
            stream, which has no place for rounds, and for a tree of many small processes that goes to a directory.
        max_downtime: how long the tree may stand still after the rounds, in seconds; as far as they can do it.
        max_rounds: how many rounds there may be.
        parent: an earlier image, to whose pages this one refers where they are the same; a restore needs both. Of
            directories, the path from one to the other counts.
        digests: keep a digest of each page, so that a later dump with this one as `parent` need not read it; so does
            a dump with a `parent`.
        externals: paths of namespaces, by kind, that are external instead of the caller's own.
        policy: decisions about states that have more than one good answer.
        compress: pages with ``lz4``, ``zstd``, not at all, or with what pays (``auto``).
        progress: is told how far it is.

    Raises:
        Refused: the tree cannot be carried; nothing was touched.
        PipelineError: it failed; the tree runs on.

    Cancellation, and Ctrl-C: the tree runs on, and no image is left; a dump whose image is complete goes to its end.
    Where a store does not let what was begun be removed, a StorageError takes the place of the cancellation.
    """
    progress = progress or NullProgress()
    begin = time.monotonic()
    storage = open_storage(to)
    if mode is None and not storage.has_manifest:
        mode = "stop"
    if mode == "precopy" and not storage.has_manifest:
        raise UsageError(
            "--mode precopy stores pages before the records, for which a stream has no place: give --to"
        )
    if parent is not None and mode == "stop":
        raise UsageError("--parent compares memory while the tree runs: it needs --mode precopy")
    await storage.require_free()
    place = storage.place if isinstance(storage, DirectoryStorage) else ""
    packer = Packer(compress, digests=digests or parent is not None)
    pool = BufferPool(BUFFERS, BUFFER_BYTES)
    progress.phase("setup")
    async with AsyncExitStack() as before:
        before.enter_context(_remains_told(storage))
        way = before.enter_context(trio.CancelScope())
        known = before.enter_context(Beforehand())
        await refuse_early(pid, externals, policy, known)
        if mode is None:
            # how fast a store is cannot be known
            at_once = place and parent is None and not await rounds_pay(pid)
            mode = "stop" if at_once else "precopy"
        await before.enter_async_context(storage.claimed())
        if place:
            await trio.to_thread.run_sync(lambda: check_place(place, freeze.walk(HostPid(pid))))
        before_s = time.monotonic()
        tracer = await before.enter_async_context(tracer_thread())
        precopy: Precopy | None = None
        room_bytes = 0
        if mode == "precopy":
            rounds = Rounds(max_downtime, max_rounds)
            precopy = await before.enter_async_context(
                stored_before(
                    tracer, pid, storage, packer, pool, rounds, externals, policy, known, parent, progress
                )
            )
        else:
            await warm(pool, pid)
            if place and compress == "none":
                room_bytes = await private_bytes(pid)
        looks = precopy.looks if precopy is not None else None
        with ungrouped():
            async with trio.open_nursery() as nursery:
                storing = _Storing(precopy, progress, way)
                await nursery.start(storing.run, storage, packer, pool, room_bytes)
                progress.phase("freeze")
                async with standstill(tracer, pid, externals, policy, place, looks, known) as still:
                    progress.phase("memory")
                    storing.begin(still)
                    if leave == "running":
                        await storing.all_read.wait()  # records wait, too, as far as pages have room
                        thawed = await tracer.run(still.go_on)
                        storing.may_encode.set()
                        await still.let_go_of_files()
                    else:
                        storing.may_encode.set()
                        await storing.complete.wait()
                        with trio.CancelScope(shield=True):
                            if leave == "end":
                                still.kill()
                                thawed = time.monotonic()
                                await still.let_go_of_files()
                                await tracer.run(still.end)
                            else:
                                await still.let_go_of_files()
                                await tracer.run(freeze.hold_stopped, still.tree)
                                thawed = time.monotonic()
        written = storing.manifest
        assert written is not None
    figures: dict[str, float] = {}
    notes = still.holdings.complaints
    if precopy is not None:
        figures = {"dirty-sync-count": precopy.rounds_done, "draft-time": 1e3 * precopy.draft_s}
        notes = [*precopy.notes, *notes]
    return DumpResult(
        root_pid=pid,
        processes=still.processes,
        external_ends=still.external_ends(),
        figures={
            "total-time": 1e3 * (time.monotonic() - begin),
            "setup-time": 1e3 * (before_s - begin),
            "downtime": 1e3 * (thawed - still.begun_s),
            "collect-time": 1e3 * (still.captured_s - still.begun_s),
            "transferred": written.image_bytes + (precopy.bytes_written if precopy is not None else 0),
            "page-bytes": written.page_bytes + (precopy.page_bytes if precopy is not None else 0),
            "injected-calls": still.injected_calls,
            **packer.figures(),
            **figures,
        },
        compression=packer.chosen(),
        notes=notes,
    )
