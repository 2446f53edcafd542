"""Work on bytes, in a worker thread or at once: whichever is over sooner.

To hand work to a thread, and to be woken again, takes 0.1-0.3 ms; so long it takes to copy some hundred pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import trio

T = TypeVar("T")

#: what takes longer than to hand it over
LARGE_BYTES = 256 << 10


async def worked(size_bytes: int, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)`, which touches so many bytes that are there: it waits for nothing but memory.

    Cancellation: a checkpoint where it is handed over; work that has begun goes to its end.
    """
    if size_bytes >= LARGE_BYTES:
        return await trio.to_thread.run_sync(work, *args)
    return work(*args)
