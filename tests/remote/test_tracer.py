"""What the tracer's thread does for a task that is cancelled meanwhile."""

from __future__ import annotations

import threading

import trio

from pipeline.remote.tracer import check_cancelled, tracer_thread

#: long enough for a task that waits to be told of its cancellation
_PATIENCE_S = 10.0


def _until_cancelled(begun: threading.Event) -> None:
    begun.set()
    end = threading.Event()
    while not end.wait(0.001):
        check_cancelled()


async def test_a_function_that_asks_ends_with_the_task_that_waits_for_it():
    begun = threading.Event()
    async with tracer_thread() as tracer:
        with trio.fail_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tracer.run, _until_cancelled, begun)
                await trio.to_thread.run_sync(begun.wait)
                nursery.cancel_scope.cancel()
        assert (
            await tracer.run(lambda: check_cancelled() or "the next one is wanted")
            == "the next one is wanted"
        )


async def test_what_a_function_took_is_not_lost():
    """It is told of late, and has something in its hands by then."""
    go = threading.Event()
    got: list[str] = []

    def take() -> str:
        go.wait()
        return "taken"

    async def wait() -> None:
        got.append(await tracer.run(take))

    async with tracer_thread() as tracer:
        with trio.fail_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                go.set()
    assert got == ["taken"]


async def test_what_is_shielded_goes_to_its_end():
    async with tracer_thread() as tracer:
        with trio.CancelScope() as scope:
            scope.cancel()
            with trio.CancelScope(shield=True):
                assert await tracer.run(lambda: check_cancelled() or "done") == "done"


async def test_a_thread_of_trio_may_ask_too():
    begun = threading.Event()
    with trio.fail_after(_PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _until_cancelled, begun)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()


def test_elsewhere_nobody_is_cancelled():
    check_cancelled()
