"""Recipes that are cancelled in a chosen moment: as ^C in that very moment would.

As a program, `python -m tests.harness.cancelling WHEN PID HOST:PORT SECRET MODE`: a migration of `pipeline.blocking`,
or what becomes of it WHEN something happens: it prints ``migrated`` or ``cancelled``. WHEN is:

- N: it is cancelled at the Nth step of Trio's behind the word that the destination is prepared;
- ``asked``: it prints ``prepared`` at that word, and goes on when it has read a line;
- ``before``, ``behind``: Ctrl-C just before its tree is ended, or just behind that.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

import pytest
import trio

import pipeline
from pipeline import blocking
from pipeline.standstill import Standstill
from pipeline.transport.protocol import AnyMessage, Prepared
from pipeline.transport.tcp import Channel

T = TypeVar("T")


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at the Nth step that any task of the run makes once it is armed; counts them."""

    def __init__(self, step: int | None) -> None:
        self.steps = 0
        self.scope = trio.CancelScope()
        self.is_armed = False
        self._step = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.is_armed:
            return
        self.steps += 1
        if self.steps == self._step:
            self.scope.cancel()

    def run(self, recipe: Callable[[], Awaitable[T]]) -> list[T]:
        """Run a recipe in a Trio loop; what it returned, or nothing where it was cancelled."""
        results: list[T] = []

        async def main() -> None:
            with self.scope:
                results.append(await recipe())

        trio.run(main, instruments=[self])
        return results


#: awaits something in a moment of a recipe
Moment = Callable[[Callable[[], Awaitable[object]]], AbstractContextManager[None]]


@contextmanager
def stored(act: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """`act` is awaited when all that is left for a dump to do is to end the tree."""
    original = Standstill.let_go_of_files

    async def also(still: Standstill) -> None:
        await act()
        await original(still)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Standstill, "let_go_of_files", also)
        yield


@contextmanager
def prepared(act: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """`act` is awaited when all that is left for a migration to do is to end the tree here."""
    original = Channel.hear

    async def also(channel: Channel) -> AnyMessage:
        message = await original(channel)
        if isinstance(message, Prepared):
            await act()
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "hear", also)
        yield


def cancelled_at(step: int, recipe: Callable[[], Awaitable[T]], moment: Moment = stored) -> list[T]:
    """What a recipe returned that is cancelled at that step behind a moment, or nothing."""
    instrument = CancelAt(step)

    async def arm() -> None:
        instrument.is_armed = True

    with moment(arm):
        return instrument.run(recipe)


async def _ask() -> None:
    print("prepared", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)


async def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with trio.CancelScope(shield=True):
        await trio.sleep(0.1)  # until it is heard


@contextmanager
def _interrupted_behind_the_end() -> Iterator[None]:
    original = Standstill.end

    def end(still: Standstill) -> None:
        original(still)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Standstill, "end", end)
        yield


def _main(when: str, pid: str, to: str, secret: str, mode: Any) -> None:
    arguments, options = (int(pid), to), {"secret_file": secret, "mode": mode}
    done: object = None
    if when.isdigit():
        done = cancelled_at(int(when), lambda: pipeline.migrate(*arguments, **options), prepared)
    else:
        moments = {
            "asked": prepared(_ask),
            "before": prepared(_interrupt),
            "behind": _interrupted_behind_the_end(),
        }
        with suppress(KeyboardInterrupt), moments[when]:
            done = blocking.migrate(*arguments, **options)
    print("migrated" if done else "cancelled")


if __name__ == "__main__":
    _main(*sys.argv[1:])
