"""O_PATH descriptors: a place in the file tree, without the file being opened.

The kernel holds: mount, inode, and the flags O_PATH, O_DIRECTORY, O_NOFOLLOW; no
position, no access mode. Kept: the place, found again by name; what is there must be
of the same type, a regular file must be the same file (see `pipeline.resources.identity`).

Refused: places whose name is gone, places without a path (namespaces, pipes), /proc/PID.
Source: open(2) O_PATH.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import FileIdentity, OpenFile, PathRef, Record
from pipeline.resources.identity import difference, identity
from pipeline.resources.kernel_files import about_a_process
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import Magic, closed_on_error, describe, filesystem, misnamed
from pipeline.resources.steps import CompleteOnceCreated

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_KERNELS_OWN = (Magic.PROC, Magic.SYSFS, Magic.CGROUP, Magic.CGROUP2)


class PathState(Record, frozen=True, kw_only=True):
    """`identity`: what is there; only its type counts where it is not a regular file on a disk."""

    path: PathRef
    identity: FileIdentity


class PathOnly(CompleteOnceCreated):
    """See the module."""

    name = "path"
    record: type[PathState] = PathState
    carried: Sequence[str] = (
        "O_PATH descriptors of files, directories, symbolic links, sockets and devices",
    )
    refused: Sequence[str] = ("a place whose name is gone", "a place without a path", "/proc/PID")
    shown_by: Sequence[str] = (
        "programs/files.py",
        "resources/test_paths.py",
    )

    def matches(self, view: FdView) -> bool:
        """By flag."""
        return bool(view.flags & os.O_PATH)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it."""
        wrong = misnamed(view)
        if wrong:
            yield Blocker(
                view.subject, f"the O_PATH descriptor cannot be opened again by name: {wrong}", "close it"
            )
        elif filesystem(view.local) == Magic.PROC and about_a_process(
            view.namer, view.link, view.stat.st_dev
        ):
            yield Blocker(
                view.subject, "an O_PATH descriptor of a process in /proc is not carried", "close it"
            )

    def capture(self, view: FdView, scope: CaptureScope) -> PathState:
        """The place, and what is there."""
        found = identity(view.local)
        if filesystem(view.local) in _KERNELS_OWN:
            found = FileIdentity(0, 0, found.mode)
        return PathState(path=scope.path(view.namer, view.link), identity=found)

    def create(self, file: OpenFile, record: PathState, scope: CreateScope) -> LocalFd:
        """Find the place again.

        Raises:
            RebuildError: nothing is there, or something else.
        """
        flags = file.flags & _FLAGS
        if stat.S_ISLNK(record.identity.mode):
            flags |= os.O_NOFOLLOW
        try:
            opened = scope.open(record.path, flags)
        except OSError as error:
            raise RebuildError(f"{describe(file, record.path)} cannot be found: {error.strerror}") from error
        with closed_on_error(opened) as fd:
            wanted = record.identity
            if filesystem(fd) in _KERNELS_OWN and stat.S_ISREG(wanted.mode):
                wrong = None if stat.S_ISREG(os.fstat(fd).st_mode) else "it is not a regular file"
            else:
                wrong = difference(fd, wanted)
            if wrong:
                raise RebuildError(f"{describe(file, record.path)} is not what it was: {wrong}")
        return fd


KIND = PathOnly()
