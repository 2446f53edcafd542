"""A bounded pool of large buffers: the only memory that pages of a tree take in this process.

They are mappings, which nobody touches before pages are read into them: a bytearray is filled with zeros first. What
the kernel does at the first touch takes 1 ms for 4 MiB, and 13 ms in a virtual machine that has given free memory back
to its host; so buffers are used that were used before, and `BufferPool.warm` touches them before a tree stands still.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import msgspec
import trio

from pipeline.image.frames import PageRun
from pipeline.kernel.syscalls import populate
from pipeline.ledger import LEDGER

#: for pages that go out of this process
BUFFER_BYTES = 4 << 20
BUFFERS = 6

T = TypeVar("T")


class _Shared:
    """A buffer of which parts are lent, one behind the other; it is free again when all of them are given back."""

    def __init__(self, pool: BufferPool, buffer: mmap.mmap) -> None:
        self._pool = pool
        self._buffer = buffer
        self._lent_bytes = 0
        self._users = 0
        LEDGER.take("buffer", id(buffer))

    def has(self, size_bytes: int) -> bool:
        """Whether so much of it is not lent yet."""
        return self._users > 0 and self._lent_bytes + size_bytes <= len(self._buffer)

    def lend(self, size_bytes: int) -> Lease:
        """The next part of it."""
        start, self._lent_bytes = (
            self._lent_bytes,
            self._lent_bytes + size_bytes + -size_bytes % mmap.PAGESIZE,
        )
        self._users += 1
        return Lease(memoryview(self._buffer)[start : start + size_bytes], self._give_back)

    def _give_back(self) -> None:
        self._users -= 1
        if not self._users:
            LEDGER.give_back("buffer", id(self._buffer))
            self._pool._take_back(self, self._buffer)


class Lease:
    """A buffer of the pool, or a part of one, until `release`."""

    def __init__(self, view: memoryview, give_back: Callable[[], object]) -> None:
        self.view = view
        self._give_back: Callable[[], object] | None = give_back

    def release(self) -> None:
        """Give it back; nothing may use `view` after this. Idempotent."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            give_back()


class BufferPool:
    """`count` buffers of `size_bytes`, allocated when first wanted.

    Args:
        count: how many there are at the most; whoever wants one more waits.
        size_bytes: of each.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        self.count = count
        self.size_bytes = size_bytes
        self._free: list[mmap.mmap] = []
        self._room = trio.Semaphore(count)
        #: parts of it may be lent
        self._shared: _Shared | None = None
        #: called when somebody has to wait for a buffer
        self.on_shortage: Callable[[], object] = lambda: None

    async def lease(self) -> Lease:
        """A free buffer, as soon as there is one."""
        return (await self._free_one()).lend(self.size_bytes)

    async def lease_part(self, size_bytes: int) -> Lease:
        """Room for so many bytes, as soon as there is: a part of a buffer of which others have parts."""
        if self._shared is None or not self._shared.has(size_bytes):
            self._shared = await self._free_one()
        return self._shared.lend(size_bytes)

    async def _free_one(self) -> _Shared:
        if not self._room.value:
            self.on_shortage()
        await self._room.acquire()
        return _Shared(self, self._free.pop() if self._free else _mapped(self.size_bytes))

    async def warm(self, size_bytes: int) -> None:
        """Touch as many buffers as `size_bytes` fill, so that whoever uses them later does not wait for the kernel."""
        leases: list[Lease] = []

        async def touch(lease: Lease) -> None:
            with suppress(OSError):  # this kernel cannot: then they are touched when they are used
                await trio.to_thread.run_sync(populate, lease.view)

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(self.count, -(-size_bytes // self.size_bytes))):
                    leases.append(await self.lease())
                    nursery.start_soon(touch, leases[-1])
        finally:
            for lease in leases:
                lease.release()

    def _take_back(self, shared: _Shared, buffer: mmap.mmap) -> None:
        if self._shared is shared:
            self._shared = None  # a circle would keep all of the pool until it is searched for
        self._free.append(buffer)
        self._room.release()


def _mapped(size_bytes: int) -> mmap.mmap:
    buffer = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # EINVAL: the kernel has no huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def left_in(channel: trio.MemoryReceiveChannel[T]) -> Iterator[T]:
    """What is still in a channel that nobody reads any more, to be given back."""
    with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
        while True:
            yield channel.receive_nowait()


class LeasedRun(msgspec.Struct, frozen=True):
    """Pages on their way; whoever gets it releases the lease when the payload is no longer needed."""

    run: PageRun
    lease: Lease
