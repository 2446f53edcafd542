"""Several tasks that share one piece of work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


async def abreast(count: int, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` in so many tasks at once, each of which does what is left; what fails first is raised."""
    failed: list[Exception] = []

    async def beside() -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 (it is raised when the others have ended)
            failed.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(beside)
    if failed:
        raise failed[0]
