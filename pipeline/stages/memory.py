"""The memory-stream stage: pages out of a stopped tree, in large runs, in the order of the plan.

One copy is made of a page on this side: out of the target into a pooled buffer, by
process_vm_readv in a worker thread, which makes a frame of it at once, while others do so too and other buffers are
on their way out. The pool bounds the memory, however large the tree is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice

import msgspec
import trio

from pipeline.errors import TargetError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.frames import PageRun
from pipeline.image.packing import PackedRun
from pipeline.kernel.pagemap import Range, total_bytes, union
from pipeline.kernel.procfs import ProcessGone, is_exiting
from pipeline.progress import Progress
from pipeline.resources.memory.objects import SharedObject, Window
from pipeline.resources.memory.pages import (
    ProcessMemory,
    Segment,
    cover,
    data_runs,
    pieces,
    read_segments,
    read_shared,
    shared_bytes,
)
from pipeline.stages.abreast import abreast
from pipeline.stages.sent import Fill, LastSent, Sent
from pipeline.transport.buffers import BufferPool, Lease
from pipeline.transport.handover import worked

#: chunks of shared memory that are looked at in one go for what has changed; some 5 ms
_LOOKED_AT = 32
#: so many read a memory that stands still at once, and compress what they have read
_READERS = min(4, len(os.sched_getaffinity(0)))
#: up to so many bytes share a buffer with others: many processes have some last pages each
_SMALL_BYTES = 512 << 10


class ProcessPages(msgspec.Struct, frozen=True):
    """Private pages of a process: `runs` are [start, end) addresses.

    `untouched`: among others those of them that were not written since the writes to them were tracked last. `last`:
    what is as it was sent is not sent again.
    """

    space: int
    pid: HostPid
    runs: Sequence[Range]
    untouched: Sequence[Range] = ()
    last: LastSent | None = None


class LivePages(msgspec.Struct, frozen=True):
    """Private pages of a process that runs; what cannot be read any more is added to `missed`.

    `more`: asked when all that comes before is read, for further runs. `last`: see `ProcessPages`.
    """

    space: int
    pid: HostPid
    runs: Sequence[Range]
    missed: list[Range]
    more: Callable[[], Sequence[Range]] = tuple
    last: LastSent | None = None


class SharedPages(msgspec.Struct, frozen=True):
    """The data of a shared memory object; with `sent`, what has changed of it since.

    `written`: offsets of what may have changed, where that is known.
    """

    space: int
    shared: SharedObject
    sent: Sent | None = None
    written: Sequence[Range] | None = None


class FilePages(msgspec.Struct, frozen=True):
    """The data of a file without a name; with `sent`, what has changed of it since.

    `fd` is an open file description of our own. `early`: a namespace is made with it, before there are processes.
    """

    space: int
    fd: LocalFd
    size_bytes: int
    sent: Sent | None = None
    early: bool = False


PageSource = ProcessPages | LivePages | SharedPages | FilePages


def page_bytes(sources: Sequence[PageSource]) -> int:
    """An upper bound of what will be streamed, in bytes."""
    total = 0
    for source in sources:
        match source:
            case ProcessPages(runs=runs) | LivePages(runs=runs):
                total += total_bytes(runs)
            case SharedPages(written=runs) if runs is not None:
                total += total_bytes(runs)
            case SharedPages(shared=shared):
                total += shared_bytes(shared)
            case FilePages(_, fd, size, _, _):
                total += total_bytes(data_runs(fd, size))
    return total


async def stream_memory(
    sources: Sequence[PageSource],
    send: trio.MemorySendChannel[tuple[PackedRun, Lease]],
    pool: BufferPool,
    pack: Callable[[PageRun], PackedRun],
    progress: Progress,
) -> None:
    """Read every page of the sources, and send it on as frames; closes `send` at the end.

    Args:
        pack: makes a frame of a page run, in a worker thread.

    Ownership: whoever receives a frame releases its lease. Cancellation: at any send; the lease in hand is
    released, the worker thread ends with its current read.
    """
    if all(isinstance(source, ProcessPages | LivePages) for source in sources):
        total = page_bytes(sources)
    else:
        total = await trio.to_thread.run_sync(page_bytes, sources)
    done = 0

    async def emit_news(space: int, fills: Iterator[Fill]) -> None:
        async def emit_left() -> None:
            while some := list(islice(fills, _LOOKED_AT)):
                left = iter(some)
                for first in left:
                    await emit(space, _together(chain([first], left)))

        await abreast(_READERS, emit_left)

    async def emit(space: int, fill: Fill, size_bytes: int = pool.size_bytes) -> None:
        """`size_bytes`: of memory that stands still, where there is less of it than a buffer takes."""
        nonlocal done
        lease = await (pool.lease() if size_bytes > _SMALL_BYTES else pool.lease_part(size_bytes))

        def read() -> tuple[int, PackedRun | None]:
            segments, count = fill(lease.view)
            return count, pack(PageRun(space, tuple(segments), lease.view[:count])) if count else None

        try:
            count, packed = await worked(size_bytes, read)
            if packed is not None:
                await send.send((packed, lease))
                done += count
                progress.advance(done, total)
                return
        except BaseException:
            lease.release()
            raise
        lease.release()

    async def emit_all(
        space: int, wanted: Iterable[Sequence[Segment]], reading: Callable[[Sequence[Segment]], Fill]
    ) -> None:
        """`emit` what reads each piece, several at once: in no order."""
        rest = iter(wanted)
        firsts = list(islice(rest, 2))
        left = chain(firsts, rest)

        async def emit_left() -> None:
            for piece in left:
                await emit(space, reading(piece), sum(length for _, length in piece))

        await (abreast(_READERS, emit_left) if len(firsts) == 2 else emit_left())

    async with send:
        for source in sources:
            match source:
                case ProcessPages(space, pid, runs, last=last):
                    with _told_if_killed(pid), ProcessMemory(pid) as memory:
                        await emit_all(space, pieces(runs, pool.size_bytes), partial(_reading, memory, last))
                case LivePages(space, pid, runs, missed, more, last):
                    runs = union(runs, await trio.to_thread.run_sync(more))
                    try:
                        memory = ProcessMemory(pid)
                    except ProcessGone:
                        missed += runs
                        continue
                    with memory:
                        wanted = pieces(runs, pool.size_bytes)
                        if last is None:
                            await emit_all(space, wanted, partial(_reading_live, memory, missed, last))
                            continue
                        for piece in wanted:  # who compares them does so with one at a time
                            await emit(space, _reading_live(memory, missed, last, piece))
                case FilePages(space, fd, size, Sent() as sent):
                    await emit_news(space, _news_of_file(fd, size, sent))
                case SharedPages(space, shared, Sent() as sent, written) if written is not None:
                    assert shared.fd is not None
                    wanted = sent.written_pieces(written, pool.size_bytes)
                    read = partial(read_segments, shared.fd)
                    await emit_all(space, wanted, partial(sent.reading_written, read=read))
                case SharedPages(space, shared, Sent() as sent):
                    await emit_news(space, _news(shared, sent))
                case FilePages(space, fd, size):
                    wanted = pieces(data_runs(fd, size), pool.size_bytes)
                    await emit_all(space, wanted, partial(_reading_file, fd))
                case SharedPages(space, shared) if shared.fd is not None:
                    wanted = pieces(data_runs(shared.fd, shared.record.size_bytes), pool.size_bytes)
                    await emit_all(space, wanted, partial(_reading_file, shared.fd))
                case SharedPages(space, shared):
                    scratch = bytearray(pool.size_bytes)
                    for segments, count in read_shared(shared, scratch):
                        await emit(space, _copying(scratch, segments, count))


@contextmanager
def _told_if_killed(pid: HostPid) -> Iterator[None]:
    """TargetError: what fails in the block fails because the process, which stands still, was killed."""
    try:
        yield
    except OSError as error:
        if not is_exiting(pid):
            raise
        raise TargetError(
            f"pid {pid} was killed while its memory was read; the rest of the tree runs on"
        ) from error


def _reading(memory: ProcessMemory, last: LastSent | None, piece: Sequence[Segment]) -> Fill:
    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        count = memory.read(piece, view)
        return (piece, count) if last is None else last.news(piece, view, is_last=True)

    return fill


def _reading_live(
    memory: ProcessMemory, missed: list[Range], last: LastSent | None, piece: Sequence[Segment]
) -> Fill:
    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        segments, count = read(view)
        return (segments, count) if last is None else last.news(segments, view)

    def read(view: memoryview) -> tuple[Sequence[Segment], int]:
        try:
            return piece, memory.read(piece, view)
        except OSError:
            pass  # something of it was unmapped meanwhile: run by run
        segments: list[Segment] = []
        done = 0
        for start, length in piece:
            try:
                done += memory.read([(start, length)], view[done : done + length])
                segments.append((start, length))
            except OSError:
                missed.append((start, start + length))
        return segments, done

    return fill


def _together(fills: Iterator[Fill]) -> Fill:
    """What these have to send, of one chunk each, as far as there is room; the rest of `fills` is left.

    A segment has a page at least, so that they are no more than a frame may have.
    """

    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        found: list[Segment] = []
        done = 0
        for one in fills:
            segments, count = one(view[done:])
            found += segments
            done += count
            if len(view) - done < Sent.CHUNK_BYTES:
                break
        return found, done

    return fill


def _news_of_file(fd: LocalFd, size_bytes: int, sent: Sent) -> Iterator[Fill]:
    """What reads the chunks of a file that were not sent as they are."""
    for offset, data in sent.chunks(data_runs(fd, size_bytes), size_bytes):
        yield sent.reading(offset, data, partial(read_segments, fd))


def _news(shared: SharedObject, sent: Sent) -> Iterator[Fill]:
    """What reads the chunks of a shared object that were not sent as they are."""
    if shared.fd is not None:
        yield from _news_of_file(shared.fd, shared.record.size_bytes, sent)
        return
    for window, (start, end) in cover(shared.windows):
        for (chunk,) in pieces([(start, end)], sent.CHUNK_BYTES):
            offset, length = chunk
            yield sent.reading(offset, [(offset, offset + length)], partial(_read_window, window))


def _read_window(window: Window, wanted: Sequence[Segment], view: memoryview) -> int:
    shift = window.start - window.offset
    with ProcessMemory(window.pid) as memory:
        return memory.read([(offset + shift, length) for offset, length in wanted], view)


def _reading_file(fd: LocalFd, piece: Sequence[Segment]) -> Fill:
    return lambda view: (piece, read_segments(fd, piece, view))


def _copying(scratch: bytearray, segments: Sequence[Segment], count: int) -> Fill:
    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        view[:count] = scratch[:count]
        return segments, count

    return fill
