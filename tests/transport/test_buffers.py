"""Buffers that pages go through: their memory is there before a tree stands still, and stays the same."""

from __future__ import annotations

import ctypes
import os
import weakref

import trio
import trio.testing

from pipeline.ids import HostPid
from pipeline.kernel import pagemap
from pipeline.ledger import LEDGER
from pipeline.transport.buffers import BUFFER_BYTES, BufferPool, Lease
from pipeline.transport.framing import FrameWriter
from pipeline.transport.spread import SpreadWriter
from tests.harness.made_images import Memory

SIZE = 1 << 20


def touched_bytes(lease: Lease) -> int:
    """How much of a buffer has memory behind it."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(lease.view))
    fd = pagemap.open_pagemap(HostPid(os.getpid()))
    try:
        return pagemap.total_bytes(pagemap.populated(fd, [(start, start + len(lease.view))]).pages)
    finally:
        os.close(fd)


async def lent(pool: BufferPool) -> list[int]:
    """How much of each buffer has memory, all of them lent at once."""
    leases = [await pool.lease() for _ in range(pool.count)]
    found = [touched_bytes(lease) for lease in leases]
    for lease in leases:
        lease.release()
    return found


async def test_warm_touches_as_many_buffers_as_are_needed():
    pool = BufferPool(3, SIZE)
    held = LEDGER.held()
    await pool.warm(SIZE + 1)
    assert LEDGER.held() == held
    assert sorted(await lent(pool)) == [0, SIZE, SIZE]
    await pool.warm(100 * SIZE)
    assert await lent(pool) == [SIZE] * 3


async def test_the_buffer_that_was_used_last_is_used_first():
    pool = BufferPool(2, SIZE)
    early, late = await pool.lease(), await pool.lease()
    late.view[:] = bytes(SIZE)
    early.release()
    late.release()
    for _ in range(3):
        lease = await pool.lease()
        assert touched_bytes(lease) == SIZE
        lease.release()


async def test_who_waits_for_a_buffer_gets_it_behind_warm():
    pool = BufferPool(1, SIZE)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.warm, SIZE)
            await trio.testing.wait_all_tasks_blocked()
            (await pool.lease()).release()


async def test_all_connections_of_a_migration_have_the_same_buffers():
    first, other = FrameWriter(Memory()), FrameWriter(Memory())
    assert first.pool.size_bytes == BUFFER_BYTES
    assert SpreadWriter(first, [other]).pool is first.pool


async def test_small_parts_share_a_buffer_that_is_free_when_all_are_given_back():
    pool = BufferPool(2, SIZE)
    held = LEDGER.held()
    first, second = await pool.lease_part(SIZE // 2), await pool.lease_part(SIZE // 4)
    first.view[:] = b"1" * (SIZE // 2)
    second.view[:] = b"2" * (SIZE // 4)
    assert bytes(first.view) == b"1" * (SIZE // 2)
    whole = await pool.lease()  # there is another one
    first.release()
    first.release()
    with trio.move_on_after(0.01) as no_room:
        await pool.lease()
    assert no_room.cancelled_caught
    third = await pool.lease_part(SIZE // 4 - 4096)  # behind the second: the first is not lent again
    third.view[:] = b"3" * len(third.view)
    assert bytes(second.view) == b"2" * (SIZE // 4)
    second.release()
    third.release()
    (await pool.lease_part(1)).release()
    whole.release()
    assert LEDGER.held() == held


async def test_parts_that_do_not_fit_into_one_buffer_take_another():
    pool = BufferPool(2, SIZE)
    shortages: list[int] = []
    pool.on_shortage = lambda: shortages.append(1)
    one, other = await pool.lease_part(SIZE - 4096), await pool.lease_part(5000)
    assert not shortages
    with trio.move_on_after(0.01):
        await pool.lease_part(SIZE)
    assert shortages == [1]
    one.release()
    other.release()


async def test_the_memory_of_a_pool_goes_with_it():
    """Not when circles are searched for some day: who dumps again and again would have many of them."""
    pool = BufferPool(2, SIZE)
    lease = await pool.lease_part(10)
    buffer = weakref.ref(lease.view.obj)
    lease.release()
    del lease, pool
    assert buffer() is None
