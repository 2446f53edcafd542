"""Regular files that have a name: opened again by that name, at the position they had.

The kernel holds: inode, access mode, status flags, position, locks. Kept: all of
them; O_SYNC, O_DIRECT, O_NOATIME, O_APPEND too, and the inode's write lifetime hint (F_SET_RW_HINT). The content is
*not* carried unless that is asked for (`pipeline.resources.taken`): the file has to be at the destination, and be
what it was (`pipeline.resources.identity`). A file that differs is an error that names it. A file whose name was
removed while another hard link is left is opened by that (`pipeline.resources.other_names`).

Not preserved: readahead state and posix_fadvise hints (performance only).
Refused: names that lead to another file; files of
the kernel's own filesystems are in `pipeline.resources.kernel_files`, files without
any name in `pipeline.resources.unnamed`. Source: open(2), fcntl(2).
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U8, FileIdentity, OpenFile, Path, PathRef, Record
from pipeline.kernel.statfs import Magic
from pipeline.policy import RestorePolicy
from pipeline.resources import kernel_files, locks, memfd, other_names, taken, unnamed
from pipeline.resources.identity import identity, refusal
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import DELETED, NAME_REMOVED, closed_on_error, describe, misnamed, reopen, seek

_SPECIAL = (Magic.SECRETMEM, Magic.HUGETLBFS, Magic.MQUEUE)
_F_GET_RW_HINT, _F_SET_RW_HINT = 1035, 1036


class RegularState(Record, frozen=True, kw_only=True):
    """A named file: where it is, what it must be, and the locks on it.

    `last_name`: it was opened under this name, which is another file's now, or nobody's. `hint`: RWH_* of its inode.
    """

    path: PathRef
    identity: FileIdentity
    last_name: Path = b""
    hint: U8 = 0
    locks: list[Lock] = []


class RegularFile:
    """See the module."""

    name = "regular"
    record: type[RegularState] = RegularState
    carried: Sequence[str] = (
        "path, access mode, position, O_APPEND O_DIRECT O_SYNC O_NOATIME",
        "write lifetime hint",
        "flock, OFD and POSIX locks with all their holders, and who waits for them; leases",
        "a file of which another hard link is left than the name it was opened by",
        "content, with --with-files",
    )
    refused: Sequence[str] = (
        "a name that leads to another file",
        "a file whose other hard link is not found",
        "a lock that is shared with a process outside the tree",
    )
    shown_by: Sequence[str] = (
        "programs/files.py",
        "programs/file_states.py",
        "test_with_files.py",
        "resources/test_regular.py",
    )

    def matches(self, view: FdView) -> bool:
        """Regular, with a name, on a filesystem that stores files."""
        if not stat.S_ISREG(view.stat.st_mode) or not view.link.startswith(b"/") or view.flags & os.O_PATH:
            return False
        if memfd.is_memfd(view) or kernel_files.is_kernel_file(view) or unnamed.is_unnamed(view):
            return False
        return view.filesystem not in _SPECIAL

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Its name must lead to it."""
        wrong = _misnamed(view, scope)
        if wrong == NAME_REMOVED:
            wrong = None if _other_name(view, scope) else f"{wrong}, and other hard links of it are not found"
        if wrong:
            yield Blocker(
                view.subject,
                f"the file cannot be opened again by name: {wrong}",
                "close it, have it in a directory that is open to this user, or rename it back",
                transient=True,  # a running program removes and renames files while we look
            )
        yield from taken.check(view, scope)
        yield from locks.check(view, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> RegularState:
        """Name, identity and locks."""
        name, last_name = view.link, b""
        if _misnamed(view, scope):
            name, last_name = _other_name(view, scope) or name, view.link.removesuffix(DELETED)
        scope.take_along(view.namer, name, view.local)
        hint = 0
        with suppress(OSError):  # EINVAL: a kernel without hints
            hint = _hint(view.local)
        return RegularState(
            path=scope.path(view.namer, name),
            identity=identity(view.local, look_inside=not _written_only(view.flags)),
            last_name=last_name,
            hint=hint,
            locks=locks.capture(view, scope),
        )

    def refusal(self, file: OpenFile, record: RegularState, policy: RestorePolicy, fd: LocalFd) -> str | None:
        """Why the file behind `fd` (O_PATH, too) does not stand for the one that was open; None if it does."""
        return refusal(fd, record.identity, policy.files, may_grow=_written_only(file.flags))

    def create(self, file: OpenFile, record: RegularState, scope: CreateScope) -> LocalFd:
        """Open it and see that it is the same file.

        Raises:
            RebuildError: it is missing, or differs in type, size, modification time or build id.
        """
        by = partial(other_names.open_as, record.last_name, scope.open) if record.last_name else None
        with closed_on_error(reopen(file, record.path, file.flags, scope, by)) as fd:
            wrong = self.refusal(file, record, scope.policy, fd)
            if wrong:
                raise RebuildError(f"{describe(file, record.path)} is not the file that was open: {wrong}")
            if record.hint:
                with suppress(OSError):  # it is only advice, and only the owner may give it
                    fcntl.fcntl(fd, _F_SET_RW_HINT, struct.pack("<Q", record.hint))
        return fd

    def connect(self, file: OpenFile, record: RegularState, scope: CreateScope) -> None:
        """Position and locks of the description."""
        seek(file, scope)
        locks.connect(file, record.locks, scope)

    def finish(self, file: OpenFile, record: RegularState, scope: CreateScope) -> None:
        """Locks of processes."""
        locks.finish(file, record.locks, scope)


def _written_only(flags: int) -> bool:
    return flags & os.O_ACCMODE == os.O_WRONLY


def _misnamed(view: FdView, scope: CaptureScope) -> str | None:
    """`misnamed`, asked once in a capture."""
    known: dict[tuple[object, ...], str | None] = scope.peers().setdefault("misnamed", {})
    key = view.namer, view.link, view.stat.st_dev, view.stat.st_ino
    if key not in known:
        known[key] = misnamed(view)
    return known[key]


def _other_name(view: FdView, scope: CaptureScope) -> bytes | None:
    cached: dict[tuple[bytes, int, int], bytes | None] = scope.peers().setdefault("other names", {})
    key = (view.link, view.stat.st_dev, view.stat.st_ino)
    if key not in cached:
        more = [
            other.link for _, other in scope.files() if other.namer == view.namer and other.link[:1] == b"/"
        ]
        cached[key] = other_names.other_name(view.namer, view.link, view.stat, more)
    return cached[key]


def _hint(fd: int) -> int:
    (hint,) = struct.unpack("<Q", fcntl.fcntl(fd, _F_GET_RW_HINT, bytes(8)))
    return int(hint) & 0xFF


KIND = RegularFile()
