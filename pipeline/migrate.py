"""Migrating: a tree that runs here goes on there.

::

    check ─ connect ─ (rounds) ─ freeze ─ capture ─┬─ namespace-translate ─┬─ wire ─ prepared?
                                                   └─ memory-stream ───────┘         │
                                                                  end the tree here ─┴─ commit ─ completed

Records and pages go to the destination as they are read, and it builds while they
come; with ``precopy`` most of that happens while the tree still runs (`pipeline.live`).

The one decision is the line that ends the tree: before it, every failure and every
cancellation leads to the tree running on here and nothing there; after it, the tree
never runs here again, and the destination is told until it has heard.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Literal, Self

import trio
from msgspec import Struct
from msgspec.structs import replace

from pipeline.errors import InDoubt, PeerError, PeerRefused, UsageError, ungrouped
from pipeline.ids import HostPid
from pipeline.image.codec import image_of
from pipeline.image.packing import Compression, Packer
from pipeline.interrupts import insisted, interruptible, move_on_when
from pipeline.kernel.arch import x86_64 as arch
from pipeline.live import LiveSource, OnTimeout, Rounds
from pipeline.policy import DumpPolicy
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import Tracer, tracer_thread
from pipeline.stages import freeze
from pipeline.stages.beforehand import Beforehand
from pipeline.stages.lending import Lending, Lent
from pipeline.stages.outliving import large_memories
from pipeline.stages.write import write_image
from pipeline.standstill import Standstill, refuse_early, standstill, warm
from pipeline.transport import identity, protocol
from pipeline.transport.protocol import Cancel, Commit, Completed, Decision, Hello, Join, Offer
from pipeline.transport.spread import SpreadWriter, beside
from pipeline.transport.tcp import Channel, connect, parse_address
from pipeline.userns.externals import Externals

Mode = Literal["stop", "precopy", "postcopy", "hybrid"]
#: those in which it is sent while it runs
_LIVE = ("precopy", "hybrid")

MAX_STREAMS = 16
#: memories that may come later are larger than this, and no more than so many
_SMALL_BYTES = 1 << 20
_MOST_LENT = 64
_NOTHING_LASTS = (
    "its memory was sent while it stood still: that it lasts, and comes later, takes root of this machine"
)
#: how long the destination may take to let the tree run, and how long it is told of a decision
_COMPLETE_S = 30.0
_SETTLE_S = 60.0
_SETTLE_PAUSE_S = 1.0
#: how long a destination that may hold a tree in doubt is told that it stays here
_TAKE_BACK_S = 30.0
_TAKE_BACK_TRY_S = 4.0


class MigrateResult(Struct, frozen=True):
    """What a migration did. `figures`: times in ms, sizes in bytes, by QMP's names. `notes`: what went wrong.

    `compression`: what most of the pages were compressed with.
    """

    root_pid: int
    processes: int
    figures: dict[str, float]
    notes: list[str] = []
    compression: str = "none"


async def greet(channel: Channel) -> Hello:
    """Exchange greetings as the source."""
    await channel.say(Hello(protocol.VERSION, arch.MACHINE, os.uname().release))
    hello = await channel.hear()
    if not isinstance(hello, Hello):
        raise PeerError(f"{channel.peer} does not greet")
    protocol.require_version(hello, channel.peer)
    if hello.machine != arch.MACHINE:
        raise PeerError(f"{channel.peer} is a {hello.machine}; this tree needs {arch.MACHINE}")
    return hello


@asynccontextmanager
async def _greeted(host: str, port: int, secret: bytes, plaintext: bool) -> AsyncIterator[Channel]:
    async with connect(host, port, secret, plaintext=plaintext) as channel:
        await greet(channel)
        yield channel


@interruptible
async def migrate(
    pid: int,
    to: str,
    *,
    secret_file: str | None,
    mode: Mode = "precopy",
    max_downtime_s: float = 0.3,
    max_rounds: int = 30,
    on_timeout: OnTimeout = "switch",
    auto_converge: bool = False,
    plaintext: bool = False,
    externals: Externals | None = None,
    policy: DumpPolicy | None = None,
    compress: Compression = "none",
    streams: int = 1,
    progress: Progress | None = None,
    give_up: Callable[[], bool] | None = None,
) -> MigrateResult:
    """Move the tree below `pid` to the destination that serves at `to`.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        to: HOST:PORT of a running `serve`.
        secret_file: the secret that both sides share.
        mode: ``stop``: the tree stands still while it is sent. ``precopy``: it is sent while it runs, round by round,
            and stands still for what is left. ``postcopy``: it runs over there before its memory is there. ``hybrid``:
            rounds first, then what is left comes later.
        max_downtime_s: with ``precopy``: how long the tree may stand still at the switch, if that can be had.
        max_rounds: how many rounds there may be.
        on_timeout: if it cannot be had: ``switch`` all the same, ``cancel``, or go on with ``postcopy``.
        auto_converge: a tree that writes faster than it can be sent is held back during the rounds: 20 % of its time
            first, and 10 % more with each further round that leaves as much as the ones before.
        plaintext: no TLS; both sides still prove the secret.
        externals: paths of namespaces, by kind, that are external instead of the caller's own.
        policy: decisions about states that have more than one good answer.
        compress: pages with ``lz4``, ``zstd``, not at all, or with what pays (``auto``).
        streams: connections that pages are spread over; one only where pages come later.
        progress: is told how far it is.
        give_up: is asked now and then when the tree is over there and pages are still here: whether not to wait any
            more for a destination that cannot be reached; the tree is lost then. By default: whether Ctrl-C was
            pressed again.

    Raises:
        Refused: the tree cannot be carried; nothing was touched.
        InDoubt: the tree is ended here, and the destination could not be told, or lacks pages.
        PipelineError: it failed; the tree runs on here.

    Cancellation, and Ctrl-C: before the decision the tree runs on; after it the migration completes.
    """
    if not 1 <= streams <= MAX_STREAMS:
        raise UsageError(f"--streams is a number from 1 to {MAX_STREAMS}")
    if streams > 1 and (mode not in ("stop", "precopy") or on_timeout == "postcopy"):
        raise UsageError("--streams does not go with pages that come later: use --mode stop or precopy")
    if auto_converge and mode not in _LIVE:
        raise UsageError("--auto-converge goes with --mode precopy or hybrid: it is for their rounds")
    if secret_file is None:
        raise UsageError("migrate needs --secret-file, the secret that `serve` was given or printed")
    rounds = None
    if mode in _LIVE:
        rounds = Rounds(max_downtime_s, max_rounds, on_timeout, auto_converge, later=mode == "hybrid")
    elif mode == "postcopy":
        rounds = Rounds(max_downtime_s, max_rounds, "switch", later=True, only_draft=True)
    reach = partial(_greeted, *parse_address(to), identity.load_secret(secret_file), plaintext)
    move = partial(
        _moved,
        pid,
        reach,
        begin=time.monotonic(),
        externals=externals,
        policy=policy,
        compress=compress,
        streams=streams,
        progress=progress or NullProgress(),
        give_up=give_up or insisted,
    )
    refused = ""
    notes: list[str] = []
    for is_last in (False, False, True):
        if is_last and mode == "precopy":
            rounds = None  # what stands still is what it was when it is built
        try:
            result = await move(rounds)
        except _DraftRefused as error:
            if is_last or str(error) == refused:
                raise
            refused = str(error)
            notes.append(f"the tree had changed when its draft was built, and was sent anew: {error}")
        else:
            return replace(result, notes=[*notes, *result.notes])
    raise AssertionError("the last one is not tried again")


class _DraftRefused(PeerRefused):
    """The destination cannot build a draft of the tree, which runs on, and may be another one by now."""


async def _moved(
    pid: int,
    reach: Callable[[], AbstractAsyncContextManager[Channel]],
    rounds: Rounds | None,
    *,
    begin: float,
    externals: Externals | None,
    policy: DumpPolicy | None,
    compress: Compression,
    streams: int,
    progress: Progress,
    give_up: Callable[[], bool],
) -> MigrateResult:
    """One try of `migrate`, which see; `begin`: of the first one.

    Args:
        reach: connects to the destination.
        rounds: those before the stop, or only a draft; None: nothing is sent before it.

    Raises:
        _DraftRefused: by the destination.
    """
    later = rounds is not None and (rounds.later or rounds.on_timeout == "postcopy")
    auto_converge = rounds is not None and rounds.auto_converge
    progress.phase("setup")
    migration = secrets.token_hex(16)
    with Beforehand() as known, trio.CancelScope() as scope:
        await refuse_early(pid, externals, policy, known)
        async with tracer_thread() as tracer, reach() as channel:
            packer = channel.writer.packer = Packer(compress)
            processes = len(freeze.walk(pid))  # type: ignore[arg-type]
            await channel.say(Offer(migration, pid, processes, streams, live=rounds is not None, later=later))
            if not isinstance(await channel.hear(), protocol.Accept):
                raise PeerError(f"{channel.peer} did not answer the offer")
            told = _Decision(channel, migration, reach, give_up, progress)
            live = (
                LiveSource(tracer, pid, channel, rounds, externals, policy, known, progress)
                if rounds
                else None
            )
            async with (
                _joined(channel, migration, streams, reach),
                told,
                _rounds_sent(tracer, live),
                _lending(later, migration, reach, progress) as lending,
            ):
                if rounds is None or rounds.only_draft:
                    await warm(channel.writer.pool, pid)
                switch_s = time.monotonic()
                progress.phase("freeze")
                looks = live.looks if live is not None else None
                if live is not None:
                    await live.throttle.set(0)
                async with standstill(tracer, pid, externals, policy, looks=looks, known=known) as still:
                    progress.phase("memory")
                    lasting: Collection[HostPid] = ()
                    if lending is not None and (live is None or live.later):
                        memories = large_memories(still.records, still.sources, _SMALL_BYTES, _MOST_LENT)
                        lasting = await trio.to_thread.run_sync(
                            lending.hold, memories, image_of(still.translated())
                        )
                        if memories and not lasting:
                            still.holdings.complaints.append(_NOTHING_LASTS)
                    lent: list[Lent] = []
                    if live is not None:
                        lent = await live.send_rest(still, lasting)
                        page_bytes = live.page_bytes
                    else:
                        page_bytes = await write_image(
                            channel.writer, still.records, still.sources, still.forest, progress, eager=True
                        )
                    if lending is not None:
                        lending.lend(lent)
                    told.all_sent = True
                    sent_s = time.monotonic()
                    progress.phase("prepare")
                    await still.prepare_end(lasting)
                    await still.let_go_of_files()
                    if not isinstance(await channel.hear(), protocol.Prepared):
                        raise PeerError(f"{channel.peer} did not get ready")
                    prepared_s = time.monotonic()
                    # what came while that was heard has ended those beside us already
                    await trio.lowlevel.checkpoint_if_cancelled()
                    # the decision: from the first kill on the tree is the destination's, and this goes to its end,
                    # whoever beside us fails
                    scope.shield = told.committed = True
                    with trio.CancelScope(shield=True):
                        async with _ended(tracer, still):
                            completed = await told.commit(waiting=lending is not None)
                            # the clocks of two hosts are not compared
                            runs_s = max(prepared_s, time.monotonic() - completed.running_us / 1e6)
                        await tracer.run(still.holdings.settled)
                parts = {
                    "freeze": 1e3 * (still.frozen_s - still.begun_s),
                    "collect": 1e3 * (still.captured_s - still.frozen_s),
                    "last-pages": 1e3 * (sent_s - still.captured_s),
                    "finish": 1e3 * (prepared_s - sent_s),
                    "thaw": 1e3 * (runs_s - prepared_s),
                }
                progress.pause(parts)
                if lending is not None:
                    await lending.send_all(channel, give_up)
    figures = {
        "total-time": 1e3 * (time.monotonic() - begin),
        "setup-time": 1e3 * ((switch_s if live is None else live.begun_s) - begin),
        "downtime": 1e3 * (runs_s - still.begun_s),
        "freeze-time": parts["freeze"],
        "collect-time": parts["collect"],
        "transfer-time": parts["last-pages"],
        "finish-time": parts["finish"],
        "thaw-time": parts["thaw"],
        "transferred": channel.writer.total_bytes(),
        "page-bytes": page_bytes,
        "injected-calls": still.injected_calls,
        **packer.figures(),
    }
    notes = still.holdings.complaints
    if lending is not None:
        figures["postcopy-requests"] = lending.requests
        figures["postcopy-bytes"] = lending.bytes_done
    if live is not None:
        notes = [*live.notes, *notes]
        figures["dirty-sync-count"] = live.rounds_done
        figures["draft-time"] = 1e3 * live.draft_s
        if auto_converge:
            figures["cpu-throttle-percentage"] = live.throttle.most_percentage
            figures["throttle-time"] = 1e3 * live.throttle.held_s
    return MigrateResult(
        root_pid=completed.root_pid,
        processes=still.processes,
        figures=figures,
        compression=packer.chosen(),
        notes=notes,
    )


@asynccontextmanager
async def _joined(
    channel: Channel,
    migration: str,
    streams: int,
    reconnect: Callable[[], AbstractAsyncContextManager[Channel]],
) -> AsyncIterator[None]:
    """Further connections of the migration, over which `channel` spreads pages in the block."""
    if streams == 1:
        yield
        return
    async with AsyncExitStack() as stack:
        others = []
        for _ in range(streams - 1):
            other = await stack.enter_async_context(reconnect())
            await other.say(Join(migration))
            if not isinstance(await other.hear(), protocol.Accept):
                raise PeerError(f"{other.peer} did not take a further connection")
            others.append(other.writer)
        channel.writer = writer = SpreadWriter(channel.writer, others)
        await stack.enter_async_context(beside(writer.run))
        yield


@asynccontextmanager
async def _rounds_sent(tracer: Tracer, live: LiveSource | None) -> AsyncIterator[None]:
    """The tree is sent as far as that can be done while it runs, if it is to be."""
    if live is None:
        yield
        return
    try:
        async with beside(live.throttle.run):
            try:
                await live.send_rounds()
            except PeerRefused as refused:
                raise _DraftRefused(str(refused)) from refused
            yield
    finally:
        with trio.CancelScope(shield=True):
            await live.throttle.set(0)
            await tracer.run(live.close)


@asynccontextmanager
async def _ended(tracer: Tracer, still: Standstill) -> AsyncIterator[None]:
    """The tree runs nothing any more here, and has ended behind the block: before it, where that may be seen."""
    if still.end_may_be_seen:
        await tracer.run(still.end)
        yield
        return
    failed: list[Exception] = []

    async def end() -> None:
        try:
            await tracer.run(still.end)
        except Exception as error:  # noqa: BLE001 (the destination is told all the same)
            failed.append(error)

    still.kill()
    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            yield
    if failed:
        raise failed[0]


@asynccontextmanager
async def _lending(
    later: bool,
    migration: str,
    reconnect: Callable[[], AbstractAsyncContextManager[Channel]],
    progress: Progress,
) -> AsyncIterator[Lending | None]:
    """Who sends what comes later, on a connection of its own where somebody waits; None where nothing does."""
    if not later:
        yield None
        return
    async with Lending(migration, reconnect, progress) as lending, beside(lending.attend):
        yield lending


class _Decision:
    """What the source has decided, and that the destination hears of it; a context manager around the standstill.

    If the block fails before the decision, the tree runs on here first, and then a destination that
    may stand prepared is told to give its own up: else it would hold it, in doubt, for a person to settle.

    Args:
        channel: of the migration.
        migration: its id.
        reconnect: makes a new connection, greeted.
        give_up: says when the destination is not to be told any more; it is tried once in any case.
        progress: hears how it goes.
    """

    def __init__(
        self,
        channel: Channel,
        migration: str,
        reconnect: Callable[[], AbstractAsyncContextManager[Channel]],
        give_up: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self._progress = progress
        self._give_up = give_up
        self._channel = channel
        self._migration = migration
        self._reconnect = reconnect
        #: all frames are written: the destination may be prepared
        self.all_sent = False
        #: the tree is ended here
        self.committed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self.all_sent and not self.committed:
            with trio.CancelScope(shield=True):
                await self._take_back()

    async def commit(self, waiting: bool) -> Completed:
        """Tell that the tree is ended here, on a new connection if this one is broken.

        Args:
            waiting: memory of the tree lasts here: it is tried until somebody gives up; else for `_SETTLE_S`.

        Raises:
            InDoubt: the destination could not be told.
        """
        reason = "it does not answer"
        try:
            with trio.fail_after(_COMPLETE_S):
                await self._channel.say(Commit())
                answer = await self._channel.hear()
                if isinstance(answer, Completed):
                    return answer
        except PeerRefused as refused:
            raise self._lost(refused) from refused
        except (PeerError, trio.TooSlowError) as error:
            reason = str(error) or reason
        if waiting:
            self._progress.phase("postcopy-paused")
        deadline = trio.current_time() + (math.inf if waiting else _SETTLE_S)
        async with move_on_when(self._give_up):
            while trio.current_time() < deadline:
                await trio.sleep(_SETTLE_PAUSE_S)
                try:
                    answer = await self._decide(_COMPLETE_S)
                    if isinstance(answer, Completed):
                        return answer
                except PeerRefused as refused:
                    raise self._lost(refused) from refused
                except (PeerError, trio.TooSlowError) as error:
                    reason = str(error) or reason
        raise InDoubt(
            f"the tree is ended here, and {self._channel.peer} could not be told ({reason}). If `serve` still runs "
            f"there, it holds the tree of migration {self._migration}, stopped: send SIGUSR1 to that serve process "
            "to let it run"
        )

    @staticmethod
    def _lost(refused: PeerRefused) -> InDoubt:
        return InDoubt(f"the tree is ended here, and does not run there: {refused}")

    async def _decide(self, within_s: float) -> protocol.AnyMessage:
        with trio.fail_after(within_s):
            async with self._reconnect() as again:
                await again.say(Decision(self._migration, self.committed))
                return await again.hear()

    async def _take_back(self) -> None:
        """Tell the destination that the tree stays here, until it says that it has given up; or for a while."""
        try:
            with trio.fail_after(_TAKE_BACK_TRY_S):
                await self._channel.say(Cancel())
                while True:
                    await self._channel.hear()
        except PeerRefused:
            return
        except (PeerError, trio.TooSlowError):
            pass  # a new connection
        async with move_on_when(self._give_up):
            with trio.move_on_after(_TAKE_BACK_S):
                while True:
                    try:
                        await self._decide(_TAKE_BACK_TRY_S)
                    except PeerRefused:
                        return
                    except (PeerError, trio.TooSlowError):
                        self._progress.phase("take-back")
                        await trio.sleep(_SETTLE_PAUSE_S)
