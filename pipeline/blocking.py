"""The public API for plain, blocking code: each call runs its recipe to the end in this thread.

Ctrl-C in the main thread cancels the recipe, which gives back what it took, and
then raises KeyboardInterrupt; a recipe that is past its point of no return, such as
the decision of a migration, completes, and its result is returned. Not for use inside
a running Trio loop: await the recipes themselves there; from asyncio use `pipeline.aio`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import pipeline
from pipeline.interrupts import run

if TYPE_CHECKING:
    from pipeline.check import CheckReport
    from pipeline.dump import DumpResult
    from pipeline.inspect import Inspection
    from pipeline.live import OnTimeout
    from pipeline.migrate import MigrateResult
    from pipeline.policy import DumpPolicy, RestorePolicy
    from pipeline.progress import Progress
    from pipeline.restore import RestoredTree


class Tree:
    """A restored tree, to be waited for without an event loop.

    Args:
        tree: what `pipeline.restore` returned.
    """

    def __init__(self, tree: RestoredTree) -> None:
        self._tree = tree
        self.root_pid = tree.root_pid
        self.figures = tree.figures
        self.notes = tree.notes

    def wait(self) -> int:
        """Wait for the tree's root; returns its wait status (as `os.waitstatus_to_exitcode` reads it)."""
        return run(self._tree.wait)

    def send_signal(self, signal: int) -> None:
        """Send a signal to the tree's root."""
        self._tree.send_signal(signal)

    def close(self) -> None:
        """Let go of the tree, which runs on; idempotent."""
        self._tree.close()


def dump(
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
    """`pipeline.dump`, blocking."""
    return run(
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
            progress=progress,
        )
    )


def restore(
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
    """`pipeline.restore`, blocking; returns when the tree runs."""
    return Tree(
        run(
            lambda: pipeline.restore(
                source,
                detach=detach,
                new_pidns=new_pidns,
                map=map,
                unmapped=unmapped,
                externals=externals,
                policy=policy,
                lazy=lazy,
                on_message=on_message,
                progress=progress,
            )
        )
    )


def migrate(
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
    """`pipeline.migrate`, blocking."""
    return run(
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
            progress=progress,
            give_up=give_up,
        )
    )


def serve(
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
    """`pipeline.serve`, blocking until Ctrl-C or, with `once`, until one tree has arrived."""
    run(
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
            on_listening=on_listening,
            on_restored=on_restored,
            on_message=on_message,
            progress=progress,
            give_up=give_up,
        )
    )


def check(pid: int | None = None, policy: DumpPolicy | None = None) -> CheckReport:
    """`pipeline.check`, blocking."""
    return run(lambda: pipeline.check(pid, policy))


def inspect(source: str) -> Inspection:
    """`pipeline.inspect`, blocking."""
    return run(lambda: pipeline.inspect(source))
