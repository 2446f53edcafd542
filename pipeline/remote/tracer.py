"""The tracer's thread: the one thread from which all ptrace requests are made.

ptrace ties a tracee to the *thread* that seized it, so everything that looks into
or acts on other processes runs here, as plain synchronous functions. Stages hand
work over with `Tracer.run` and stay responsive meanwhile.

When the thread ends, however it ends, the kernel detaches every task it still holds:
live targets run on (they rest with their own registers, see `pipeline.remote.live`),
puppets are killed (PTRACE_O_EXITKILL, see `pipeline.remote.puppet`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import trio

from pipeline.kernel.forking import require_told_ends

T = TypeVar("T")

#: `given_up`: set when whoever waits for what the tracer of this thread does was cancelled
_here = threading.local()


class _GivenUp(BaseException):
    """Ends a function that nobody waits for any more; `Tracer.run` makes a cancellation of it."""


def check_cancelled() -> None:
    """End the function that a thread runs for a task if that was cancelled: where it took nothing, or gives it back.

    For the thread of a tracer, and for those of Trio; in others nothing happens.
    """
    given_up = getattr(_here, "given_up", None)
    if given_up is None:
        with suppress(RuntimeError):  # no thread of Trio
            trio.from_thread.check_cancelled()
    elif given_up.is_set():
        raise _GivenUp


class Tracer:
    """A thread with a queue of work. Made by `tracer_thread`; raises what `require_told_ends` does."""

    def __init__(self) -> None:
        require_told_ends()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="pipeline-tracer", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        while (job := self._work.get()) is not None:
            job()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` in the tracer's thread and return what it returns.

        Cancellation: waits for the end of the function, so that what it took is never lost; functions
        are therefore short, ask `check_cancelled`, or are handed over in pieces.
        """
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        outcome: list[tuple[bool, Any]] = []
        given_up = threading.Event()

        def job() -> None:
            _here.given_up = given_up
            try:
                outcome.append((True, function(*args)))
            except BaseException as error:  # noqa: BLE001 - handed to the waiting task
                outcome.append((False, error))
            token.run_sync_soon(trio.lowlevel.reschedule, task)

        def give_up(_: object) -> trio.lowlevel.Abort:
            given_up.set()
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.checkpoint_if_cancelled()
        self._work.put(job)
        await trio.lowlevel.wait_task_rescheduled(give_up)
        fine, value = outcome.pop()
        if isinstance(value, _GivenUp):
            await trio.lowlevel.checkpoint_if_cancelled()
        if not fine:
            try:
                raise value
            finally:
                del value
        result: T = value
        return result

    def stop(self) -> None:
        """Let the thread end after the work already given; idempotent."""
        self._work.put(None)

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()


@asynccontextmanager
async def tracer_thread() -> AsyncIterator[Tracer]:
    """A tracer that ends with the block; by then its users have released what they held."""
    tracer = Tracer()
    try:
        yield tracer
    finally:
        tracer.stop()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(tracer.join)
