"""Signals that cancel a recipe: it gives back what it took while it is being cancelled, and only then anything ends.

A recipe that is past its point of no return completes instead. KeyboardInterrupt would not let it: it is raised in any
line of Python, and in the main task of Trio wherever that waits, shielded or not; between the end of a tree here and
the word that the destination may let it run, for one.

Source: docs of Trio, "Signals" and "Control-C and cancellation".
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import trio

from pipeline.errors import ungrouped

P = ParamSpec("P")
T = TypeVar("T")

_interrupts: ContextVar[Sequence[int]] = ContextVar("interrupts", default=())


async def heeding(
    recipe: Callable[[], Awaitable[T]], numbers: Sequence[int], told: Callable[[int], None]
) -> list[T]:
    """Await a recipe that is cancelled by the first of these signals; what it returned, or nothing if it was cancelled.

    Args:
        recipe: any.
        numbers: of the signals, for which there is no other use until it is done; in the main thread.
        told: is called with the number of each that comes.

    Raises:
        what the recipe raises; taken out of exception groups where it is the only one there.
    """
    results: list[T] = []
    scope = trio.CancelScope()

    def heard(number: int) -> None:
        if not results:
            told(number)
            scope.cancel()

    # Not in a nursery: at the end of one a completed recipe could be told that it is cancelled from outside.
    with _calling(heard, numbers), scope, ungrouped():
        results.append(await recipe())
    return results


@contextmanager
def _calling(heard: Callable[[int], None], numbers: Sequence[int]) -> Iterator[None]:
    """In the block `heard` is called in the Trio loop when one of these signals has come."""
    token = trio.lowlevel.current_trio_token()

    def handle(number: int, _: object) -> None:
        token.run_sync_soon(heard, number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def insisted() -> bool:
    """Whether Ctrl-C was pressed again since the `interruptible` recipe began that runs."""
    return len(_interrupts.get()) > 1


def interruptible(recipe: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A recipe that Ctrl-C cancels where it would raise KeyboardInterrupt otherwise; that comes when all is given back.

    What completes all the same is returned, without KeyboardInterrupt.
    """

    @wraps(recipe)
    async def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _is_keyboard_interrupt():
            return await recipe(*args, **kwargs)
        interrupts: list[int] = []
        token = _interrupts.set(interrupts)
        try:
            results = await heeding(lambda: recipe(*args, **kwargs), [signal.SIGINT], interrupts.append)
        finally:
            _interrupts.reset(token)
        if not results:
            raise KeyboardInterrupt
        return results[0]

    return called


def _is_keyboard_interrupt() -> bool:
    """Whether it is Trio that hears of Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        return False
    return getattr(signal.getsignal(signal.SIGINT), "__module__", "").startswith("trio._core.")
