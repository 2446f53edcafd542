"""Serving: trees arrive and run here.

::

    wire ─ read ─ namespace-translate ─ rebuild ─ fill ─ prepared ... commit ─ thaw

A tree is built while it comes; nothing of it runs before the source has said that it has
ended its own. A source that is lost before that word leaves the tree *in doubt*: it is
held, stopped, until the source comes back with its decision, or a person decides
(SIGUSR1: it runs here; SIGINT: it is given up).

With post-copy a tree runs before its memory is there; as long as pages are missing, it does not outlive this process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from pipeline.arriving import arrived, arrived_live
from pipeline.errors import ImageError, PeerError, RebuildError, Refused, exhausted, ungrouped
from pipeline.ids import HostPid
from pipeline.interrupts import insisted, interruptible
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.paging import DEVICE
from pipeline.policy import RestorePolicy
from pipeline.progress import NullProgress, Progress
from pipeline.remote.tracer import Tracer, tracer_thread
from pipeline.resources.memory.watch import check_here
from pipeline.resources.registry import kinds
from pipeline.restore import RestoredTree
from pipeline.stages.borrowing import Borrowing
from pipeline.stages.rebuild import Rebuilding, Terms
from pipeline.transport import identity, protocol, tcp
from pipeline.transport.buffers import BufferPool
from pipeline.transport.framing import Message
from pipeline.transport.protocol import (
    Accept,
    Attend,
    Commit,
    Completed,
    Decision,
    Hello,
    Join,
    Offer,
    Prepared,
    Refuse,
    Resume,
    Whole,
)
from pipeline.transport.spread import SpreadReader, beside
from pipeline.transport.tcp import Channel, parse_address
from pipeline.userns.cradle import owns_pid_namespace
from pipeline.userns.destination import Unmapped, check_options
from pipeline.userns.externals import Externals

#: between two questions whether to wait no more
_ASK_S = 0.2


@dataclass
class _Held:
    """A tree that stands here, prepared, until its source has decided; in doubt, until somebody has."""

    migration: str
    peer: str
    in_doubt: bool = False
    decided: trio.Event = field(default_factory=trio.Event)
    committed: bool = False
    running: trio.Event = field(default_factory=trio.Event)

    def decide(self, committed: bool) -> None:
        """Settle it; the first word counts."""
        if not self.decided.is_set():
            self.committed = committed
            self.decided.set()

    @property
    def is_given_up(self) -> bool:
        """It is decided that the tree does not run here."""
        return self.decided.is_set() and not self.committed


class _Runs(NamedTuple):
    """A tree that runs here, since that moment on the clock of time.monotonic."""

    root_pid: HostPid
    since_s: float


@dataclass
class _Company:
    """Further connections of a migration: `wanted` of them, which last until it is `over`."""

    wanted: int
    others: list[Channel] = field(default_factory=list)
    accepted: int = 0
    complete: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)


class _Server:
    """What the connections of one `serve` share."""

    def __init__(
        self,
        tracer: Tracer,
        terms: Terms,
        progress: Progress,
        restored: Callable[[RestoredTree], None],
        said: Callable[[str], None],
        arrived: trio.Event,
        nursery: trio.Nursery,
    ) -> None:
        self._nursery = nursery
        self._tracer = tracer
        self._terms = terms
        self._progress = progress
        self._restored = restored
        self._said = said
        self._arrived = arrived
        self._held: dict[str, _Held] = {}
        self._settled: dict[str, _Runs] = {}
        #: migrations whose trees have come to an end here before they ran: why
        self._lost: dict[str, str] = {}
        self._companies: dict[str, _Company] = {}
        self._borrowings: dict[str, Borrowing] = {}
        #: migrations of which no page is missing any more
        self._whole: set[str] = set()
        #: migrations that may be cancelled: their trees run at their sources
        self._on_their_way: set[trio.CancelScope] = set()
        self._winding_down = False

    async def wind_down(self, give_up: Callable[[], bool]) -> None:
        """Give up what is on its way or in doubt, and wait for what only this process can bring to its end.

        That are trees whose sources have been told that all is prepared, and may have ended theirs already; and trees
        that run here while pages of them are missing.

        Args:
            give_up: is asked now and then whether to wait no more; those trees may be lost then.
        """
        self._winding_down = True
        for scope in self._on_their_way:
            scope.cancel()
        self.decide_all(committed=False)
        if waited_for := self._waited_for():
            self._said(
                f"waiting for {', and for '.join(waited_for)}. ^C again waits no more, and may lose a tree"
            )
        while self._waited_for() and not give_up():
            await trio.sleep(_ASK_S)

    def _waited_for(self) -> list[str]:
        """What cannot be given up without the danger that a tree runs nowhere."""
        deciding = {
            one.migration: f"the word of {one.peer}, whose tree stands here (migration {one.migration})"
            for one in self._held.values()
            if not (one.is_given_up or one.running.is_set())
        }
        lacking = {
            migration: f"missing pages of the tree of pid {self._settled[migration].root_pid} (migration {migration})"
            for migration, borrowing in self._borrowings.items()
            if borrowing.begun and migration in self._settled
        }
        return [*deciding.values(), *lacking.values()]

    def decide_all(self, committed: bool) -> None:
        """A person decides about everything that is in doubt; what is not, is its source's to decide."""
        for held in self._held.values():
            if held.in_doubt:
                held.decide(committed)

    async def handle(self, channel: Channel) -> None:
        """One connection: a migration, or the decision about an earlier one."""
        hello = await channel.hear()
        if not isinstance(hello, Hello):
            raise PeerError(f"{channel.peer} does not greet")
        await channel.say(Hello(protocol.VERSION, arch.MACHINE, os.uname().release))
        protocol.require_version(hello, channel.peer)
        match await channel.hear():
            case Offer() as offer:
                await self._receive(channel, offer)
            case Join() as join:
                await self._join(channel, join)
            case Attend() as attend:
                await self._attend(channel, attend)
            case Resume() as resume:
                await self._resume(channel, resume)
            case Decision() as decision:
                await self._settle(channel, decision)
            case _:
                raise PeerError(f"{channel.peer} neither offers nor decides")

    # -- a migration ---------------------------------------------------------------------

    async def _join(self, channel: Channel, join: Join) -> None:
        """A further connection of a migration, which holds it as long as it lasts."""
        company = self._companies.get(join.migration)
        if company is None or len(company.others) == company.wanted:
            await self._refuse(channel, f"nobody waits here for a connection of migration {join.migration}")
            return
        company.others.append(channel)
        await channel.say(Accept())
        company.accepted += 1
        if company.accepted == company.wanted:
            company.complete.set()
        await company.over.wait()

    @asynccontextmanager
    async def _accompanied(self, channel: Channel, offer: Offer) -> AsyncIterator[None]:
        """The further connections that the offer speaks of, over which `channel` reads in the block."""
        if offer.streams == 1:
            await channel.say(Accept())
            yield
            return
        if offer.migration in self._companies:
            raise PeerError(f"{channel.peer} offers migration {offer.migration} twice")
        company = self._companies[offer.migration] = _Company(offer.streams - 1)
        first = channel.reader
        try:
            await channel.say(Accept())
            with trio.move_on_after(tcp.HANDSHAKE_S):
                await company.complete.wait()
            if not company.complete.is_set():
                raise PeerError(f"{channel.peer} did not make the {offer.streams} connections it spoke of")
            channel.reader = reader = SpreadReader(first, [other.reader for other in company.others])
            async with beside(reader.run):
                yield
        finally:
            channel.reader = first
            company.over.set()
            del self._companies[offer.migration]

    async def _receive(self, channel: Channel, offer: Offer) -> None:
        if offer.later:
            try:
                check_here()
            except OSError as error:
                await self._refuse(channel, _no_paging(error))
                return
        if self._winding_down:
            await self._refuse(channel, "this `serve` is about to end")
            return
        with trio.CancelScope() as way:
            self._on_their_way.add(way)
            try:
                async with self._warming(channel.reader.pool, offer), self._accompanied(channel, offer):
                    await self._take(channel, offer, way)
            finally:
                self._on_their_way.discard(way)

    @staticmethod
    def _warming(pool: BufferPool, offer: Offer) -> AbstractAsyncContextManager[None]:
        """The buffers of a tree that is sent while it stands still are touched first, beside; rounds would do that."""
        return nullcontext() if offer.live else beside(partial(pool.warm, pool.count * pool.size_bytes))

    async def _take(self, channel: Channel, offer: Offer, way: trio.CancelScope) -> None:
        try:
            terms = msgspec.structs.replace(self._terms, live=offer.live, later=offer.later)
            arriving = arrived_live if offer.live else arrived
            async with (
                self._borrowing(offer),
                arriving(channel, self._tracer, self._progress, terms) as (rebuilding, page_bytes),
            ):
                await trio.lowlevel.checkpoint_if_cancelled()
                self._on_their_way.discard(way)
                if offer.later:
                    self._borrowings[offer.migration].prepare(rebuilding.take_watched(), rebuilding.victims())
                await self._await_commit(channel, offer, rebuilding, page_bytes)
            if offer.later and channel.conversation.state == "completed":
                await self._borrowings[offer.migration].take_all(channel)
            if channel.conversation.state == "cancelling":
                await self._refuse(channel, "given up, as the source wishes")
        except (RebuildError, ImageError, Refused) as error:
            self._said(f"{channel.peer}: {error}")
            await self._refuse(channel, str(error))
        except PeerError:
            raise
        except Exception as error:  # noqa: BLE001 (a mistake in here must not cost others their trees)
            if told := exhausted(error):
                self._said(f"{channel.peer}: {told}")
                await self._refuse(channel, str(told))
                return
            self._said(
                f"{channel.peer}: an error of this program:\n{''.join(traceback.format_exception(error))}"
            )
            await self._refuse(channel, f"an error of `serve`: {error!r}")

    @asynccontextmanager
    async def _borrowing(self, offer: Offer) -> AsyncIterator[None]:
        """What a tree needs whose pages come later, if they do; it stays when the tree runs."""
        if not offer.later:
            yield
            return
        borrowing = self._borrowings[offer.migration] = Borrowing()
        try:
            yield
        finally:
            if not borrowing.begun:
                del self._borrowings[offer.migration]
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(borrowing.give_up)

    @staticmethod
    async def _refuse(channel: Channel, reason: str) -> None:
        with trio.move_on_after(5) as scope:
            scope.shield = True
            try:
                await channel.say(Refuse(reason[:60_000]))
                await _drain(channel)
            except PeerError:
                return

    async def _await_commit(
        self, channel: Channel, offer: Offer, rebuilding: Rebuilding, page_bytes: int
    ) -> None:
        held = self._held[offer.migration] = _Held(offer.migration, channel.peer)
        tree: RestoredTree | None = None
        try:
            # whatever it needs of this host, it has before the source may end its tree
            tree = RestoredTree(rebuilding.root_pid, rebuilding.child_pid, {"page-bytes": page_bytes})
            # if that cannot be said, it is not heard: the source runs on
            await channel.say(Prepared())
            try:
                word = await channel.hear()
            except PeerError as lost:
                await self._in_doubt(channel, offer, held, lost)
                if not held.committed:
                    self._said(f"the tree of migration {offer.migration} is given up")
                    return
                await self._run(held, rebuilding, tree)
                tree = None
                return
            if isinstance(word, Commit):
                with trio.CancelScope(shield=True):
                    await self._run(held, rebuilding, tree)
                    tree = None
                    await channel.say(self._completed(offer.migration))
            else:
                self._said(f"{channel.peer} keeps its tree")
        except trio.Cancelled:
            self._said(
                f"migration {offer.migration}: ended while it was not decided; the tree is given up here"
            )
            raise
        finally:
            del self._held[offer.migration]
            if tree is not None:
                tree.close()

    async def _in_doubt(self, channel: Channel, offer: Offer, held: _Held, lost: PeerError) -> None:
        held.in_doubt = True
        self._said(
            f"in doubt: {lost}. The tree of pid {offer.root} of {channel.peer} stands here, stopped "
            f"(migration {offer.migration}). If it runs on over there, press ^C here; if it is gone there, "
            f"let it run here: kill -USR1 {os.getpid()}"
        )
        await held.decided.wait()

    def _completed(self, migration: str) -> Completed:
        """What a source is told of a tree that runs here."""
        runs = self._settled[migration]
        return Completed(runs.root_pid, int((time.monotonic() - runs.since_s) * 1e6))

    async def _run(self, held: _Held, rebuilding: Rebuilding, tree: RestoredTree) -> None:
        """Let the tree run; from then on `tree` is not the caller's any more."""
        borrowing = self._borrowings.get(held.migration)
        try:
            if borrowing is not None:
                borrowing.begin()
                self._nursery.start_soon(self._bring_pages, held.migration, borrowing, rebuilding.root_pid)
            with trio.CancelScope(shield=True):
                root = await self._tracer.run(rebuilding.thaw)
        except BaseException as error:
            self._lost[held.migration] = str(error)
            held.running.set()
            if borrowing is not None and borrowing.begun:
                borrowing.stop()
            raise
        self._settled[held.migration] = _Runs(root, rebuilding.runs_since_s)
        held.running.set()
        tree.notes += rebuilding.notes
        self._nursery.start_soon(self._collect, tree)
        try:
            self._restored(tree)
        except Exception as error:  # noqa: BLE001 (it runs, and that is what its source has to be told)
            self._said(f"the tree of pid {root} runs, and whoever is told of it has failed: {error!r}")
        if borrowing is None:
            self._arrived.set()

    async def _bring_pages(self, migration: str, borrowing: Borrowing, root: HostPid) -> None:
        try:
            await borrowing.run()
        except (OSError, RebuildError) as error:
            self._said(f"pages cannot be put in place: {error}")
        finally:
            del self._borrowings[migration]
            if borrowing.pager.whole.is_set():
                self._whole.add(migration)
            else:
                why = f"the tree of pid {root} is ended: pages of it were missing"
                self._lost.setdefault(migration, why)
                self._said(f"{why} (migration {migration})")
        self._arrived.set()

    @staticmethod
    async def _collect(tree: RestoredTree) -> None:
        """Its root is our child: take its end when it comes."""
        try:
            await tree.wait()
        finally:
            tree.close()

    # -- a decision ------------------------------------------------------------------------

    async def _settle(self, channel: Channel, decision: Decision) -> None:
        held = self._held.get(decision.migration)
        if held is not None:
            held.decide(decision.committed)
            if decision.committed:
                await held.running.wait()
        if decision.migration in self._settled:
            await channel.say(self._completed(decision.migration))
        else:
            unknown = f"nothing is known here of migration {decision.migration}"
            await channel.say(Refuse(self._lost.get(decision.migration, unknown)))

    async def _attend(self, channel: Channel, attend: Attend) -> None:
        borrowing = self._borrowings.get(attend.migration)
        if borrowing is None:
            await self._refuse(channel, f"no page is missing here of migration {attend.migration}")
            return
        await borrowing.attend(channel)

    async def _resume(self, channel: Channel, resume: Resume) -> None:
        held = self._held.get(resume.migration)
        if held is not None:
            held.decide(committed=True)
            await held.running.wait()
        borrowing = self._borrowings.get(resume.migration)
        if resume.migration in self._whole:
            await channel.say(Whole())
            await _drain(channel)
        elif borrowing is None or not borrowing.begun:
            unknown = f"nothing is known here of migration {resume.migration}"
            await channel.say(Refuse(self._lost.get(resume.migration, unknown)))
        else:
            try:
                await borrowing.resume(channel, self._completed(resume.migration))
            except RebuildError as error:
                await self._refuse(channel, str(error))


def _no_paging(error: OSError) -> str:
    """Why pages cannot come later, and what to do."""
    why = f"page faults of programs cannot be answered here: {DEVICE}: {error.strerror}"
    return f"{why}; run `serve` as root of the machine, or send the tree with --mode precopy"


async def _drain(channel: Channel) -> None:
    """Read until the other side has gone, so that what we said last is not lost in a reset."""
    while (item := await channel.reader.next()) is not None:
        if not isinstance(item, Message) and hasattr(item, "lease"):
            item.lease.release()


@interruptible
async def serve(
    listen: str,
    *,
    secret_file: str | None,
    once: bool = False,
    new_pidns: bool = False,
    map: str = "same",  # noqa: A002 (the option's name on the command line)
    unmapped: Unmapped = "refuse",
    externals: Externals | None = None,
    policy: RestorePolicy | None = None,
    plaintext: bool = False,
    on_listening: Callable[[str, int, str | None], None],
    on_restored: Callable[[RestoredTree], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    give_up: Callable[[], bool] | None = None,
) -> None:
    """Receive trees until cancelled.

    Args:
        listen: HOST:PORT to listen on; port 0 picks one.
        secret_file: the secret that both sides share; None makes one, which `on_listening` is told.
        once: end when one tree has arrived.
        new_pidns: give every tree a pid namespace of its own.
        map, unmapped, externals, policy: see `pipeline.restore`.
        plaintext: no TLS; both sides still prove the secret.
        on_listening: told host, port, and the secret if it was made here.
        on_restored: given each tree that runs; it is waited for here.
        on_message: told what went wrong with a peer, and what is in doubt.
        progress: is told how far it is.
        give_up: once cancelled: is asked now and then whether not to wait any more for what is said below. By default:
            whether Ctrl-C was pressed again.

    Raises:
        UsageError: the address or the secret cannot be used.

    Cancellation, and Ctrl-C: a tree that is on its way is given up here, and runs on at its source. If its source has
    been told that all is prepared, its word is waited for, because it may have ended its tree already; and where a tree
    runs here of which pages are missing, those are waited for. Who is not waited for may be lost.
    """
    give_up = give_up or insisted
    host, port = parse_address(listen)
    check_options(map, unmapped)
    made = identity.generate_secret() if secret_file is None else None
    secret = identity.load_secret(secret_file) if secret_file is not None else (made or "").encode()
    new_pidns = new_pidns or not owns_pid_namespace()
    arrived = trio.Event()
    kinds()  # what it imports would be imported while a tree stands still

    def quiet(*_: object) -> None:
        """Nobody wants to know."""

    terms = Terms(new_pidns, map, unmapped, externals or {}, replace(policy or RestorePolicy(), moves=True))
    with ungrouped():
        async with tracer_thread() as tracer, trio.open_nursery() as heeding:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    server = _Server(
                        tracer,
                        terms,
                        progress or NullProgress(),
                        on_restored or quiet,
                        on_message or quiet,
                        arrived,
                        nursery,
                    )
                    heeding.start_soon(_wind_down_when_cancelled, server, give_up, nursery.cancel_scope)
                    if threading.current_thread() is threading.main_thread():
                        nursery.start_soon(_listen_to_person, server)

                    async def run() -> None:
                        await tcp.listen(
                            host,
                            port,
                            secret,
                            server.handle,
                            plaintext=plaintext,
                            listening=lambda h, p: on_listening(h, p, made),
                            failed=on_message or quiet,
                        )

                    nursery.start_soon(run)
                    if once:
                        await arrived.wait()
                        heeding.cancel_scope.cancel()


async def _wind_down_when_cancelled(
    server: _Server, give_up: Callable[[], bool], work: trio.CancelScope
) -> None:
    """Wait to be cancelled, and then let `work` end in an orderly way."""
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await server.wind_down(give_up)
        work.cancel()


async def _listen_to_person(server: _Server) -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            server.decide_all(committed=True)
