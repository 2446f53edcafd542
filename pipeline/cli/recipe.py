"""Running a recipe under Trio so that SIGINT and SIGTERM cancel it and roll it back.

The recipe gives back what it took while it is being cancelled; only then does the
command end, with 128 plus the signal. A recipe that was past its point of no
return completes instead, and the command reports that; where that may take for ever,
a second signal gives it up.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from pipeline.cli.render import say

T = TypeVar("T")

_CANCELLING = (signal.SIGINT, signal.SIGTERM)


async def _listen(
    scope: trio.CancelScope, caught: list[int], insisted: trio.Event, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(*_CANCELLING) as signals:
        task_status.started()
        async for number in signals:
            if not caught:
                say(f"cancelling on {signal.Signals(number).name}: rolling back")
            else:
                insisted.set()
            caught.append(number)
            scope.cancel()


async def cancellable(recipe: Callable[[], Awaitable[T]], insisted: trio.Event | None = None) -> T:
    """Await a recipe inside a Trio program that has no other use for these signals until it is done.

    Args:
        recipe: what is cancelled by the first signal.
        insisted: is set by the second one.

    Raises:
        SystemExit: SIGINT or SIGTERM came, and everything is given back; the code is 128 plus the signal.
        PipelineError: what the recipe says; taken out of exception groups where it is the only one there.
    """
    caught: list[int] = []
    outcome: list[T] = []
    failure: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        insist = trio.Event() if insisted is None else insisted
        await nursery.start(lambda task_status: _listen(scope, caught, insist, task_status))
        with scope:
            # Kept aside, so that a nursery's exception group does not hide which error it was.
            try:
                outcome.append(await recipe())
            except Exception as error:  # noqa: BLE001 (raised again below)
                failure.append(_only(error))
        nursery.cancel_scope.cancel()
    if failure:
        raise failure[0] from None
    if outcome:
        return outcome[0]
    raise SystemExit(128 + caught[0])


def run(recipe: Callable[[], Awaitable[T]], insisted: trio.Event | None = None) -> T:
    """`cancellable` in a Trio loop of its own."""
    return trio.run(cancellable, recipe, insisted)


def past_cancelling() -> None:
    """What was to be done is done: the exit code says so, whoever presses ^C while it is being told."""
    for number in _CANCELLING:
        signal.signal(number, signal.SIG_IGN)


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
