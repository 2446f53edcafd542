"""Migrating: a tree that runs here goes on there.

::

    check ─ connect ─ freeze ─ capture ─┬─ namespace-translate ─┬─ wire ─ prepared?
                                        └─ memory-stream ───────┘         │
                                                       end the tree here ─┴─ commit ─ completed

Records and pages go to the destination as they are read, and it builds while they
come. The one decision is the line that ends the tree: before it, every failure and every
cancellation leads to the tree running on here and nothing there; after it, the tree
never runs here again, and the destination is told until it has heard.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import Literal

import trio
from msgspec import Struct

from pipeline.dump import write_image
from pipeline.errors import InDoubt, PeerError, UsageError
from pipeline.kernel.arch import x86_64 as arch
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import freeze
from pipeline.standstill import refuse_early, standstill
from pipeline.transport import identity, protocol
from pipeline.transport.protocol import Commit, Completed, Decision, Hello, Offer
from pipeline.transport.tcp import Channel, connect, parse_address

Mode = Literal["stop", "precopy", "postcopy", "hybrid"]

#: how long the destination may take to let the tree run, and how long it is told of a decision
_COMPLETE_S = 30.0
_SETTLE_S = 60.0
_SETTLE_PAUSE_S = 1.0


class MigrateResult(Struct, frozen=True):
    """What a migration did. `figures`: times in milliseconds, sizes in bytes, by QMP's names."""

    root_pid: int
    processes: int
    figures: dict[str, float]


async def greet(channel: Channel) -> Hello:
    """Exchange greetings as the source."""
    await channel.say(Hello(protocol.VERSION, arch.MACHINE, os.uname().release))
    hello = await channel.hear()
    if not isinstance(hello, Hello):
        raise PeerError(f"{channel.peer} does not greet")
    if hello.machine != arch.MACHINE:
        raise PeerError(f"{channel.peer} is a {hello.machine}; this tree needs {arch.MACHINE}")
    return hello


async def migrate(
    pid: int,
    to: str,
    *,
    secret_file: str | None,
    mode: Mode = "stop",
    max_downtime_s: float = 0.3,
    plaintext: bool = False,
    progress: Progress | None = None,
) -> MigrateResult:
    """Move the tree below `pid` to the destination that serves at `to`.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        to: HOST:PORT of a running `serve`.
        secret_file: the secret that both sides share.
        mode: ``stop``: the tree stands still while it is sent.
        max_downtime_s: for modes that send while the tree runs.
        plaintext: no TLS; both sides still prove the secret.
        progress: is told how far it is.

    Raises:
        Refused: the tree cannot be carried; nothing was touched.
        InDoubt: the tree is ended here, and the destination could not be told.
        PipelineError: it failed; the tree runs on here.

    Cancellation: before the decision the tree runs on; after it the migration completes.
    """
    if mode != "stop":
        raise UsageError(f"mode {mode} is not there yet; use --mode stop")
    if secret_file is None:
        raise UsageError("migrate needs --secret-file, the secret that `serve` was given or printed")
    del max_downtime_s
    progress = progress or NullProgress()
    host, port = parse_address(to)
    secret = identity.load_secret(secret_file)
    begin = time.monotonic()
    progress.phase("setup")
    await refuse_early(pid)
    migration = secrets.token_hex(16)
    async with tracer_thread() as tracer, connect(host, port, secret, plaintext=plaintext) as channel:
        await greet(channel)
        processes = len(freeze.walk(pid))  # type: ignore[arg-type]
        await channel.say(Offer(migration, pid, processes))
        if not isinstance(await channel.hear(), protocol.Accept):
            raise PeerError(f"{channel.peer} did not answer the offer")
        progress.phase("freeze")
        async with standstill(tracer, pid) as still:
            progress.phase("memory")
            page_bytes = await write_image(
                channel.writer, still.records, still.sources, still.forest, progress
            )
            sent = time.monotonic()
            progress.phase("prepare")
            if not isinstance(await channel.hear(), protocol.Prepared):
                raise PeerError(f"{channel.peer} did not get ready")
            await still.let_go_of_files()
            with trio.CancelScope(shield=True):
                await tracer.run(freeze.end, still.tree)  # the decision
                completed = await _tell(channel, migration, secret, plaintext, (host, port))
        done = time.monotonic()
    return MigrateResult(
        root_pid=completed.root_pid,
        processes=still.processes,
        figures={
            "total-time": 1e3 * (done - begin),
            "setup-time": 1e3 * (still.begun_s - begin),
            "downtime": 1e3 * (done - still.begun_s),
            "collect-time": 1e3 * (still.captured_s - still.begun_s),
            "transfer-time": 1e3 * (sent - still.captured_s),
            "transferred": channel.writer.bytes_written,
            "page-bytes": page_bytes,
            "injected-calls": still.injected_calls,
        },
    )


async def _tell(
    channel: Channel, migration: str, secret: bytes, plaintext: bool, address: tuple[str, int]
) -> Completed:
    """Tell the destination that the tree is its own now, on a new connection if this one is broken.

    Raises:
        InDoubt: it could not be told.
    """
    reason = "it does not answer"
    try:
        with trio.fail_after(_COMPLETE_S):
            await channel.say(Commit())
            answer = await channel.hear()
            if isinstance(answer, Completed):
                return answer
    except (PeerError, trio.TooSlowError) as error:
        reason = str(error) or reason
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        await trio.sleep(_SETTLE_PAUSE_S)
        try:
            with trio.fail_after(_COMPLETE_S):
                async with connect(*address, secret, plaintext=plaintext) as again:
                    await greet(again)
                    await again.say(Decision(migration, committed=True))
                    answer = await again.hear()
                    if isinstance(answer, Completed):
                        return answer
        except (PeerError, trio.TooSlowError) as error:
            reason = str(error) or reason
    raise InDoubt(
        f"the tree is ended here, and {channel.peer} could not be told ({reason}). If `serve` still runs there, "
        f"it holds the tree of migration {migration}, stopped: send SIGUSR1 to that serve process to let it run"
    )
