"""The bridges, with a recipe of the test's own: results, errors and cancellation cross over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

import pytest
import trio

from pipeline import aio
from pipeline.errors import TargetError
from pipeline.progress import Round


def test_a_result_crosses_over_and_the_loop_stays_free() -> None:
    async def recipe() -> int:
        await trio.sleep(0.05)
        return threading.get_ident()

    async def main() -> tuple[int, int]:
        ticks = 0
        task = asyncio.ensure_future(aio._run(recipe))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return task.result(), ticks

    thread, ticks = asyncio.run(main())
    assert thread != threading.get_ident()
    assert ticks > 1


def test_an_error_crosses_over() -> None:
    async def recipe() -> None:
        raise TargetError("gone")

    with pytest.raises(TargetError, match="gone"):
        asyncio.run(aio._run(recipe))


def test_cancelling_waits_until_everything_is_given_back() -> None:
    events = []

    async def recipe() -> None:
        try:
            events.append("working")
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            events.append("given back")

    async def main() -> None:
        task = asyncio.ensure_future(aio._run(recipe))
        while not events:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("cancelled")

    asyncio.run(main())
    assert events == ["working", "given back", "cancelled"]


def test_what_has_happened_is_not_reported_as_cancelled() -> None:
    started = threading.Event()

    async def recipe() -> str:
        with trio.CancelScope(shield=True):
            started.set()
            await trio.sleep(0.1)
        return "committed"

    async def main() -> str:
        task = asyncio.ensure_future(aio._run(recipe))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        return await task

    assert asyncio.run(main()) == "committed"


def test_progress_arrives_in_the_asyncio_thread() -> None:
    seen: list[tuple[str, int]] = []
    ended = Round(0, 4096, 4096, 0.1, 40960.0, 0.0)

    class Listener:
        def phase(self, name: str) -> None:
            seen.append((name, threading.get_ident()))

        def advance(self, bytes_done: int, bytes_total: int | None) -> None:
            seen.append((f"{bytes_done}/{bytes_total}", threading.get_ident()))

        def round(self, ended: Round) -> None:
            seen.append((f"round {ended.number}", threading.get_ident()))

        def pause(self, parts: Mapping[str, float]) -> None:
            seen.append((" ".join(parts), threading.get_ident()))

    async def main() -> None:
        listener = aio._forward(Listener())
        assert listener is not None

        async def recipe() -> None:
            listener.phase("freeze")
            listener.advance(1, None)
            listener.round(ended)
            listener.pause({"freeze": 1.0, "thaw": 2.0})

        await aio._run(recipe)
        await asyncio.sleep(0)

    asyncio.run(main())
    me = threading.get_ident()
    assert seen == [("freeze", me), ("1/None", me), ("round 0", me), ("freeze thaw", me)]
