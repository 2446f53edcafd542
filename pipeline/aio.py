"""The public API for asyncio: each recipe runs under Trio in a thread of its own.

Cancelling the asyncio task cancels the recipe, waits until it has given back what
it took, and only then raises CancelledError. A recipe that was past its point of
no return finishes instead, and its result is returned: a migration that has
happened is never reported as cancelled. Callbacks run in the asyncio thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import trio

import pipeline

if TYPE_CHECKING:
    from pipeline.check import CheckReport
    from pipeline.dump import DumpResult
    from pipeline.inspect import Inspection
    from pipeline.live import OnTimeout
    from pipeline.migrate import MigrateResult
    from pipeline.policy import DumpPolicy, RestorePolicy
    from pipeline.progress import Progress, Round
    from pipeline.restore import RestoredTree

T = TypeVar("T")
P = ParamSpec("P")


class _Bridge:
    """One recipe in one thread, with a way to cancel it from outside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._wanted = False
        self.cancelled = False

    def cancel(self) -> None:
        """Cancel the recipe; callable from any thread, at any time, more than once."""
        with self._lock:
            self._wanted = True
            if self._token is not None:
                try:
                    self._token.run_sync_soon(self._scope.cancel)
                except trio.RunFinishedError:
                    return

    async def _main(self, recipe: Callable[[], Awaitable[T]]) -> T | None:
        with self._lock:
            self._token = trio.lowlevel.current_trio_token()
            if self._wanted:
                self._scope.cancel()
        result: T | None = None
        with self._scope:
            result = await recipe()
        self.cancelled = self._scope.cancelled_caught
        return result

    def run(self, recipe: Callable[[], Awaitable[T]]) -> T | None:
        """Run the recipe to its end in the calling thread."""
        return trio.run(self._main, recipe)


async def _run(recipe: Callable[[], Awaitable[T]]) -> T:
    loop = asyncio.get_running_loop()
    bridge = _Bridge()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def body() -> None:
        try:
            result = bridge.run(recipe)
        except BaseException as error:  # noqa: BLE001 (it is handed to the asyncio task)
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    thread = threading.Thread(target=body, name="pipeline recipe")
    thread.start()
    interrupted: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError as error:
            interrupted = error
            bridge.cancel()
        except BaseException:  # noqa: BLE001 (raised again by done.result() below)
            break
    thread.join()
    if interrupted is not None and bridge.cancelled:
        raise interrupted
    result: T = done.result()
    return result


class _ForwardedProgress:
    def __init__(self, progress: Progress, loop: asyncio.AbstractEventLoop) -> None:
        self._progress = progress
        self._loop = loop

    def phase(self, name: str) -> None:
        self._loop.call_soon_threadsafe(self._progress.phase, name)

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        self._loop.call_soon_threadsafe(self._progress.advance, bytes_done, bytes_total)

    def round(self, ended: Round) -> None:
        self._loop.call_soon_threadsafe(self._progress.round, ended)

    def pause(self, parts: Mapping[str, float]) -> None:
        self._loop.call_soon_threadsafe(self._progress.pause, parts)


def _in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[P, None]) -> Callable[P, None]:
    """The callback, to be called from another thread and run in the loop's."""

    def call(*args: P.args, **_: P.kwargs) -> None:
        loop.call_soon_threadsafe(callback, *args)

    return call


def _forward(progress: Progress | None) -> Progress | None:
    return None if progress is None else _ForwardedProgress(progress, asyncio.get_running_loop())


class Tree:
    """A restored tree, to be waited for from asyncio.

    Args:
        tree: what `pipeline.restore` returned.
    """

    def __init__(self, tree: RestoredTree) -> None:
        self._tree = tree
        self.root_pid = tree.root_pid
        self.figures = tree.figures
        self.notes = tree.notes

    async def wait(self) -> int:
        """Wait for the tree's root; returns its wait status (as `os.waitstatus_to_exitcode` reads it)."""
        return await _run(self._tree.wait)

    def send_signal(self, signal: int) -> None:
        """Send a signal to the tree's root."""
        self._tree.send_signal(signal)

    def close(self) -> None:
        """Let go of the tree, which runs on; idempotent."""
        self._tree.close()


async def dump(
    pid: int,
    to: str,
    *,
    leave: Literal["end", "running", "stopped"] = "end",
    mode: Literal["stop", "precopy"] | None = None,
    max_downtime: float = 0.3,
    max_rounds: int = 30,
    parent: str | None = None,
    digests: bool = False,
    externals: Mapping[str, str] | None = None,
    policy: DumpPolicy | None = None,
    compress: Literal["none", "lz4", "zstd", "auto"] = "none",
    progress: Progress | None = None,
) -> DumpResult:
    """`pipeline.dump` for asyncio."""
    listener = _forward(progress)
    return await _run(
        lambda: pipeline.dump(
            pid,
            to,
            leave=leave,
            mode=mode,
            max_downtime=max_downtime,
            max_rounds=max_rounds,
            parent=parent,
            digests=digests,
            externals=externals,
            policy=policy,
            compress=compress,
            progress=listener,
        )
    )


async def restore(
    source: str,
    *,
    detach: bool = False,
    new_pidns: bool = False,
    map: str = "same",  # noqa: A002 (the recipe's own argument)
    unmapped: Literal["refuse", "overflow"] = "refuse",
    externals: Mapping[str, str] | None = None,
    policy: RestorePolicy | None = None,
    lazy: bool = False,
    on_message: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Tree:
    """`pipeline.restore` for asyncio; returns when the tree runs."""
    loop = asyncio.get_running_loop()
    listener = _forward(progress)
    return Tree(
        await _run(
            lambda: pipeline.restore(
                source,
                detach=detach,
                new_pidns=new_pidns,
                map=map,
                unmapped=unmapped,
                externals=externals,
                policy=policy,
                lazy=lazy,
                on_message=on_message and _in_loop(loop, on_message),
                progress=listener,
            )
        )
    )


async def migrate(
    pid: int,
    to: str,
    *,
    secret_file: str | None,
    mode: Literal["stop", "precopy", "postcopy", "hybrid"] = "precopy",
    max_downtime_s: float = 0.3,
    max_rounds: int = 30,
    on_timeout: OnTimeout = "switch",
    auto_converge: bool = False,
    plaintext: bool = False,
    externals: Mapping[str, str] | None = None,
    policy: DumpPolicy | None = None,
    compress: Literal["none", "lz4", "zstd", "auto"] = "none",
    streams: int = 1,
    progress: Progress | None = None,
    give_up: Callable[[], bool] | None = None,
) -> MigrateResult:
    """`pipeline.migrate` for asyncio."""
    listener = _forward(progress)
    return await _run(
        lambda: pipeline.migrate(
            pid,
            to,
            secret_file=secret_file,
            mode=mode,
            max_downtime_s=max_downtime_s,
            max_rounds=max_rounds,
            on_timeout=on_timeout,
            auto_converge=auto_converge,
            plaintext=plaintext,
            externals=externals,
            policy=policy,
            compress=compress,
            streams=streams,
            progress=listener,
            give_up=give_up,
        )
    )


async def serve(
    listen: str,
    *,
    secret_file: str | None,
    on_listening: Callable[[str, int, str | None], None],
    on_restored: Callable[[RestoredTree], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    once: bool = False,
    new_pidns: bool = False,
    map: str = "same",  # noqa: A002 (the recipe's own argument)
    unmapped: Literal["refuse", "overflow"] = "refuse",
    externals: Mapping[str, str] | None = None,
    policy: RestorePolicy | None = None,
    plaintext: bool = False,
    progress: Progress | None = None,
    give_up: Callable[[], bool] | None = None,
) -> None:
    """`pipeline.serve` for asyncio; cancel the task to stop it."""
    loop = asyncio.get_running_loop()
    listener = _forward(progress)
    await _run(
        lambda: pipeline.serve(
            listen,
            secret_file=secret_file,
            once=once,
            new_pidns=new_pidns,
            map=map,
            unmapped=unmapped,
            externals=externals,
            policy=policy,
            plaintext=plaintext,
            on_listening=_in_loop(loop, on_listening),
            on_restored=on_restored and _in_loop(loop, on_restored),
            on_message=on_message and _in_loop(loop, on_message),
            progress=listener,
            give_up=give_up,
        )
    )


async def check(pid: int | None = None, policy: DumpPolicy | None = None) -> CheckReport:
    """`pipeline.check` for asyncio."""
    return await _run(lambda: pipeline.check(pid, policy))


async def inspect(source: str) -> Inspection:
    """`pipeline.inspect` for asyncio."""
    return await _run(lambda: pipeline.inspect(source))
