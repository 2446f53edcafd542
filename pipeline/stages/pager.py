"""The pager: brings the pages of a tree that runs already, and whose memory is still elsewhere.

Whoever touches a missing page waits in the kernel, which tells here where; the page is asked for, and put in place
when it comes, as are all the others that come unasked. Whatever the tree does with its mappings meanwhile, the kernel
tells before it goes on: a child that it forks lacks what its parent lacks, what is moved is missing where it is now,
and what is dropped or unmapped is not missed any more.

What two threads do at the same time may be told in another order than it has happened in: whether a child was forked
before or behind a move cannot be known. What was moved is missing in both places of the child then: where it is not,
there is no mapping, and it is left out when it comes. When everything was told, and nobody waits for that any longer,
the doubt is over (`pipeline.kernel.paging.is_calm`).

A page that was never anywhere is zeros. While the way to the source is broken, whoever needs a page waits. If we
cannot go on, the tree is killed rather than shown zeros (`pipeline.remote.guard`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import trio

from pipeline.errors import ungrouped
from pipeline.ids import HostPid, LocalFd
from pipeline.image.frames import PageRun
from pipeline.kernel import paging, uffdio
from pipeline.kernel.pagemap import PAGE_BYTES, Range, subtract
from pipeline.kernel.paging import Dropped, Event, Fault, Forked, Moved
from pipeline.ledger import LEDGER
from pipeline.remote.guard import Guard
from pipeline.resources.memory.missing import Missing, Place, RangeSet
from pipeline.resources.memory.watch import ENTRY

#: the kernel is let go on with what it is changing
_PATIENCE_S = 0.0002
#: how long there may be doubt about the order of events, if there are always more
_DOUBT_S = 0.1
#: how long memory may lack before it is asked for again
_NO_MEMORY_S = 0.1
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Watched(NamedTuple):
    """The memory of a process, watched by `pipeline.resources.memory.watch`: `missing`, by its own addresses."""

    pid: HostPid
    space: int
    fd: LocalFd
    missing: Sequence[Range]


@dataclass(eq=False)
class _Memory:
    """One address space: the image's `space`, or that of a child of it; `is_known`: its birth is not in doubt."""

    space: int
    fd: LocalFd
    missing: Missing
    is_known: bool = True
    #: moves and births whose order to other events is in doubt, and until when; set: there are none
    recent: list[tuple[float, Moved | _Memory]] = field(default_factory=list)
    calm: trio.Event = field(default_factory=trio.Event)
    _is_closed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing, and nothing is in doubt."""
        return self.is_known and not self.missing and not self.recent

    def is_watched(self) -> bool:
        """False: its descriptor may be somebody else's by now."""
        return not self._is_closed

    def close(self) -> None:
        """Watch it no longer."""
        self._is_closed = True
        os.close(self.fd)
        LEDGER.give_back(ENTRY, self.fd)

    def doubt(self, what: Moved | _Memory) -> None:
        """Something was told that may have happened before what was told before it."""
        self.recent.append((trio.current_time() + _DOUBT_S, what))
        if self.calm.is_set():
            self.calm = trio.Event()

    def moves(self) -> list[Moved]:
        """Those that are in doubt, the first one first."""
        return [
            what for until, what in self.recent if isinstance(what, Moved) and until > trio.current_time()
        ]

    def children(self) -> list[_Memory]:
        """Those whose birth is in doubt."""
        now = trio.current_time()
        return [what for until, what in self.recent if isinstance(what, _Memory) and until > now]

    def look_whether_calm(self) -> None:
        """End the doubt, if everything was told or it is old."""
        now = trio.current_time()
        self.recent = [one for one in self.recent if one[0] > now]
        if self.recent and paging.is_calm(self.fd):
            self.recent.clear()
        if not self.recent:
            self.calm.set()


class Wanted(NamedTuple):
    """A page that somebody waits for: where it was left."""

    space: int
    address: int


class Pager:
    """See the module. All methods run in one Trio program.

    Args:
        watched: owned from now on.
        victims: whom to kill if this cannot go on.
        guard: owned from now on.

    Ownership: `run` gives everything back at its end.
    """

    def __init__(self, watched: Iterable[Watched], victims: Iterable[HostPid], guard: Guard) -> None:
        self._guard = guard
        self._victims = list(victims)
        self._memories = [_Memory(one.space, one.fd, Missing(one.missing)) for one in watched]
        #: no page is missing any more, and nothing watches the tree
        self.whole = trio.Event()
        self._all_there = trio.Event()
        #: pages that somebody waits for, the longest first
        self._wanted: dict[Wanted, None] = {}
        #: set, and replaced, when there are more of them
        self._news = trio.Event()
        self._listeners: trio.Nursery | None = None
        self.requests = 0
        self.bytes_done = 0
        try:
            if guard.lives:
                self._instruct(guard)
            self.take_another_guard()
        except BaseException:
            self.give_up()
            raise

    def _instruct(self, guard: Guard) -> None:
        guard.hold(memory.fd for memory in self._memories)
        guard.watch_over(self._victims)

    def take_another_guard(self) -> None:
        """If somebody has killed the guard meanwhile: that would cost the tree later; before `run`.

        Raises:
            RebuildError, OSError: there is none to be had.
        """
        if not self._guard.lives:
            self._guard.dismiss()
            self._guard = Guard()
            self._instruct(self._guard)

    def give_up(self) -> None:
        """Let go of all, and end the tree if nobody else does; instead of `run`."""
        self._give_back(self._take_memories(), is_whole=False)

    async def run(self) -> None:
        """Answer until every page is there; otherwise, the tree is killed.

        Raises:
            RebuildError, OSError: it cannot be answered any more.
        """
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    self._listeners = nursery
                    for memory in self._memories:
                        nursery.start_soon(self._listen, memory)
                    self._let_go_of_the_whole()
                    await self._all_there.wait()
                    nursery.cancel_scope.cancel()
        finally:
            # decided here: a page that comes meanwhile, to nobody any more, makes nothing whole
            is_whole = self._all_there.is_set()
            memories = self._take_memories()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(self._give_back, memories, is_whole=is_whole))
            if is_whole:
                self.whole.set()

    def _take_memories(self) -> list[_Memory]:
        memories, self._memories = self._memories, []
        return memories

    def _give_back(self, memories: Iterable[_Memory], *, is_whole: bool) -> None:
        if is_whole:
            self._guard.dismiss()
        else:
            self._guard.alarm()
        for memory in memories:
            memory.close()

    # -- what is missing ------------------------------------------------------------------------

    def lacking(self) -> dict[int, list[Range]]:
        """What is missing still, by space and by where it was left."""
        found: dict[int, RangeSet] = {}
        for memory in self._memories:
            for start, end in memory.missing.origins():
                found.setdefault(memory.space, RangeSet()).add(start, end)
        return {space: list(ranges) for space, ranges in found.items()}

    async def wanted(self) -> AsyncIterator[Wanted]:
        """The pages that somebody waits for, first those that are not there yet, then as somebody needs one; for ever.

        To be iterated anew by each connection over which they can be asked for.
        """
        told: set[Wanted] = set()
        while True:
            for one in [one for one in self._wanted if one not in told]:
                told.add(one)
                yield one
            told &= self._wanted.keys()
            if self._wanted.keys() <= told:
                await self._news.wait()

    def _let_go_of_the_whole(self) -> None:
        """Who misses nothing more is watched no longer: its children need not be, either."""
        for memory in [memory for memory in self._memories if memory.is_whole]:
            self._memories.remove(memory)
            self._guard.let_go([memory.fd])
            trio.lowlevel.notify_closing(memory.fd)
            memory.close()
        if not any(memory.missing for memory in self._memories):
            self._all_there.set()

    # -- pages that come ------------------------------------------------------------------------

    async def bring(self, run: PageRun) -> None:
        """Put pages where they are missing; those that nobody misses any more are left out."""
        at = 0
        for start, length in run.segments:
            await self._bring(run.space, start, start + length, run.payload[at : at + length])
            at += length
        for start, length in run.zeros:
            await self._bring(run.space, start, start + length, None)
        self.bytes_done += sum(length for _, length in [*run.segments, *run.zeros])
        for one in [one for one in self._wanted if not self._places(one.space, one.address, one.address + 1)]:
            del self._wanted[one]
        self._let_go_of_the_whole()

    def _places(self, space: int, start: int, end: int) -> list[tuple[_Memory, Place]]:
        return [
            (memory, place)
            for memory in self._memories
            if memory.space == space
            for place in memory.missing.places(start, end)
        ]

    async def _bring(self, space: int, start: int, end: int, content: memoryview | None) -> None:
        while places := self._places(space, start, end):
            pauses_s = []
            for memory, place in places:
                first, last = place.origin - start, place.origin - start + place.end - place.start
                part = content[first:last] if content is not None else None
                pauses_s.append(self._put(memory, place.start, place.end, part))
            # meanwhile the kernel is heard, and somebody born who misses the same
            await trio.sleep(max(pauses_s))

    def _put(self, memory: _Memory, start: int, end: int, content: memoryview | None) -> float:
        """Put pages in one place; how long to wait before it goes on, 0 where it is done."""
        while start < end:
            length = end - start
            try:
                done = self._fill(memory.fd, start, length, content)
            except OSError as error:
                match error.errno:
                    case errno.EEXIST:
                        uffdio.wake(memory.fd, start, PAGE_BYTES)
                        done = PAGE_BYTES
                    case errno.ENOENT if length > PAGE_BYTES:
                        # several mappings, or none in a part of it
                        middle = start + length // PAGE_BYTES // 2 * PAGE_BYTES
                        first = content[: middle - start] if content is not None else None
                        pause_s = self._put(memory, start, middle, first)
                        if pause_s:
                            return pause_s
                        done = middle - start
                    case errno.ENOENT:
                        # whoever waits there is told so by the kernel
                        uffdio.wake(memory.fd, start, PAGE_BYTES)
                        done = PAGE_BYTES
                    case errno.ESRCH:
                        memory.missing = Missing()
                        return 0.0
                    case errno.ENOMEM:
                        return _NO_MEMORY_S
                    case _:
                        raise
            if not done:
                return _PATIENCE_S
            memory.missing.settle(start, start + done)
            start += done
            content = content[done:] if content is not None else None
        return 0.0

    @staticmethod
    def _fill(fd: LocalFd, start: int, length: int, content: memoryview | None) -> int:
        """See `uffdio.copy`, but that ENOENT is believed when it is said twice.

        Who comes while a mapping is being moved away waits for that, and then finds none. The next one is told that
        there are news.
        """

        def fill() -> int:
            return uffdio.zero(fd, start, length) if content is None else uffdio.copy(fd, start, content)

        try:
            return fill()
        except FileNotFoundError:
            return fill()

    # -- what the kernel tells --------------------------------------------------------------------

    async def _listen(self, memory: _Memory, parent: _Memory | None = None) -> None:
        if parent is not None:
            # what it lacks is not known before
            with trio.move_on_after(_DOUBT_S):
                await parent.calm.wait()
            memory.is_known = True
        waiting: list[int] = []
        while memory.is_watched():
            if not waiting and not memory.recent:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(memory.fd)
                if not memory.is_watched():
                    return
            try:
                events = paging.read_events(memory.fd)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                # for the descriptor of a child, which waits to be born
                self._let_go_of_the_dead()
                await trio.sleep(_NO_MEMORY_S)
                continue
            # the books first: what is missing at an address may have changed since somebody touched it
            for event in events:
                self._take_in(memory, event)
            for event in events:
                # who waits there waits for nothing that comes
                match event:
                    case Moved(start, _, length):
                        uffdio.wake(memory.fd, start, length)
                    case Dropped(start, end, _):
                        uffdio.wake(memory.fd, start, end - start)
            waiting += [event.address for event in events if isinstance(event, Fault)]
            waiting = [address for address in waiting if not self._answer(memory, address)]
            memory.look_whether_calm()
            self._let_go_of_the_whole()
            if waiting or memory.recent:
                await trio.sleep(_PATIENCE_S)

    def _let_go_of_the_dead(self) -> None:
        """Who has ended, or executes another program, misses nothing."""
        for memory in self._memories:
            if paging.is_gone(memory.fd):
                memory.missing = Missing()
        self._let_go_of_the_whole()

    def _answer(self, memory: _Memory, address: int) -> bool:
        """Ask for a page that somebody waits for, or give zeros where none is missing; False: not yet."""
        origin = memory.missing.origin_of(address)
        if origin is None:
            start = address - address % PAGE_BYTES
            return not self._put(memory, start, start + PAGE_BYTES, None)
        self.requests += 1
        self._wanted[Wanted(memory.space, origin - origin % PAGE_BYTES)] = None
        self._news.set()
        self._news = trio.Event()
        return True

    def _take_in(self, memory: _Memory, event: Event) -> None:
        """Keep the books."""
        match event:
            case Forked(fd):
                self._born(memory, fd)
            case Moved(start, to, length):
                for child in memory.children():
                    child.missing.lack_too(memory.missing, start, to, length)
                memory.missing.move(start, to, length)
                memory.doubt(event)
            case Dropped(start, end, unmapped):
                # an unmapping is told when it is done, and somebody may have been quicker to move something there
                spared = [(to, to + length) for _, to, length in memory.moves()] if unmapped else []
                for a, b in subtract([(start, end)], list(RangeSet(spared))):
                    memory.missing.settle(a, b)

    def _born(self, parent: _Memory, fd: LocalFd) -> None:
        LEDGER.take(ENTRY, fd)
        child = _Memory(parent.space, fd, parent.missing.copy(), is_known=False)
        for start, to, length in reversed(parent.moves()):
            child.missing.lack_too(child.missing, to, start, length)
        parent.doubt(child)
        self._memories.append(child)
        self._guard.hold([fd])
        if self._listeners is not None:
            self._listeners.start_soon(self._listen, child, parent)
