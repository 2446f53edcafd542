"""userfaultfd(2) descriptors: who has one answers page faults of the memory in which it was made.

The kernel holds the memory, the features, whether faults of the kernel itself are told (UFFD_USER_MODE_ONLY), for each
mapping which faults are answered, and for each page whether it is missing or write-protected. What of it is not told is
tried out (`pipeline.resources.memory.answering`). It is made again inside the process whose memory it is; the mappings
are watched when all pages are there, which have then to be exactly those that were.

Faults that nobody has read are not kept: who waits runs into them again. So it does into those that were read and not
answered yet: they are told twice, as after any signal.

Refused: missing pages of shared memory, huge pages of hugetlbfs, a descriptor that is shared with a process outside the
tree, or whose memory is outside or gone, and one that is being set up.
Sources: userfaultfd(2), ioctl_userfaultfd(2), fs/userfaultfd.c, mm/userfaultfd.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U64, OpenFile, Pid, Record
from pipeline.kernel import paging, uffdio, userfaultfd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.pagemap import Range, intersect, open_pagemap, present, subtract
from pipeline.kernel.uffdio import MODE
from pipeline.remote.calls import Call
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.memory import answering, watch
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

LINK = userfaultfd.LINK.encode()
_Ranges = Annotated[list[tuple[U64, U64]], Meta(max_length=1 << 24)]


class Watch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A mapping [start, end), and of which kinds its faults are answered: UFFDIO_REGISTER_MODE_*."""

    start: U64
    end: U64
    modes: Annotated[int, Meta(ge=1, le=7)]


class UserfaultState(Record, frozen=True, kw_only=True):
    """`owner`: level-0 pid of the process whose memory it is; `features`: UFFD_FEATURE_*.

    `missing`: of the mappings that are watched for missing pages, the pages [start, end) that are; `protected`: the
    pages that are write-protected. Both ascending.
    """

    owner: Pid
    features: U64
    user_mode_only: bool
    watched: Annotated[list[Watch], Meta(max_length=1 << 20)]
    missing: _Ranges
    protected: _Ranges


class Userfault(CompleteOnceCreated):
    """See the module."""

    name = "userfaultfd"
    record: type[UserfaultState] = UserfaultState
    carried: Sequence[str] = (
        "whose memory, features; mappings that are watched for missing pages, writes, minor faults",
        "which pages are missing or write-protected; threads that wait for one",
    )
    refused: Sequence[str] = (
        "missing pages of shared memory; huge pages of hugetlbfs; poisoned pages",
        "shared with outside; of memory outside",
    )
    shown_by: Sequence[str] = ("programs/answering.py", "resources/test_userfault.py")

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == LINK

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its features were chosen, and nobody outside has it."""
        if answering.features_of(view.info) is None:
            yield Blocker(view.subject, "the userfaultfd is being set up", "try again", transient=True)
        yield from outside.blockers(view, outside.same_file(view, scope), "the userfaultfd is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> UserfaultState:
        """What was tried out before."""
        found = scope.answered(view)
        return UserfaultState(
            owner=scope.member(found.owner),
            features=found.features,
            user_mode_only=found.user_mode_only,
            watched=[Watch(*one) for one in found.watched],
            missing=found.missing,
            protected=found.protected,
        )

    def create(self, file: OpenFile, record: UserfaultState, scope: CreateScope) -> LocalFd:
        """One of the memory of its owner, which answers for nothing yet.

        Raises:
            RebuildError: this kernel has not all of its features, or not for us.
        """
        fd = _made(file, record, scope)
        try:
            uffdio.begin(fd, record.features)
        except OSError as error:
            os.close(fd)
            raise RebuildError(
                f"{describe(file)}: its features {record.features:#x} cannot be had here: {error.strerror}"
            ) from error
        return fd

    def finish(self, file: OpenFile, record: UserfaultState, scope: CreateScope) -> None:
        """All pages are there, and all mappings are what they are to be: watch them.

        Raises:
            RebuildError: the kernel refuses.
        """
        fd = scope.file(file.index)
        asked = [(one.start, one.end) for one in record.watched if one.modes & MODE.MISSING]
        missing = intersect(record.missing, asked)
        pagemap = open_pagemap(scope.host_pid(record.owner))
        try:
            watch.begin(
                pagemap,
                missing,
                partial(_drop, record, scope),
                lambda: _register(fd, record.watched),
                lambda: _unregister(fd, record.watched),
            )
            # what holds nothing but zeros was not written
            for start, end in subtract(subtract(asked, missing), present(pagemap, asked)):
                _fill_with_zeros(fd, start, end)
        except OSError as error:
            raise RebuildError(f"{describe(file)}: its memory cannot be watched: {error}") from error
        finally:
            os.close(pagemap)
        for one in record.watched:
            if one.modes & MODE.WP:
                for start, end in intersect(record.protected, [(one.start, one.end)]):
                    uffdio.protect(fd, start, end)


def _made(file: OpenFile, record: UserfaultState, scope: CreateScope) -> LocalFd:
    pid, inside = scope.host_pid(record.owner), partial(scope.inject, record.owner)
    if record.user_mode_only:
        return userfaultfd.make_inside(pid, inside)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return paging.make_in(pid, partial(scope.send, record.owner), inside, flags)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENOENT, errno.ENXIO, errno.EPERM):
            raise
    try:
        return userfaultfd.make_inside(pid, inside, flags)
    except OSError as error:
        raise RebuildError(
            f"{describe(file)}: answers page faults of system calls, too: that takes {paging.DEVICE}, or "
            f"vm.unprivileged_userfaultfd ({error.strerror})"
        ) from error


def _register(fd: LocalFd, watched: Sequence[Watch]) -> None:
    for one in watched:
        uffdio.register(fd, one.start, one.end, one.modes)


def _unregister(fd: LocalFd, watched: Sequence[Watch]) -> None:
    for one in watched:
        uffdio.unregister(fd, one.start, one.end)


def _drop(record: UserfaultState, scope: CreateScope, ranges: Sequence[Range]) -> None:
    advice = watch.MADV_DONTNEED_LOCKED
    calls = [Call(NR.madvise, (a, b - a, advice), name=f"drop {a:x}-{b:x}") for a, b in ranges]
    scope.inject_all(record.owner, calls)


def _fill_with_zeros(fd: LocalFd, start: int, end: int) -> None:
    while start < end:
        start += uffdio.zero(fd, start, end - start)


KIND = Userfault()
