"""The lender: sends the pages of a tree that runs elsewhere already, and of which only the memory is still here.

The processes have ended, as they do at the end of every migration; their memory lasts (`pipeline.kernel.lasting`).

Two connections: on one go all pages, in the order of their addresses, from the place on where one was asked for last;
on the other, those that somebody waits for, with their neighbours, so that none waits behind the many. No page is sent
twice, unless a connection broke: the first of them is begun anew by what the other side lacks; what went on the second
goes once more on the first.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Self

import msgspec
import trio
from msgspec.structs import replace

from pipeline.errors import InDoubt, PeerError, PeerRefused, PipelineError, ungrouped
from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.codec import Image
from pipeline.image.frames import PageRun
from pipeline.interrupts import move_on_when
from pipeline.kernel.lasting import LastingMemory
from pipeline.kernel.pagemap import Range, intersect, subtract
from pipeline.kernel.syscalls import IOV_MAX, read_memory
from pipeline.progress import Progress
from pipeline.resources.memory import later
from pipeline.resources.memory.missing import RangeSet
from pipeline.resources.memory.pages import Segment
from pipeline.stages.memory import PageSource, ProcessPages
from pipeline.stages.outliving import Memory
from pipeline.transport.protocol import AnyMessage, Attend, Completed, Lacking, Resume, Want, Whole
from pipeline.transport.tcp import Channel

#: what is sent at once of the many: small enough that who is asked for is not kept waiting by our own processors
_PIECE_BYTES = 1 << 20
#: what is sent around a page that somebody waits for
_AROUND_BYTES = 64 << 10
_ROBUST_HEAD = struct.Struct("<3Q")
_PAUSE_S = 1.0


class Lent(msgspec.Struct, frozen=True):
    """What of a process comes later: `runs` by address."""

    space: int
    pid: HostPid
    runs: Sequence[Range]


def split(
    image: Image, sources: Sequence[PageSource], lasting: Collection[HostPid]
) -> tuple[list[PageSource], list[Lent]]:
    """What of `sources` is sent before the tree runs, and what may come later.

    Args:
        image: the tree as it stands still.
        sources: of the pages that the destination lacks.
        lasting: whose memory lasts. What children are forked from that are not born yet, must be there, though.
    """
    sooner: list[PageSource] = []
    lent: list[Lent] = []
    for source in sources:
        if (
            isinstance(source, ProcessPages)
            and source.pid in lasting
            and not later.is_copied(image, source.space)
        ):
            may_wait = later.may_wait(image, image.spaces[source.space])
            if runs := intersect(source.runs, may_wait):
                lent.append(Lent(source.space, source.pid, runs))
                source = replace(source, runs=subtract(source.runs, may_wait))
        sooner.append(source)
    return sooner, lent


def _holds_robust_mutexes(pid: HostPid, head: int) -> bool:
    """Whether the robust list with this `struct robust_list_head` is not empty.

    Source: get_robust_list(2), Documentation/locking/robust-futexes.rst.
    """
    try:
        raw = read_memory(pid, RemoteAddress(head), _ROBUST_HEAD.size)
    except OSError:
        return False
    first, _, pending = _ROBUST_HEAD.unpack(raw)
    return bool(first != head or pending)


@dataclass
class _Memory:
    memory: LastingMemory
    left: RangeSet


class Lending:
    """See the module; a context manager.

    Args:
        migration: its id.
        reconnect: makes a new connection, greeted.
        progress: is told how far it is, and when it waits for the network.
    """

    def __init__(
        self,
        migration: str,
        reconnect: Callable[[], AbstractAsyncContextManager[Channel]],
        progress: Progress,
    ) -> None:
        self._migration = migration
        self._reconnect = reconnect
        self._progress = progress
        self._lasting: dict[HostPid, LastingMemory] = {}
        self._memories: dict[int, _Memory] = {}
        self._next: tuple[int, int] = (0, 0)
        #: set, and replaced, when something is to be sent once more
        self._again = trio.Event()
        self._total_bytes = 0
        self.requests = 0
        self.bytes_done = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close)

    def _close(self) -> None:
        while self._lasting:
            self._lasting.popitem()[1].close()

    def hold(self, memories: Iterable[Memory], image: Image) -> Collection[HostPid]:
        """Let memories last, as far as this user may do so; of whom they are. In any thread.

        Not those in which a thread holds robust mutexes: at its end the kernel would write into them that it has died.

        Args:
            memories: of a tree that stands still.
            image: of it.
        """
        heads: dict[int | None, set[int]] = defaultdict(set)
        for process in image.processes.values():
            heads[process.space] |= {thread.robust_list[0] for thread in process.threads}
        for memory in memories:
            if any(head and _holds_robust_mutexes(memory.pid, head) for head in heads[memory.space]):
                continue
            try:
                self._lasting[memory.pid] = LastingMemory(memory.pid, memory.page)
            except (OSError, RuntimeError):
                break  # then its pages go before it runs
        return self._lasting.keys()

    def lend(self, lent: Sequence[Lent]) -> None:
        """This is what comes later, of memories that last."""
        for one in lent:
            self._memories[one.space] = _Memory(self._lasting[one.pid], RangeSet(one.runs))
        self._total_bytes = self._left_bytes()

    def _left_bytes(self) -> int:
        return sum(memory.left.total() for memory in self._memories.values())

    # -- the way of the many ------------------------------------------------------------------

    async def send_all(self, channel: Channel, give_up: Callable[[], bool]) -> None:
        """Send until the destination says that no page is missing any more; waits out a network that is gone.

        Args:
            channel: of the migration, on which `Completed` was heard.
            give_up: is asked now and then whether no more is to be sent.

        Raises:
            InDoubt: the destination knows nothing of the tree any more, or it is given up.
            PipelineError: the memory here is gone.
        """
        self._progress.phase("postcopy")
        attempt: Callable[[], Awaitable[None]] = lambda: self._send_over(channel)  # noqa: E731
        async with move_on_when(give_up):
            while not await self._survives(attempt):
                self._progress.phase("postcopy-paused")
                await trio.sleep(_PAUSE_S)
                attempt = self._resume
            return
        raise InDoubt(
            f"given up: pages were missing at {channel.peer}, and the tree cannot live without them"
        )

    @staticmethod
    async def _survives(attempt: Callable[[], Awaitable[None]]) -> bool:
        try:
            await attempt()
        except PeerRefused as refused:
            raise InDoubt(f"the tree is ended here, and lost: {refused}") from refused
        except PeerError:
            return False
        return True

    async def _resume(self) -> None:
        async with self._reconnect() as channel:
            await channel.say(Resume(self._migration))
            lacking: dict[int, RangeSet] = {space: RangeSet() for space in self._memories}
            while isinstance(answer := await channel.hear(), Lacking):
                for start, end in answer.ranges:
                    self._memory_of(answer.space)
                    lacking[answer.space].add(start, end)
            if isinstance(answer, Whole):
                return
            if not isinstance(answer, Completed):
                raise PeerError(f"{channel.peer} does not say what it lacks")
            for space, memory in self._memories.items():
                memory.left = lacking[space]
            self._progress.phase("postcopy")
            await self._send_over(channel)

    async def _send_over(self, channel: Channel) -> None:
        broken: list[PeerError] = []

        async def send(nursery: trio.Nursery) -> None:
            try:
                await self._send_pages(channel)
            except PeerError as error:
                broken.append(error)
                nursery.cancel_scope.cancel()

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, nursery)
                while not isinstance(await channel.hear(), Whole):
                    pass
                nursery.cancel_scope.cancel()
                return
        raise broken[0]

    async def _send_pages(self, channel: Channel) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while True:
            while (found := self._take_next()) is not None:
                await self._send(channel, *found, buffer)
            await self._again.wait()

    def _take_next(self) -> tuple[int, list[Segment]] | None:
        """Pages from the place where one was asked for last."""
        space, address = self._next
        spaces = [number for number, memory in self._memories.items() if memory.left]
        if not spaces:
            return None
        if space not in spaces:
            space, address = spaces[0], 0
        left = self._memories[space].left
        segments: list[Segment] = []
        room = _PIECE_BYTES
        while room and len(segments) < IOV_MAX and (found := left.at_or_behind(address)) is not None:
            if segments and found[0] < address:
                break  # round the corner: the segments of a frame ascend
            start, end = found[0], min(found[1], found[0] + room)
            left.cut(start, end)
            segments.append((start, end - start))
            room -= end - start
            address = end
        self._next = space, address
        return space, segments

    # -- the way of those that are waited for -----------------------------------------------------

    async def attend(self) -> None:
        """Answer on a connection of its own, until cancelled; to be begun before anybody can wait."""
        buffer = memoryview(bytearray(_AROUND_BYTES))
        while True:
            answers: list[tuple[int, Sequence[Range]]] = []
            with suppress(PeerError):
                async with self._reconnect() as channel:
                    await channel.say(Attend(self._migration))
                    await channel.hear()
                    while True:
                        await self._answer(channel, await channel.hear(), buffer, answers)
            # nobody knows which of them have arrived
            for space, ranges in answers:
                for start, end in ranges:
                    self._memories[space].left.add(start, end)
            self._again.set()
            self._again = trio.Event()
            await trio.sleep(_PAUSE_S)

    async def _answer(
        self,
        channel: Channel,
        wanted: AnyMessage,
        buffer: memoryview,
        answers: list[tuple[int, Sequence[Range]]],
    ) -> None:
        if not isinstance(wanted, Want):
            raise PeerError(f"{channel.peer} asks for no page")
        self.requests += 1
        start = wanted.address - wanted.address % _AROUND_BYTES
        cut = self._memory_of(wanted.space).left.cut(start, start + _AROUND_BYTES)
        self._next = wanted.space, start + _AROUND_BYTES
        if cut:
            answers.append((wanted.space, cut))
            await self._send(channel, wanted.space, [(a, b - a) for a, b in cut], buffer)

    def _memory_of(self, space: int) -> _Memory:
        if space not in self._memories:
            raise PeerError(f"pages of space {space} are wanted, of which none were left here")
        return self._memories[space]

    async def _send(
        self, channel: Channel, space: int, segments: Sequence[Segment], buffer: memoryview
    ) -> None:
        try:
            count = await trio.to_thread.run_sync(self._memories[space].memory.read, segments, buffer)
        except OSError as error:
            raise PipelineError(f"pages of the tree are lost: {error}") from error
        await channel.writer.pages(PageRun(space, tuple(segments), buffer[:count]))
        await channel.writer.flush()
        self.bytes_done += count
        self._progress.advance(self.bytes_done, self._total_bytes)
