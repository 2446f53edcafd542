"""Running a recipe under Trio so that SIGINT and SIGTERM cancel it and roll it back.

Only when it is rolled back does the command end, with 128 plus the signal. A recipe that was past its point of no
return completes instead, and the command reports that; where that may take for ever,
a second signal gives it up.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from pipeline.cli.render import say
from pipeline.interrupts import heeding

T = TypeVar("T")

_CANCELLING = (signal.SIGINT, signal.SIGTERM)


async def cancellable(recipe: Callable[[], Awaitable[T]], deaf_then: bool = False) -> T:
    """Await a recipe inside a Trio program that has no other use for these signals until it is done.

    Args:
        recipe: what is cancelled by the first signal.
        deaf_then: what was to be done is done then: the exit code says so, whoever presses ^C while it is being told.

    Raises:
        SystemExit: SIGINT or SIGTERM came, and everything is given back; the code is 128 plus the signal.
        PipelineError: what the recipe says; taken out of exception groups where it is the only one there.
    """
    caught: list[int] = []

    def told(number: int) -> None:
        if not caught:
            say(f"cancelling on {signal.Signals(number).name}: rolling back, unless it is too late for that")
        caught.append(number)

    results = await heeding(recipe, _CANCELLING, told, deaf_then=deaf_then)
    if not results:
        raise SystemExit(128 + caught[0])
    return results[0]


def run(recipe: Callable[[], Awaitable[T]], *, deaf_then: bool = False) -> T:
    """`cancellable` in a Trio loop of its own."""
    return trio.run(cancellable, recipe, deaf_then)
