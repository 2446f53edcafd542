"""eventfd(2) counters.

The kernel holds: a 64-bit count, whether reads take one at a time (EFD_SEMAPHORE),
flags. All are kept. Refused: an eventfd that a process outside the tree holds too (its
signals would be lost), a count beyond what a write can set.

Before Linux 6.5 only a read tells a semaphore from a counter. It is done while everybody
who holds it stands still, and made undone; who is told of edges (EPOLLET) may be told
of one more. Source: eventfd(2), fs/eventfd.c `eventfd_show_fdinfo`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U64, OpenFile, Record
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import closed_on_error, describe
from pipeline.resources.steps import CompleteOnceCreated

_MAX_COUNT = 0xFFFF_FFFF_FFFF_FFFE


class EventfdState(Record, frozen=True, kw_only=True):
    """`count`, and whether EFD_SEMAPHORE was set."""

    count: U64
    semaphore: bool


def _count(view: FdView) -> int:
    return int(view.info["eventfd-count"][0], 16)


def is_semaphore(fd: LocalFd, count: int) -> bool:
    """Find out by a read, which is made undone; nobody else reads. The kernel may add to the count meanwhile (aio)."""
    added = 0 if count > 1 else 2
    if added:
        os.eventfd_write(fd, added)
    # there is more than one now
    taken = os.eventfd_read(fd)
    if taken == 1:
        if added:
            os.eventfd_read(fd)
        else:
            os.eventfd_write(fd, 1)
        return True
    if taken > added:
        os.eventfd_write(fd, taken - added)
    return False


class Eventfd(CompleteOnceCreated):
    """See the module."""

    name = "eventfd"
    record: type[EventfdState] = EventfdState
    carried: Sequence[str] = ("count, semaphore mode, flags",)
    refused: Sequence[str] = ("an eventfd shared with a process outside the tree",)
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:[eventfd]"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Nobody else may hold it."""
        if _count(view) > _MAX_COUNT:
            yield Blocker(view.subject, "the eventfd has overflowed", "read it", True)
        yield from outside.blockers(view, outside.same_file(view, scope), "the eventfd is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> EventfdState:
        """From fdinfo."""
        told = view.info.get("eventfd-semaphore")
        count = _count(view)
        semaphore = is_semaphore(view.local, count) if told is None else int(told[0]) != 0
        return EventfdState(count=count, semaphore=semaphore)

    def create(self, file: OpenFile, record: EventfdState, scope: CreateScope) -> LocalFd:
        """A new one with the same count."""
        mode = os.EFD_SEMAPHORE if record.semaphore else 0
        fd = LocalFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | mode))
        with closed_on_error(fd):
            if record.count > _MAX_COUNT:
                raise RebuildError(f"{describe(file)}: an eventfd cannot count to {record.count}")
            if record.count:
                os.eventfd_write(fd, record.count)
        return fd


KIND = Eventfd()
