"""Open directories: opened again by name, with the place that reading had reached.

The kernel holds: inode, flags, and a position that only the filesystem understands (a
hash, a cookie or a count). The position is kept only for the very same directory:
inode number and time of birth (of modification where births are not recorded) must be
equal, or the restore ends with an error; a directory at its beginning needs only to exist.
Directories of /proc and /sys, other than those of a process, are positioned as they were.

Refused: removed directories, directories of a process in /proc, leases. Not preserved:
dnotify. Source: getdents(2), statx(2), fs/libfs.c on cookies.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import I64, U64, OpenFile, PathRef, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import locks
from pipeline.resources.kernel_files import about_a_process
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import Magic, closed_on_error, describe, filesystem, misnamed, reopen, seek

_STATX_BTIME = 0x800
_AT_EMPTY_PATH = 0x1000
_STATX_BYTES = 256
_STATX_BTIME_OFFSET = 80
_KERNELS_OWN = (Magic.PROC, Magic.SYSFS, Magic.CGROUP, Magic.CGROUP2)


class DirectoryState(Record, frozen=True, kw_only=True):
    """`inode` and `born_ns` say which directory a position other than 0 belongs to; 0 where any will do."""

    path: PathRef
    inode: U64 = 0
    born_ns: I64 = 0
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
    carried: Sequence[str] = ("path, flags, reading position within the same directory", "locks")
    refused: Sequence[str] = ("a removed directory", "/proc/PID directories", "a lease")
    shown_by: Sequence[str] = (
        "programs/files.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """By type."""
        return stat.S_ISDIR(view.stat.st_mode) and not view.flags & os.O_PATH

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it."""
        wrong = misnamed(view)
        if wrong:
            yield Blocker(view.subject, f"the directory cannot be opened again by name: {wrong}", "close it")
        elif filesystem(view.local) == Magic.PROC and about_a_process(
            view.namer, view.link, view.stat.st_dev
        ):
            yield Blocker(
                view.subject, "a /proc directory of one process is not carried", "open it anew for each use"
            )
        yield from locks.check(view)

    def capture(self, view: FdView, scope: CaptureScope) -> DirectoryState:
        """Its name, and what its position belongs to."""
        bound = view.position != 0 and filesystem(view.local) not in _KERNELS_OWN
        return DirectoryState(
            path=scope.path(view.namer, view.link),
            inode=view.stat.st_ino if bound else 0,
            born_ns=_born_ns(view.local) if bound else 0,
            locks=locks.capture(view, scope),
        )

    def create(self, file: OpenFile, record: DirectoryState, scope: CreateScope) -> LocalFd:
        """Open it.

        Raises:
            RebuildError: it is missing, not a directory, or not the one that the position belongs to.
        """
        with closed_on_error(reopen(file, record.path, file.flags, scope)) as fd:
            found = os.fstat(fd)
            if not stat.S_ISDIR(found.st_mode):
                raise RebuildError(f"{describe(file, record.path)} is not a directory here")
            if record.inode and (found.st_ino, _born_ns(fd)) != (record.inode, record.born_ns):
                raise RebuildError(
                    f"{describe(file, record.path)} was being read, and another directory has its name here: "
                    "the place it was read up to means nothing in it"
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
