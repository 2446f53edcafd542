"""memfd_create(2) files: memory with a descriptor.

The kernel holds: name, bytes, size, seals, mode, owner; and per open file access mode,
position and flags. The memory itself is a `SharedMemory` of the image, the same one
that mappings of it refer to; the engine makes and fills it and applies the seals last.
Here it is opened again, once per open file description.

Not preserved: nothing that a program can see but the inode number. Refused: a memfd
that a process outside the tree holds too. Source: memfd_create(2).
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError, raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, OpenFile, Record
from pipeline.kernel import hugetlb
from pipeline.resources import locks, outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import DELETED, describe, open_again, seek

_PREFIX = b"/memfd:"


class MemfdState(Record, frozen=True, kw_only=True):
    """`space`: the `SharedMemory` it is a descriptor of."""

    space: Index
    locks: list[Lock] = []


@functools.cache
def _memfd_device() -> int:
    """st_dev of the kernel's internal mount that memfds live on; the same in every namespace."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def is_memfd(view: FdView) -> bool:
    """Whether `view` is a memfd, and not a file that is only called like one."""
    if not (
        stat.S_ISREG(view.stat.st_mode) and view.link.startswith(_PREFIX) and view.link.endswith(DELETED)
    ):
        return False
    if view.flags & os.O_PATH or view.stat.st_nlink:
        return False
    return view.stat.st_dev == _memfd_device() or view.stat.st_dev in hugetlb.devices()


class Memfd:
    """See the module."""

    name = "memfd"
    record: type[MemfdState] = MemfdState
    carried: Sequence[str] = (
        "name, bytes, size, seals, mode, access mode, position; shared with its mappings",
        "locks; huge pages",
    )
    refused: Sequence[str] = ("a memfd shared with a process outside the tree",)
    shown_by: Sequence[str] = (
        "programs/sharing.py",
        "programs/huge_pages.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link, device and link count."""
        return is_memfd(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """It can be read, and nobody else has it."""
        try:
            # mappings of it are known by this, for who may not open what is mapped
            scope.memory(view)
        except OSError as error:
            raise_if_exhausted(error)
            yield Blocker(view.subject, f"the memfd may not be read: {error.strerror}", "run as root")
        yield from outside.blockers(view, outside.same_link(view, scope), "the memfd is held by")
        yield from locks.check(view, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> MemfdState:
        """Which memory it is."""
        return MemfdState(space=scope.memory(view), locks=locks.capture(view, scope))

    def create(self, file: OpenFile, record: MemfdState, scope: CreateScope) -> LocalFd:
        """Open the restorer's memfd once more.

        Raises:
            RebuildError: it may not be opened so here.
        """
        try:
            return open_again(scope.content(record.space), file.flags)
        except OSError as error:
            raise RebuildError(f"{describe(file)} cannot be opened again: {error.strerror}") from error

    def connect(self, file: OpenFile, record: MemfdState, scope: CreateScope) -> None:
        """Position and locks of the description."""
        seek(file, scope)
        locks.connect(file, record.locks, scope)

    def finish(self, file: OpenFile, record: MemfdState, scope: CreateScope) -> None:
        """Locks of processes."""
        locks.finish(file, record.locks, scope)


KIND = Memfd()
