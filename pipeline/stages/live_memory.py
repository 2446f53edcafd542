"""The memory of a tree that is sent while it runs: what was sent of it, and what was written since.

It begins in a stop of the tree, in which its writes begin to be tracked (`pipeline.resources.memory.tracking`). Each
round then asks what was written since the one before.

A destination that builds a draft of the tree meanwhile is told in the last stop which pages it lacks: all that the
tree has, but for those that were sent, were not written since, and lie in a mapping that the destination still has; and
which pages it has that are none any more. Pages of mappings that are newer than the draft wait for the end: the
destination has no place for them yet. So do those of processes that are newer, or have executed another program.

A store only keeps what it gets. It is told in the last stop which pages of it are still those of the tree. What comes
and goes meanwhile does not matter to it, but for memory that a child still shares with its parent: it is stored once,
with the parent's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.errors import Blocker, Refused
from pipeline.ids import HostPid
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace
from pipeline.kernel import smaps
from pipeline.kernel.pagemap import (
    PAGE_BYTES,
    Range,
    intersect,
    open_pagemap,
    populated,
    subtract,
    total_bytes,
    union,
)
from pipeline.kernel.procfs import ProcessGone
from pipeline.remote.tracer import check_cancelled
from pipeline.resources.memory import devices, tracking
from pipeline.resources.memory.alike import private_alike
from pipeline.resources.memory.capture import watched_by_others
from pipeline.resources.memory.later import is_copied, may_wait
from pipeline.resources.memory.tracking import Tracking, TrackingLost, WriteProtected
from pipeline.stages import freeze
from pipeline.stages.asking import inside
from pipeline.stages.freeze import FrozenTree
from pipeline.stages.live_sharing import LiveSharing
from pipeline.stages.memory import FilePages, LivePages, PageSource, ProcessPages, SharedPages
from pipeline.stages.observe import Looks
from pipeline.stages.sent import LastSent

#: every address that a program can have
_ALL: list[Range] = [(0, 1 << 63)]
#: so much of what was sent is kept as it was: of a small tree all, of a large one what it writes all the time
_COPIED_BYTES = 32 << 20
#: so many comparisons tell whether they pay: whether at least this share of the pages was the same
_TELLING_PAGES = 256
_PAYING_SHARE = 0.05
#: nor do they in the pause, unless of so many pages that are lacking one at least can be compared
_LACKING_FOR_EACH = 4
#: open files of these kinds use O_DIRECT for something else
_PACKETS = frozenset({"pipe", "fifo"})


@dataclass
class _Space:
    """The memory of one process.

    `ranges`: where the destination has a place for its pages. `inherited`: pages that its parent has, too (and not
    written since the fork); the destination forks it from its parent, and has them then as the parent has. `is_lost`:
    the process has ended, or has other memory by now. `is_doubtful`: devices may have been writing to it at a look.
    `last`: copies of what was sent.
    """

    pid: HostPid
    tracking: Tracking
    ranges: list[Range]
    parent: _Space | None = None
    inherited: list[Range] = field(default_factory=list)
    sent: list[Range] = field(default_factory=list)
    pending: list[Range] = field(default_factory=list)
    unwatched: list[Range] = field(default_factory=list)
    missed: list[Range] = field(default_factory=list)
    is_lost: bool = False
    is_doubtful: bool = False
    last: LastSent = field(default_factory=LastSent)

    def look(self) -> None:
        """Ask what was written; TrackingLost."""
        found = self.tracking.collect()
        self.pending = union(self.pending, union(found.runs, sorted(self.missed)))
        self.missed.clear()
        self.unwatched = found.unwatched

    def look_again(self) -> None:
        """The same, of a process that has run since its draft, which knows of devices, too."""
        try:
            self.look()
            # behind it: a device that has been writing since before then writes into pages that look protected
            self.is_doubtful = self.is_doubtful or devices.may_write_to(self.pid)
        except PermissionError as error:
            raise TrackingLost(f"pid {self.pid} may not be looked at any more ({error.strerror})") from error

    def right(self, untouched: Sequence[Range]) -> list[Range]:
        """What was sent as it is now.

        Args:
            untouched: what is write-protected by a userfaultfd: not written since the last look.
        """
        try:
            if self.is_lost or self.is_doubtful:
                return []
            self.tracking.check()
            if self.tracking.stands_still:
                untouched = self.tracking.untouched()
        except TrackingLost:
            return []
        unsent = union(union(self.pending, sorted(self.missed)), self.unwatched)
        return subtract(intersect(self.sent, untouched), unsent)

    def lose(self) -> None:
        """Nothing is known of it any more, nor asked."""
        self.is_lost = True
        self.pending.clear()
        self.last.clear()
        self.tracking.close()

    def differing(self) -> list[Range]:
        """What the destination has inherited of the parent, and the parent has written since the draft, or dropped.

        To be asked when the parent's pages are read: they are sent as they are then.
        """
        if self.parent is None or not self.inherited:
            return []
        if self.parent.is_lost:
            return self.inherited
        try:
            # one answer for each page: between two, it could be dropped, or come back
            kept = self.parent.tracking.untouched()
            if not self.parent.tracking.stands_still:
                self.parent.look_again()
        except TrackingLost:  # the next look at the parent says so
            return self.inherited
        kept = subtract(subtract(kept, self.parent.pending), self.parent.unwatched)
        return subtract(self.inherited, kept)

    def take(self, later: Sequence[Range] = ()) -> list[Range]:
        """What to send now of what is pending, without what comes `later`."""
        now = subtract(intersect(self.pending, self.ranges), later)
        self.pending = subtract(self.pending, now)
        self.sent = union(self.sent, now)
        return now


class LiveMemory:
    """See the module. `begin`, `finish` and `kept` run while the tree is stopped.

    Args:
        stored: it is sent to a store, not to a destination with a draft.

    Ownership: holds what watches the tree, and descriptors of what it shares, until `close`.
    """

    def __init__(self, *, stored: bool = False) -> None:
        self._is_stored = stored
        #: what the looks at the tree have in common
        self.looks = Looks(live=True)
        self._image: Image | None = None
        self._pids: list[HostPid] = []
        self._spaces: dict[int, _Space] = {}
        self._unseen: list[_Space] = []
        self._sharing = LiveSharing()

    @property
    def image(self) -> Image:
        """The draft."""
        assert self._image is not None
        return self._image

    def begin(self, image: Image, tree: FrozenTree, sources: Sequence[PageSource]) -> None:
        """Begin to track the writes of a stopped tree; in the tracer's thread. Then `first_look`, when it runs on.

        Only what a child has of its parent has to be looked at in the same moment as the parent.

        Args:
            image: the draft.
            tree: it, stopped.
            sources: of its pages.

        Raises:
            OSError: this kernel, or a sandbox, does not let it be tracked.
        """
        self._image = image
        self._pids = list(tree.pids())
        tasks = {
            HostPid(tid): [HostPid(other) for other in process.tasks]
            for process in tree.living()
            for tid in process.tasks
        }
        for source in sources:
            check_cancelled()
            match source:
                case ProcessPages(number, pid):
                    tids = [pid, *(tid for tid in tasks[pid] if tid != pid)]
                    places = _ALL if self._is_stored else _places(image.spaces[number])
                    with inside(pid, tids) as task:
                        watch = tracking.begin(pid, task.syscall, answers=image.spaces[number].answers)
                        self._spaces[number] = _Space(pid, watch, places)
                        if isinstance(watch, WriteProtected):
                            self._sharing.watch(pid, task.syscall)
                case SharedPages():
                    self._sharing.add(source)
                case FilePages(early=early) if not (early and self._is_stored):
                    self._sharing.add(source)
        above = {number: space.copy_of for number, space in image.spaces.items() if space.copy_of is not None}
        related = {*above, *above.values()}
        for number, space in self._spaces.items():
            if number in related:
                space.look()
            else:
                self._unseen.append(space)
        doubtful = set(_written_behind(image))
        for source in sources:
            if not isinstance(source, ProcessPages):
                continue
            space = self._spaces[source.space]
            if source.space in above:
                inherited = subtract(space.pending, source.runs)
                if self._is_stored:
                    space.pending = subtract(space.pending, inherited)
                    continue
                space.parent = self._spaces[above[source.space]]
                if above[source.space] in doubtful:
                    continue
                space.inherited = inherited
                space.pending = subtract(space.pending, inherited)
                space.sent = list(inherited)

    # -- while it runs ---------------------------------------------------------------------

    def first_look(self) -> None:
        """Ask what there is of the memory that was not looked at in the stop. In any thread.

        What was, is not looked at again: a parent's writes since are told when the pages are read that it shares.

        Raises:
            TrackingLost: see `look`.
        """
        while self._unseen:
            self._look_at(self._unseen.pop())
        self._sharing.look_first(self._pids[0])

    @property
    def stands_still(self) -> bool:
        """Whether the tree has to stand still when it is looked at."""
        return any(space.tracking.stands_still for space in self._spaces.values() if not space.is_lost)

    def look(self) -> int:
        """Ask what was written since the last time; how many bytes are to be sent. In any thread.

        While the tree runs, unless it `stands_still` for it.

        Raises:
            TrackingLost: the first process of a tree that there is a draft of has ended, or executed another program.
        """
        for space in self._spaces.values():
            self._look_at(space)
        self._sharing.look(self._pids[0])
        return self.left_bytes()

    def _look_at(self, space: _Space) -> None:
        if space.is_lost:
            return
        try:
            space.look_again()
        except TrackingLost:
            if space.pid == self._pids[0] and not self._is_stored:
                raise
            space.lose()

    def left_bytes(self) -> int:
        """How much was written that was not sent, as far as that is known: see `LiveSharing.left_bytes`."""
        return self._sharing.left_bytes() + sum(total_bytes(space.pending) for space in self._spaces.values())

    def unknown_bytes(self) -> int:
        """How much of what is shared was sent once, and may have been written since; the next round tells."""
        return self._sharing.unknown_bytes()

    def untracked_bytes(self) -> int:
        """How much there is that is not told of, and goes when the tree stands still. In any thread."""
        found = 0
        for space in self._spaces.values():
            if space.unwatched and not space.is_lost:
                with suppress(ProcessGone, ProcessLookupError):  # the next look says so
                    pagemap = open_pagemap(space.pid)
                    try:
                        found += total_bytes(populated(pagemap, space.unwatched).pages)
                    finally:
                        os.close(pagemap)
        return found

    @property
    def remarks(self) -> list[str]:
        """What is worth saying of its processes."""
        return [
            f"pid {space.pid} answers page faults by userfaultfd itself: its memory went when it stood still"
            for number, space in self._spaces.items()
            if self.image.spaces[number].answers
        ]

    def late_bytes(self) -> int:
        """How much there is that the destination has no place for yet."""
        mapped = sum(total_bytes(subtract(space.pending, space.ranges)) for space in self._spaces.values())
        return mapped + self._new_bytes()

    def _new_bytes(self) -> int:
        """The memory of processes that are newer, or have other memory by now; what they share in parts."""
        lost = {space.pid for space in self._spaces.values() if space.is_lost}
        found = 0
        with suppress(ProcessGone):  # the next look says so
            for pid in freeze.walk(self._pids[0]):
                if pid in lost or pid not in self._pids:
                    with suppress(OSError):  # gone, or nobody else may look at it just now
                        found += smaps.anonymous_share(pid)
        return found

    def take(self, *, first: bool, without_later: bool = False) -> list[PageSource]:
        """What to send now; the `first` time in the order of the growth plan. What has changed of what is shared, too.

        Args:
            without_later: not what may come when the tree runs elsewhere (`pipeline.resources.memory.later`).
        """
        found = self._sharing.take(first=first)
        taken: list[tuple[int, _Space, list[Range]]] = []
        for number, space in self._spaces.items():
            if space.is_lost:
                continue
            later = without_later and not is_copied(self.image, number)
            runs = space.take(may_wait(self.image, self.image.spaces[number]) if later else ())
            if first or runs:
                taken.append((number, space, runs))
        are_copied = self._make_room_for_copies([(space, runs) for _, space, runs in taken])
        for number, space, runs in taken:
            more = space.differing if first else tuple
            # what a child has inherited can be much more, and is not counted
            last = space.last if are_copied and not (first and space.inherited) else None
            found.append(LivePages(number, space.pid, runs, space.missed, more, last))
        return found

    def _make_room_for_copies(self, taken: Sequence[tuple[_Space, Sequence[Range]]]) -> bool:
        """Whether copies of all this are kept; of what was sent before, none are where there is no room for both."""
        has_room = self._copies_pay() and sum(total_bytes(runs) for _, runs in taken) <= _COPIED_BYTES
        if has_room:
            known_bytes = PAGE_BYTES * sum(len(space.last) for space in self._spaces.values())
            new_bytes = sum(space.last.unknown_bytes(runs) for space, runs in taken)
        if not has_room or known_bytes + new_bytes > _COPIED_BYTES:
            for space in self._spaces.values():
                space.last.clear()
        return has_room

    def _copies_pay(self) -> bool:
        """Whether enough of what is written has the content that it had; a store is told before what it gets."""
        compared = sum(space.last.compared for space in self._spaces.values())
        same = sum(space.last.same for space in self._spaces.values())
        return not self._is_stored and (compared < _TELLING_PAGES or same >= _PAYING_SHARE * compared)

    # -- at the end --------------------------------------------------------------------------

    def finish(
        self, now: Image, sources: Sequence[PageSource], new_spaces: Sequence[int]
    ) -> tuple[list[PageSource], dict[int, list[Range]]]:
        """What the destination lacks of the tree that stands still, and which of its pages are none any more.

        Args:
            now: the image of the stopped tree, which the draft can become.
            sources: of all of its pages.
            new_spaces: of processes that are born in the end, in the order in which their pages are wanted.

        Raises:
            TrackingLost: what has changed cannot be sent any more.
            Refused: somebody else has begun to watch its memory.
        """
        doubtful = set(_written_behind(self.image)) | set(_written_behind(now))
        lacking: list[PageSource] = []
        new: dict[int, PageSource] = {}
        dropped: dict[int, list[Range]] = {}
        self._refuse_watched()
        self._sharing.look_last(sources, self._written_by_devices(doubtful, sources))
        for source in sources:
            match source:
                case ProcessPages(number) if number in new_spaces:
                    new[number] = source
                case ProcessPages(number, pid, runs, untouched):
                    space = self._spaces[number]
                    alike = private_alike(self.image.spaces[number].vmas, now.spaces[number].vmas)
                    right = [] if number in doubtful else intersect(space.right(untouched), alike)
                    there = intersect(space.sent, alike)
                    wanted = subtract(runs, right)
                    space.last.forget(subtract(wanted, there))
                    most_bytes = _LACKING_FOR_EACH * PAGE_BYTES * len(space.last)
                    pays = self._copies_pay() and total_bytes(wanted) <= most_bytes
                    lacking.append(ProcessPages(number, pid, wanted, last=space.last if pays else None))
                    dropped[number] = subtract(there, runs)
                case SharedPages() | FilePages():
                    lacking.append(self._sharing.lacking(source))
        return lacking + [new[number] for number in new_spaces], dropped

    def kept(
        self, now: Image, sources: Sequence[PageSource]
    ) -> tuple[list[PageSource], dict[int, list[Range]]]:
        """What the store lacks of the tree that stands still, and what it has, by space.

        Shared memory and files are there as they were: what it lacks of them goes on top.

        Args:
            now: the image of the stopped tree.
            sources: of all of its pages.

        Raises:
            Refused: somebody else has begun to watch its memory.
        """
        doubtful = set(_written_behind(self.image)) | set(_written_behind(now))
        lacking: list[PageSource] = []
        kept: dict[int, list[Range]] = {}
        self._refuse_watched()
        self._sharing.look_last(sources, self._written_by_devices(doubtful, sources))
        for source in sources:
            match source:
                case ProcessPages(number, pid, runs, untouched) if number in self._spaces:
                    right = self._spaces[number].right(untouched)
                    kept[number] = intersect(runs, [] if number in doubtful else right)
                    lacking.append(ProcessPages(number, pid, subtract(runs, kept[number])))
                case SharedPages(number, one) if number in self._sharing:
                    kept[number] = self._sharing.ranges(number, one.record.size_bytes)
                    lacking.append(self._sharing.lacking(source))
                case FilePages(number, _, size) if number in self._sharing:
                    kept[number] = self._sharing.ranges(number, size)
                    lacking.append(self._sharing.lacking(source))
                case _:
                    lacking.append(source)
        return lacking, {number: runs for number, runs in kept.items() if runs}

    def _written_by_devices(self, doubtful: set[int], sources: Sequence[PageSource]) -> set[HostPid]:
        """The processes of these spaces, and of those that devices may have been writing to at a look."""
        owners = {source.pid: source.space for source in sources if isinstance(source, ProcessPages)}
        seen = {space.pid for space in self._spaces.values() if space.is_doubtful}
        return seen | {pid for pid, number in owners.items() if number in doubtful}

    def _refuse_watched(self) -> None:
        blockers: list[Blocker] = []
        for space in self._spaces.values():
            if space.is_lost:
                continue
            with suppress(ProcessLookupError, ProcessGone):  # told by who asks for what was not sent
                doubtful = _ALL if space.tracking.stands_still else space.unwatched
                answered = [one for one in self.looks.answered if one.owner == space.pid]
                blockers += watched_by_others(space.pid, doubtful, space.tracking.may_watch, answered)
        if blockers:
            raise Refused(blockers)

    def let_go_of_objects(self) -> None:
        """The rounds are over: descriptors are not needed any more; idempotent."""
        self._sharing.let_go()

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._sharing.close()
        self._unseen.clear()
        while self._spaces:
            _, space = self._spaces.popitem()
            space.tracking.close()


def _places(space: AddressSpace) -> list[Range]:
    """Where private pages of a draft are."""
    return private_alike(space.vmas, space.vmas)


def _written_behind(image: Image) -> Iterator[int]:
    """The spaces that a device may write to behind the page tables; see `pipeline.resources.memory.tracking`."""
    direct = {
        index for index, file in image.files.items() if file.flags & os.O_DIRECT and file.kind not in _PACKETS
    }
    for process in image.processes.values():
        if process.space is not None and (
            any(entry.file in direct for entry in process.fds)
            or any(vma.kind == "aio" for vma in image.spaces[process.space].vmas)
        ):
            yield process.space
