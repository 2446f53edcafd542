"""Signals that cancel a recipe: it gives back what it took while it is being cancelled, and only then anything ends.

A recipe that is past its point of no return completes instead. KeyboardInterrupt would not let it: it is raised in any
line of Python, and in the main task of Trio wherever that waits, shielded or not; between the end of a tree here and
the word that the destination may let it run, for one.

Source: docs of Trio, "Signals" and "Control-C and cancellation".
"""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import trio

from pipeline.errors import ungrouped

P = ParamSpec("P")
T = TypeVar("T")

#: between two times that somebody is asked whether it is over
_ASK_S = 0.2

#: the signals that the recipe has heard in which this runs; None outside of one
_caught: ContextVar[list[int] | None] = ContextVar("caught", default=None)
#: who is to be told of a signal, by its number: several recipes may run side by side
_hearers: dict[int, list[Callable[[], object]]] = {}
#: what handled these signals before
_handlers: dict[int, Any] = {}


async def heeding(
    recipe: Callable[[], Awaitable[T]],
    numbers: Sequence[int],
    told: Callable[[int], object] | None = None,
    *,
    deaf_then: bool = False,
) -> list[T]:
    """Await a recipe that is cancelled by the first of these signals; what it returned, or nothing if it was cancelled.

    Args:
        recipe: any.
        numbers: of the signals, for which there is no other use until it is done; in the main thread.
        told: is called with the number of each that comes.
        deaf_then: once it has returned, these signals are ignored, whatever was to be done before.

    Raises:
        what the recipe raises; taken out of exception groups where it is the only one there.
    """
    results: list[T] = []
    caught: list[int] = []
    scope = trio.CancelScope()

    def heard(number: int) -> None:
        if not results:
            if told is not None:
                told(number)
            caught.append(number)
            scope.cancel()

    token = _caught.set(caught)
    try:
        # Not in a nursery: at the end of one a completed recipe could be told that it is cancelled from outside.
        with _hearing(heard, numbers), ungrouped(), scope:
            results.append(await recipe())
            if deaf_then:
                _handlers.update(dict.fromkeys(numbers, signal.SIG_IGN))
    finally:
        _caught.reset(token)
    return results


def insisted() -> bool:
    """Whether a second signal has come for the recipe in which this runs."""
    return len(_caught.get() or ()) > 1


@asynccontextmanager
async def move_on_when(is_over: Callable[[], bool]) -> AsyncIterator[None]:
    """As `trio.move_on_after`: the block is cancelled when `is_over`, which is asked now and then, says so.

    What is returned from within the block is returned, also if that is said in this very moment.
    """

    async def ask() -> None:
        while not is_over():
            await trio.sleep(_ASK_S)
        scope.cancel()

    with trio.CancelScope() as scope, ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            yield
            nursery.cancel_scope.cancel()


def interruptible(recipe: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A recipe that Ctrl-C cancels where it would raise KeyboardInterrupt otherwise; that comes when all is given back.

    Of recipes side by side all are cancelled. If none of them was, because they were past their points of no return,
    KeyboardInterrupt comes when the main task waits next.
    """

    @wraps(recipe)
    async def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if _caught.get() is not None or not _is_keyboard_interrupt():
            return await recipe(*args, **kwargs)
        result, caught = await _interrupted(lambda: recipe(*args, **kwargs))
        if caught and signal.SIGINT not in _hearers:
            _press_again()
        return result

    return called


def run(recipe: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`trio.run` for one recipe that Ctrl-C cancels, if it is Python's; what completes all the same is returned.

    Raises:
        KeyboardInterrupt: it was cancelled, and everything is given back.
    """

    async def main() -> T:
        return (await _interrupted(recipe))[0] if _is_keyboard_interrupt() else await recipe()

    return trio.run(main)


async def _interrupted(recipe: Callable[[], Awaitable[T]]) -> tuple[T, list[int]]:
    """What a recipe returns, and whether it was cancelled all the same."""
    caught: list[int] = []
    results = await heeding(recipe, [signal.SIGINT], caught.append)
    if not results:
        raise KeyboardInterrupt
    return results[0], caught


@trio.lowlevel.enable_ki_protection
def _press_again() -> None:
    """Nobody was stopped: Trio raises it in the main task, when that waits next."""
    signal.raise_signal(signal.SIGINT)


def _is_keyboard_interrupt() -> bool:
    """Whether Ctrl-C is Trio's here, or that of recipes that would let Trio have it."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(signal.SIGINT)
    return handler is _handle or getattr(handler, "__module__", "").startswith("trio._core.")


@contextmanager
def _hearing(heard: Callable[[int], object], numbers: Sequence[int]) -> Iterator[None]:
    """In the block `heard` is called in this Trio loop when one of these signals has come."""
    token = trio.lowlevel.current_trio_token()
    with ExitStack() as stack:
        for number in numbers:
            stack.enter_context(_among_hearers(number, partial(token.run_sync_soon, heard, number)))
        yield


@contextmanager
def _among_hearers(number: int, hear: Callable[[], object]) -> Iterator[None]:
    if number not in _hearers:
        _hearers[number] = []
        _handlers[number] = signal.signal(number, _handle)
    _hearers[number].append(hear)
    try:
        yield
    finally:
        _hearers[number].remove(hear)
        if not _hearers[number]:
            signal.signal(number, _handlers.pop(number))
            del _hearers[number]


def _handle(number: int, _: object) -> None:
    for hear in list(_hearers.get(number, ())):
        hear()
