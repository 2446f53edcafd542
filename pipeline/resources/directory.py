"""Open directories: opened again by name, with the place that reading had reached.

The kernel holds: inode, flags, and a position that only the filesystem understands (a
hash, a cookie or a count). The position is kept only for the very same directory:
inode number and time of birth (of modification where births are not recorded) must be
equal, or the restore ends with an error; a directory at its beginning needs only to exist.
Directories of /proc and /sys are positioned as they were; those of a process in /proc are
those of a process of the tree. A directory that was removed is made once more and removed
(`pipeline.resources.removed`).

Refused: dnotify (F_NOTIFY), which the kernel shows nowhere: but it makes the caller the owner of the open directory,
which nothing else has a use for. Source: getdents(2), statx(2), fs/libfs.c on cookies, fs/notify/dnotify/dnotify.c.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import I64, U64, FileOwner, OpenFile, PathRef, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.statfs import Magic
from pipeline.kernel.syscalls import syscall
from pipeline.policy import RestorePolicy
from pipeline.resources import locks, proc_process, removed, signal_owner
from pipeline.resources.identity import kind_of
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import (
    DELETED,
    NAME_REMOVED,
    REOPEN_FLAGS,
    closed_on_error,
    describe,
    misnamed,
    reopen,
    seek,
)

_STATX_BTIME = 0x800
_AT_EMPTY_PATH = 0x1000
_STATX_BYTES = 256
_STATX_BTIME_OFFSET = 80
_KERNELS_OWN = (Magic.PROC, Magic.SYSFS, Magic.CGROUP, Magic.CGROUP2)


class DirectoryState(Record, frozen=True, kw_only=True):
    """`inode` and `born_ns` say which directory a position other than 0 belongs to; 0 where any will do.

    `removed`: it was removed under this name. `kernels`: on a filesystem that the kernel makes up, such as /proc.
    """

    path: PathRef
    inode: U64 = 0
    born_ns: I64 = 0
    removed: FileOwner | None = None
    kernels: bool = False
    locks: list[Lock] = []


def _born_ns(fd: int) -> int:
    """Time of birth in ns since the epoch, or of the last modification where births are not recorded."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    syscall(NR.statx, fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer)
    raw = buffer.raw
    if not int.from_bytes(raw[:4], "little") & _STATX_BTIME:
        return os.fstat(fd).st_mtime_ns
    seconds = int.from_bytes(raw[_STATX_BTIME_OFFSET : _STATX_BTIME_OFFSET + 8], "little", signed=True)
    return seconds * 1_000_000_000 + int.from_bytes(
        raw[_STATX_BTIME_OFFSET + 8 : _STATX_BTIME_OFFSET + 12], "little"
    )


class Directory:
    """See the module."""

    name = "directory"
    record: type[DirectoryState] = DirectoryState
    carried: Sequence[str] = (
        "path, flags, reading position within the same directory",
        "removed directories, with owner and mode",
        "/proc/PID directories of the tree's own processes",
        "locks",
    )
    refused: Sequence[str] = ("/proc/PID directories of others", "dnotify (F_NOTIFY)")
    shown_by: Sequence[str] = (
        "programs/files.py",
        "programs/file_states.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """By type."""
        return stat.S_ISDIR(view.stat.st_mode) and not view.flags & os.O_PATH

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it."""
        wrong = misnamed(view)
        if wrong and wrong != NAME_REMOVED:
            yield Blocker(view.subject, f"the directory cannot be opened again by name: {wrong}", "close it")
        elif view.filesystem == Magic.PROC:
            yield from proc_process.check(view, scope)
        if signal_owner.capture(view, scope.member) is not None:
            yield Blocker(
                view.subject,
                "it tells of changes by signals (F_NOTIFY): which ones, the kernel does not say",
                "use inotify, or open the directory anew",
            )
        yield from locks.check(view, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> DirectoryState:
        """Its name, and what its position belongs to."""
        is_removed = misnamed(view) == NAME_REMOVED
        kernels = view.filesystem in _KERNELS_OWN
        bound = view.position != 0 and not is_removed and not kernels
        return DirectoryState(
            path=scope.path(view.namer, view.link.removesuffix(DELETED) if is_removed else view.link),
            inode=view.stat.st_ino if bound else 0,
            born_ns=_born_ns(view.local) if bound else 0,
            removed=removed.captured(view.stat, scope.user, scope.group) if is_removed else None,
            kernels=kernels,
            locks=locks.capture(view, scope),
        )

    def refusal(
        self, file: OpenFile, record: DirectoryState, policy: RestorePolicy, fd: LocalFd
    ) -> str | None:
        """Why the directory behind `fd` (O_PATH, too) does not stand for the one that was open; None if it does."""
        del file, policy
        found = os.fstat(fd)
        if not stat.S_ISDIR(found.st_mode):
            return f"it is {kind_of(found.st_mode)}, and was a directory"
        if record.inode and (found.st_ino, _born_ns(fd)) != (record.inode, record.born_ns):
            return (
                "it was being read, and another directory has its name here: "
                "the place it was read up to means nothing in it"
            )
        return None

    def create(self, file: OpenFile, record: DirectoryState, scope: CreateScope) -> LocalFd:
        """Open it.

        Raises:
            RebuildError: it is missing, not a directory, or not the one that the position belongs to.
        """
        if record.removed is not None:
            try:
                again = removed.shared(record.path, record.removed, scope)
                flags = file.flags & REOPEN_FLAGS & ~os.O_NOFOLLOW | os.O_CLOEXEC
                return LocalFd(os.open(f"/proc/self/fd/{again}", flags))
            except OSError as error:
                raise RebuildError(
                    f"{describe(file, record.path)}, removed, cannot be opened: {error.strerror}"
                ) from error
        with closed_on_error(reopen(file, record.path, file.flags, scope)) as fd:
            wrong = self.refusal(file, record, scope.policy, fd)
            if wrong:
                raise RebuildError(
                    f"{describe(file, record.path)} is not the directory that was open: {wrong}"
                )
        return fd

    def connect(self, file: OpenFile, record: DirectoryState, scope: CreateScope) -> None:
        """Reading position, and locks of the description."""
        if file.position:
            seek(file, scope)
        locks.connect(file, record.locks, scope)

    def finish(self, file: OpenFile, record: DirectoryState, scope: CreateScope) -> None:
        """Locks of processes."""
        locks.finish(file, record.locks, scope)


KIND = Directory()
