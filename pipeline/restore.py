"""Restoring: an image becomes a tree that runs.

::

    read ─ namespace-translate ─ rebuild ─ fill ─ thaw

Records come first, so the tree is built while its pages are still on their way. Until
`thaw`, every failure and every cancellation leaves nothing behind. With ``lazy`` the last pages come behind it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import msgspec
import trio

from pipeline.errors import ImageError, PipelineError, RebuildError, ungrouped
from pipeline.image.codec import Image
from pipeline.image.delta import Draft
from pipeline.image.frames import MAX_PAYLOAD_BYTES
from pipeline.image.schema import AnyRecord, End, Record
from pipeline.interrupts import interruptible
from pipeline.kernel.pagemap import Range, intersect
from pipeline.kernel.paging import DEVICE
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.progress import NullProgress, Progress
from pipeline.remote.guard import Guard
from pipeline.remote.tracer import tracer_thread
from pipeline.resources.identity import read_leases_ahead
from pipeline.resources.memory.later import is_copied, may_wait
from pipeline.resources.memory.watch import check_here
from pipeline.stages.bringing import Bringing
from pipeline.stages.building import rebuilt
from pipeline.stages.fill import Feed, PageFeed, StoredFeed
from pipeline.stages.pager import Pager
from pipeline.stages.rebuild import Rebuilding, Terms
from pipeline.stages.stored_pages import StoredPages, stored_pages
from pipeline.transport.buffers import BufferPool, LeasedRun
from pipeline.transport.framing import FrameReader, Message
from pipeline.transport.manifest import read_manifest
from pipeline.transport.spread import beside
from pipeline.transport.storage import IMAGE, Storage, open_storage
from pipeline.userns.cradle import owns_pid_namespace
from pipeline.userns.destination import Unmapped
from pipeline.userns.externals import Externals

if TYPE_CHECKING:
    from pipeline.resources.shell_job import JobTerminal

_BUFFERS = 6
#: how often a job of a shell is looked at, whether it has stopped
_LOOK_S = 0.03


class RestoredTree:
    """A tree that is let run again. Its root, or the first process around it, is our child until this process ends.

    Args:
        root_pid: in the pid namespace of this process.
        child_pid: who ends with the root and with its status: the root itself, or the first process of a pid
            namespace that was made around it (a signal's number plus 128 is its status then).
        figures: times in milliseconds, sizes in bytes, by QMP's names.
        terminal: what was lent to a tree that is a job of a shell, and is followed by `wait`; owned here.
        notes: what is not as it was, in words.
    """

    def __init__(
        self,
        root_pid: int,
        child_pid: int,
        figures: dict[str, float],
        terminal: JobTerminal | None = None,
    ) -> None:
        self.root_pid = root_pid
        self._child_pid = child_pid
        self.figures = figures
        self.terminal = terminal
        #: descriptors of this process that took the place of ends outside of the tree
        self.given: list[int] = []
        self.notes: list[str] = []
        self._pidfd = os.pidfd_open(root_pid)
        try:
            self._child = os.pidfd_open(child_pid)
        except BaseException:
            os.close(self._pidfd)
            raise
        LEDGER.take("pidfds of a restored tree", self._pidfd)

    async def wait(self) -> int:
        """Wait for the root's end; returns its wait status (see os.waitstatus_to_exitcode)."""
        while True:
            if self.terminal is None:
                await trio.lowlevel.wait_readable(self._child)
            else:
                with trio.move_on_after(_LOOK_S):
                    await trio.lowlevel.wait_readable(self._child)
                self.terminal.look()
            status = self._collect()
            if status is not None:
                return status

    def _collect(self) -> int | None:
        pid, status = os.waitpid(self._child_pid, os.WNOHANG)
        return status if pid else None

    def send_signal(self, number: int) -> None:
        """Send a signal to the root; ProcessLookupError if it has ended."""
        signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Give the terminal and the pidfds back; idempotent."""
        if self.terminal is not None:
            self.terminal.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            os.close(self._child)
            LEDGER.give_back("pidfds of a restored tree", self._pidfd)
            self._pidfd = -1


async def read_records(reader: FrameReader) -> tuple[Image, LeasedRun | None]:
    """Read all records; they end where the pages begin, whose first run is returned too (None: no pages).

    Raises:
        ImageError: records are damaged, missing, or do not fit together.
    """
    image = Image()
    while True:
        item = await _next(reader)
        if isinstance(item, LeasedRun):
            try:
                image.check_references()
            except BaseException:
                item.lease.release()
                raise
            return image, item
        image.add(item)
        if isinstance(item, End):
            image.check_references()
            return image, None


async def read_counted(
    reader: FrameReader, image: Image, count: int, draft: Draft, kind: type[Record] = Record
) -> None:
    """Read the next `count` records of `image`, all of one kind, none of which is the end.

    Args:
        draft: what is unchanged since then is not sent again.

    Raises:
        ImageError: see `read_records`; or they are less, or others.
    """
    missing = count
    while missing:
        item = await _next(reader)
        if isinstance(item, LeasedRun):
            item.lease.release()
        if isinstance(item, LeasedRun | End):
            raise ImageError(f"fewer records came than the {count} that were announced")
        if not isinstance(item, kind):
            raise ImageError(
                f"a record of kind {type(item).__name__} stands among those of kind {kind.__name__}"
            )
        records = draft.expanded(item)
        missing -= len(records)
        if missing < 0:
            raise ImageError(f"more records came than the {count} that were announced")
        for record in records:
            image.add(record)  # type: ignore[arg-type]


async def _next(reader: FrameReader) -> AnyRecord | LeasedRun:
    item = await reader.next()
    if item is None:
        raise ImageError("the image ends before its end record: it is truncated")
    if isinstance(item, Message):
        raise ImageError("a protocol message stands among the records")
    return item


def page_feed(reader: FrameReader, image: Image, first: LeasedRun | None, progress: Progress) -> PageFeed:
    """The pages behind the records, for whoever fills a space; it owns `first`, a run already read.

    Raises:
        ImageError: there are more of them, in layers, which no stream brings.
    """
    if image.stored:
        if first is not None:
            first.lease.release()
        raise ImageError("pages of it are in layers: this is a part of an image")
    return PageFeed(first, PageRuns(reader, image, first), progress)


class PageRuns:
    """The page runs behind `first`, to the end record, which is checked; may be left at any point.

    Where nothing was read behind the records, `first` is None, and the image has no end yet.

    Iterating raises ImageError: the stream is cut, or more or fewer pages came than were sent.
    """

    def __init__(self, reader: FrameReader, image: Image, first: LeasedRun | None) -> None:
        self._reader, self._image = reader, image
        self._total = len(first.run.payload) if first is not None else 0
        self._more = image.end is None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LeasedRun:
        if self._more:
            item = await self._reader.next()
            if item is None:
                raise ImageError("the image ends before its end record: it is truncated")
            if isinstance(item, LeasedRun):
                self._total += len(item.run.payload)
                return item
            if not isinstance(item, End):
                raise ImageError("a record stands among the pages")
            self._image.add(item)
            self._more = False
        end = self._image.end
        if end is None or end.page_bytes != self._total:
            raise ImageError(
                f"{self._total} bytes of pages came, but the image says otherwise: pages are missing"
            )
        raise StopAsyncIteration


@asynccontextmanager
async def opened(storage: Storage) -> AsyncIterator[FrameReader]:
    """A reader of the complete image in `storage`.

    Raises:
        ImageError: there is none, or it is not complete.
    """
    await read_manifest(storage)
    async with opened_object(storage, IMAGE) as reader:
        yield reader


@asynccontextmanager
async def opened_object(storage: Storage, name: str) -> AsyncIterator[FrameReader]:
    """A reader of one of the objects of an image; ImageError: there is none."""
    async with storage.open(name) as stream:
        yield FrameReader(stream, BufferPool(_BUFFERS, MAX_PAYLOAD_BYTES), storage.name)


def _let_wait(image: Image, stored: StoredPages) -> dict[int, list[Range]]:
    """Choose what comes later, by space, and say so in the image."""
    found: dict[int, list[Range]] = {}
    for number, space in image.spaces.items():
        if not is_copied(image, number):
            runs = intersect(stored.ranges(number), may_wait(image, space))
            if runs:
                found[number] = runs
                image.spaces[number] = msgspec.structs.replace(space, later=runs)
    return found


def _check_lazy() -> None:
    """Raise RebuildError if nobody may answer page faults here."""
    try:
        check_here()
    except OSError as error:
        raise RebuildError(
            f"page faults of programs cannot be answered here: {DEVICE}: {error.strerror}; be root of the machine, or "
            "leave --lazy out"
        ) from None


def _stored_feed(stored: StoredPages, later: Mapping[int, Sequence[Range]], progress: Progress) -> StoredFeed:
    return StoredFeed(lambda space: stored.sooner(space, later.get(space, ())), stored.at_once, progress)


def _is_cancelled_only(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


async def _leases_ahead() -> None:
    await trio.to_thread.run_sync(read_leases_ahead)


def _quiet(_: str) -> None:
    """Nobody wants to be told."""


@asynccontextmanager
async def _pages_later(
    stored: StoredPages | None,
    later: dict[int, list[Range]],
    progress: Progress,
    on_message: Callable[[str], None],
) -> AsyncIterator[Callable[[Rebuilding], Pager | None]]:
    """Gives what is to be called before the tree runs; the end of the block waits for the last page.

    If the pages cannot be brought, the tree is killed. What fails in the block is raised alone: who brings pages to
    what is ended then may fail of it, too.
    """
    if stored is None:
        yield lambda _: None
        return
    guard = await trio.to_thread.run_sync(Guard)
    begun = False
    failed: PipelineError | None = None
    try:
        with ungrouped():
            async with trio.open_nursery() as nursery:

                def begin(rebuilding: Rebuilding) -> Pager:
                    nonlocal begun
                    begun = True
                    pager = Pager(rebuilding.take_watched(), rebuilding.victims(), guard)
                    nursery.start_soon(pager.run)
                    nursery.start_soon(Bringing(stored, pager, later, progress, on_message).run)
                    return pager

                try:
                    yield begin
                except PipelineError as error:
                    failed = error
                    nursery.cancel_scope.cancel()
    except Exception:
        if failed is None:
            raise
    finally:
        if not begun:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(guard.dismiss)
    if failed is not None:
        raise failed


@interruptible
async def restore(
    source: str,
    *,
    detach: bool = False,
    new_pidns: bool = False,
    map: str = "same",  # noqa: A002 (the option's name on the command line)
    unmapped: Unmapped = "refuse",
    externals: Externals | None = None,
    policy: RestorePolicy | None = None,
    lazy: bool = False,
    on_message: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> RestoredTree:
    """Restore the image at `source`.

    Args:
        source: a directory, a URL, or ``-``.
        detach: the tree shall outlive this process; its standard descriptors are its own either way.
        new_pidns: give the tree a pid namespace of its own, so that no pid is in the way.
        map: where the ids of the outermost user namespaces lie here: ``same``, ``BASE:COUNT``, or ``auto``.
        externals: paths of namespaces, by kind, that take the place of external ones, instead of the caller's own;
            and where the other ends of the tree's veth devices are put: ``{"veth:eth0": "PEER@BRIDGE"}``.
        policy: decisions about states that have more than one good answer.
        unmapped: ids that have no place here: ``refuse``, or let the ``overflow`` id stand for them.
        lazy: let the tree run before its memory is there (figure ``start-time``, in ms); this returns when it is, and
            if it fails meanwhile, or is cancelled, the tree is killed. While the image cannot be read it waits.
        on_message: told what it waits for.
        progress: is told how far it is.

    Raises:
        ImageError: the image cannot be used.
        Refused: ids of the tree have no place here.
        RebuildError: this host cannot make the tree again; nothing is left of it.

    Cancellation, and Ctrl-C: nothing is left; a tree that runs already, and of which no page is missing, is returned.
    """
    progress = progress or NullProgress()
    begin = time.monotonic()
    progress.phase("setup")
    new_pidns = new_pidns or not owns_pid_namespace()
    policy = replace(policy or RestorePolicy(), stdio=not detach and source != "-", parent_stays=not detach)
    terminal: JobTerminal | None = None
    tree: RestoredTree | None = None
    if lazy:
        _check_lazy()
    storage = open_storage(source)
    try:
        async with AsyncExitStack() as stack:
            way = stack.enter_context(trio.CancelScope())
            tracer = await stack.enter_async_context(tracer_thread())
            await stack.enter_async_context(beside(_leases_ahead))
            read: StoredPages | FrameReader
            feed: Feed
            stored: StoredPages | None = None
            later: dict[int, list[Range]] = {}
            if lazy:
                read = stored = await stack.enter_async_context(stored_pages(storage))
                image = stored.image
                later = _let_wait(image, stored)
                feed = _stored_feed(stored, later, progress)
            else:
                read = reader = await stack.enter_async_context(opened(storage))
                image, first = await read_records(reader)
                if image.layers:
                    if first is not None:
                        first.lease.release()
                    read = stored = await stack.enter_async_context(stored_pages(storage))
                    image = stored.image
                    feed = _stored_feed(stored, later, progress)
                else:
                    feed = page_feed(reader, image, first, progress)
            records_read = time.monotonic()
            if policy.shell_job and image.head.job is not None:
                from pipeline.resources.shell_job import JobTerminal

                terminal = JobTerminal(image.head.job)
            name = terminal.path if terminal is not None else None
            terms = Terms(
                new_pidns, map, unmapped, externals or {}, policy, name, strict_ends=True, later=lazy
            )
            pager: Pager | None = None
            started: float | None = None
            try:
                async with _pages_later(
                    stored if lazy else None, later, progress, on_message or _quiet
                ) as begin_paging:
                    async with rebuilt(image, feed, tracer, progress, terms) as rebuilding:
                        progress.phase("thaw")
                        # before it runs: it may end at once, and somebody else's process have its number
                        tree = RestoredTree(rebuilding.root_pid, rebuilding.child_pid, {}, terminal)
                        if terminal is not None:
                            terminal.lend(tree.root_pid, rebuilding.foreground)
                        pager = begin_paging(rebuilding)
                        await trio.lowlevel.checkpoint_if_cancelled()
                        # it runs from now on, and so it is said
                        way.shield = True
                        await tracer.run(rebuilding.thaw)
                        started = time.monotonic()
                    # but while pages are missing it can be given up, which ends it
                    way.shield = pager is None
            except BaseException as error:
                whole = started is not None and pager is not None and pager.whole.is_set()
                if not (whole and _is_cancelled_only(error)):
                    raise
            way.shield = True
            assert tree is not None
            assert started is not None
    except BaseException:
        if tree is not None:
            tree.close()
        elif terminal is not None:
            terminal.close()
        raise
    if policy.shell_job and terminal is None:
        tree.notes.append("the tree was no job of a shell: it has no terminal of this one")
    tree.notes += rebuilding.notes
    tree.given += rebuilding.given
    tree.figures.update(
        {
            "total-time": 1e3 * (time.monotonic() - begin),
            "setup-time": 1e3 * (records_read - begin),
            "start-time": 1e3 * (started - begin),
            "transferred": read.bytes_read,
            "page-bytes": feed.bytes_done,
        }
    )
    return tree
