"""The memory-stream stage: pages out of a stopped tree, in large runs, in the order of the plan.

One copy is made of a page on this side: out of the target into a pooled buffer, by
process_vm_readv in a worker thread, while other buffers are on their way out. The pool
bounds the memory, however large the tree is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from pipeline.ids import HostPid, LocalFd
from pipeline.image.frames import PageRun
from pipeline.kernel.pagemap import Range, total_bytes
from pipeline.progress import Progress
from pipeline.resources.memory.objects import SharedObject
from pipeline.resources.memory.pages import (
    ProcessMemory,
    Segment,
    data_runs,
    pieces,
    read_file_runs,
    read_shared,
    shared_bytes,
)
from pipeline.transport.buffers import BufferPool, LeasedRun

#: bytes of one page run, and how many of them may be on their way at once
BUFFER_BYTES = 4 << 20
BUFFERS = 6


@dataclass(frozen=True, slots=True)
class ProcessPages:
    """Private pages of a process: `runs` are [start, end) addresses."""

    space: int
    pid: HostPid
    runs: Sequence[Range]


@dataclass(frozen=True, slots=True)
class SharedPages:
    """The data of a shared memory object."""

    space: int
    shared: SharedObject


@dataclass(frozen=True, slots=True)
class FilePages:
    """The data of a file without a name; `fd` is an open file description of our own."""

    space: int
    fd: LocalFd
    size_bytes: int


PageSource = ProcessPages | SharedPages | FilePages

#: Fills a buffer and says what is in it: segments, bytes. Runs in a worker thread.
_Fill = Callable[[memoryview], tuple[Sequence[Segment], int]]


def page_bytes(sources: Sequence[PageSource]) -> int:
    """An upper bound of what will be streamed, in bytes."""
    total = 0
    for source in sources:
        match source:
            case ProcessPages(_, _, runs):
                total += total_bytes(runs)
            case SharedPages(_, shared):
                total += shared_bytes(shared)
            case FilePages(_, fd, size):
                total += total_bytes(data_runs(fd, size))
    return total


async def stream_memory(
    sources: Sequence[PageSource],
    send: trio.MemorySendChannel[LeasedRun],
    pool: BufferPool,
    progress: Progress,
) -> None:
    """Read every page of the sources and send it on as page runs; closes `send` at the end.

    Ownership: whoever receives a run releases its lease. Cancellation: at any send; the lease in hand is
    released, the worker thread ends with its current read.
    """
    total = await trio.to_thread.run_sync(page_bytes, sources)
    done = 0

    async def emit(space: int, fill: _Fill) -> None:
        nonlocal done
        lease = await pool.lease()
        try:
            segments, count = await trio.to_thread.run_sync(fill, lease.view)
            if count:
                await send.send(LeasedRun(PageRun(space, tuple(segments), lease.view[:count]), lease))
                done += count
                progress.advance(done, total)
                return
        except BaseException:
            lease.release()
            raise
        lease.release()

    async with send:
        for source in sources:
            match source:
                case ProcessPages(space, pid, runs):
                    with ProcessMemory(pid) as memory:
                        for piece in pieces(runs, pool.size_bytes):
                            await emit(space, _reading(memory, piece))
                case FilePages(space, fd, size):
                    for piece in pieces(data_runs(fd, size), pool.size_bytes):
                        await emit(space, _reading_file(fd, piece))
                case SharedPages(space, shared) if shared.fd is not None:
                    for piece in pieces(data_runs(shared.fd, shared.record.size_bytes), pool.size_bytes):
                        await emit(space, _reading_file(shared.fd, piece))
                case SharedPages(space, shared):
                    scratch = bytearray(pool.size_bytes)
                    for segments, count in read_shared(shared, scratch):
                        await emit(space, _copying(scratch, segments, count))


def _reading(memory: ProcessMemory, piece: Sequence[Segment]) -> _Fill:
    return lambda view: (piece, memory.read(piece, view))


def _reading_file(fd: LocalFd, piece: Sequence[Segment]) -> _Fill:
    runs = [(offset, offset + length) for offset, length in piece]

    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        return next(read_file_runs(fd, runs, view))

    return fill


def _copying(scratch: bytearray, segments: Sequence[Segment], count: int) -> _Fill:
    def fill(view: memoryview) -> tuple[Sequence[Segment], int]:
        view[:count] = scratch[:count]
        return segments, count

    return fill
