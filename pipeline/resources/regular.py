"""Regular files that have a name: opened again by that name, at the position they had.

The kernel holds: inode, access mode, status flags, position, locks. Kept: all of
them; O_SYNC, O_DIRECT, O_NOATIME, O_APPEND too. The content is *not* carried: the
file has to be at the destination, with the same size and modification time (build id
for ELF files), also one that is open for writing, since the tree that wrote it was
frozen when they were noted. A file that differs is an error that names it.

Not preserved: readahead state and posix_fadvise hints (performance only), dnotify
(the kernel shows it nowhere). Refused: leases; names that lead to another file; files of
the kernel's own filesystems are in `pipeline.resources.kernel_files`, files without
any name in `pipeline.resources.unnamed`. Source: open(2), fcntl(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import FileIdentity, OpenFile, PathRef, Record
from pipeline.resources import kernel_files, locks, memfd, unnamed
from pipeline.resources.identity import difference, identity
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import (
    NAME_REMOVED,
    Magic,
    closed_on_error,
    describe,
    filesystem,
    misnamed,
    reopen,
    seek,
)

_SPECIAL = (Magic.SECRETMEM, Magic.HUGETLBFS, Magic.MQUEUE)


class RegularState(Record, frozen=True, kw_only=True):
    """A named file: where it is, what it must be, and the locks on it."""

    path: PathRef
    identity: FileIdentity
    locks: list[Lock] = []


class RegularFile:
    """See the module."""

    name = "regular"
    record: type[RegularState] = RegularState
    carried: Sequence[str] = (
        "path, access mode, position, O_APPEND O_DIRECT O_SYNC O_NOATIME",
        "flock, OFD and POSIX locks",
    )
    refused: Sequence[str] = (
        "a lease",
        "a name that leads to another file",
        "a file that has only other hard links",
    )
    shown_by: Sequence[str] = (
        "programs/files.py",
        "resources/test_regular.py",
    )

    def matches(self, view: FdView) -> bool:
        """Regular, with a name, on a filesystem that stores files."""
        if not stat.S_ISREG(view.stat.st_mode) or not view.link.startswith(b"/") or view.flags & os.O_PATH:
            return False
        if memfd.is_memfd(view) or kernel_files.is_kernel_file(view) or unnamed.is_unnamed(view):
            return False
        return filesystem(view.local) not in _SPECIAL

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it."""
        wrong = misnamed(view)
        if wrong == NAME_REMOVED:
            wrong += ", other hard links keep it alive"
        if wrong:
            yield Blocker(
                view.subject,
                f"the file cannot be opened again by name: {wrong}",
                "close it, have it in a directory that is open to this user, or rename it back",
            )
        yield from locks.check(view)

    def capture(self, view: FdView, scope: CaptureScope) -> RegularState:
        """Name, identity and locks."""
        return RegularState(
            path=scope.path(view.namer, view.link),
            identity=identity(view.local),
            locks=locks.capture(view, scope),
        )

    def create(self, file: OpenFile, record: RegularState, scope: CreateScope) -> LocalFd:
        """Open it and see that it is the same file.

        Raises:
            RebuildError: it is missing, or differs in type, size, modification time or build id.
        """
        with closed_on_error(reopen(file, record.path, file.flags, scope)) as fd:
            wrong = difference(fd, record.identity)
            if wrong:
                raise RebuildError(f"{describe(file, record.path)} is not the file that was open: {wrong}")
        return fd

    def connect(self, file: OpenFile, record: RegularState, scope: CreateScope) -> None:
        """Position and locks of the description."""
        seek(file, scope)
        locks.connect(file, record.locks, scope)

    def finish(self, file: OpenFile, record: RegularState, scope: CreateScope) -> None:
        """Locks of processes."""
        locks.finish(file, record.locks, scope)


KIND = RegularFile()
