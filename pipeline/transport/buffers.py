"""A bounded pool of large buffers: the only memory that pages of a tree take in this process."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from pipeline.image.frames import PageRun
from pipeline.ledger import LEDGER


class Lease:
    """A buffer of the pool, until `release`."""

    def __init__(self, pool: BufferPool, buffer: bytearray) -> None:
        self._pool = pool
        self._buffer: bytearray | None = buffer
        self.view = memoryview(buffer)
        LEDGER.take("buffer", id(buffer))

    def release(self) -> None:
        """Give the buffer back; nothing may use `view` after this. Idempotent."""
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            LEDGER.give_back("buffer", id(buffer))
            self._pool._take_back(buffer)


class BufferPool:
    """`count` buffers of `size_bytes`, allocated when first wanted.

    Args:
        count: how many there are at the most; whoever wants one more waits.
        size_bytes: of each.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: list[bytearray] = []
        self._room = trio.Semaphore(count)

    async def lease(self) -> Lease:
        """A free buffer, as soon as there is one."""
        await self._room.acquire()
        return Lease(self, self._free.pop() if self._free else bytearray(self.size_bytes))

    def _take_back(self, buffer: bytearray) -> None:
        self._free.append(buffer)
        self._room.release()


@dataclass(frozen=True, slots=True)
class LeasedRun:
    """Pages on their way; whoever gets it releases the lease when the payload is no longer needed."""

    run: PageRun
    lease: Lease
