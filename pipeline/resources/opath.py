"""O_PATH descriptors: a place in the file tree, without the file being opened.

The kernel holds: mount, inode, and the flags O_PATH, O_DIRECTORY, O_NOFOLLOW; no
position, no access mode. Kept: the place, found again by name; what is there must be
of the same type, a regular file must be the same file (see `pipeline.resources.identity`).

Directories of a process in /proc are those of a process of the tree.

Refused: places whose name is gone, places without a path (namespaces, pipes), /proc/PID of others.
Source: open(2) O_PATH.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import FileIdentity, OpenFile, PathRef, Record
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.policy import RestorePolicy
from pipeline.resources import proc_process
from pipeline.resources.identity import identity, refusal
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import closed_on_error, describe, misnamed
from pipeline.resources.steps import CompleteOnceCreated

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_KERNELS_OWN = (Magic.PROC, Magic.SYSFS, Magic.CGROUP, Magic.CGROUP2)


class PathState(Record, frozen=True, kw_only=True):
    """`identity`: what is there; only its type counts where it is not a regular file on a disk.

    `kernels`: on a filesystem that the kernel makes up, such as /proc.
    """

    path: PathRef
    identity: FileIdentity
    kernels: bool = False


class PathOnly(CompleteOnceCreated):
    """See the module."""

    name = "path"
    record: type[PathState] = PathState
    carried: Sequence[str] = (
        "O_PATH descriptors of files, directories, symbolic links, sockets and devices",
    )
    refused: Sequence[str] = ("a place whose name is gone", "a place without a path", "/proc/PID of others")
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
        elif view.filesystem == Magic.PROC:
            yield from proc_process.check(view, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> PathState:
        """The place, and what is there."""
        found = identity(view.local)
        kernels = view.filesystem in _KERNELS_OWN
        if kernels:
            found = FileIdentity(0, 0, found.mode)
        return PathState(path=scope.path(view.namer, view.link), identity=found, kernels=kernels)

    def refusal(self, file: OpenFile, record: PathState, policy: RestorePolicy, fd: LocalFd) -> str | None:
        """Why what is behind `fd` does not stand for what it was; None if it does."""
        del file
        if filesystem(fd) in _KERNELS_OWN and stat.S_ISREG(record.identity.mode):
            return None if stat.S_ISREG(os.fstat(fd).st_mode) else "it is not a regular file"
        return refusal(fd, record.identity, policy.files)

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
            wrong = self.refusal(file, record, scope.policy, fd)
            if wrong:
                raise RebuildError(f"{describe(file, record.path)} is not what it was: {wrong}")
        return fd


KIND = PathOnly()
