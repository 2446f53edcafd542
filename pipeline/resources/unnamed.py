"""Regular files without a name: unlinked, replaced by a rename, or opened with O_TMPFILE.

The kernel keeps such a file until its last descriptor is closed, so its bytes are
carried: they travel as pages of a *content*, once per file however often it is open.
At the destination the engine's content file stands for it: every open file of it is
opened again from there, with its own access mode, flags and position, so the bytes
are shared as they were.

Kept: bytes, holes, size, permissions, owner, modification time, locks, attributes of users and access control
list (`pipeline.resources.attributes`). Not preserved:
inode number, ctime, the flags O_TMPFILE and O_NOFOLLOW in F_GETFL, and the filesystem
it was on; so it cannot be given a name by
linkat(2) in its old directory. Refused: leases.
Also counted as unnamed: what NFS (``.nfs…``) and FUSE (``.fuse_hidden…``) keep under a
made-up name until the last close. Source: open(2) O_TMPFILE, unlink(2).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError, raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.image.schema import I64, FileAttributes, Id, Index, OpenFile, Path, Record
from pipeline.kernel.inside import open_file
from pipeline.kernel.statfs import Magic
from pipeline.resources import attributes, kernel_files, locks, memfd
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.locks import Lock
from pipeline.resources.paths import DELETED, describe, open_again, seek, taken_over

_HIDDEN = {Magic.NFS: b".nfs", Magic.FUSE: b".fuse_hidden"}


class UnnamedState(Record, frozen=True, kw_only=True):
    """A file without a name; its bytes are in space `content`.

    `last_name` and `replaced` (another file has that name now) are only for people.
    """

    last_name: Path
    replaced: bool = False
    content: Index
    mode: Annotated[int, Meta(ge=0, le=0o177777)]
    uid: Id
    gid: Id
    mtime_ns: I64
    attributes: FileAttributes = FileAttributes()
    locks: list[Lock] = []


def is_unnamed(view: FdView) -> bool:
    """Whether no directory names the regular file of `view`."""
    if view.stat.st_nlink == 0:
        return True
    base = os.path.basename(view.link)
    return any(base.startswith(text) and view.filesystem == magic for magic, text in _HIDDEN.items())


def _readable(view: FdView) -> LocalFd:
    """A local descriptor that can read it, owned by the caller."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return LocalFd(os.open(f"/proc/self/fd/{view.local}", flags))
    except PermissionError:
        pid, fd = view.seat
        return open_file(pid, f"fd/{fd}", flags)


class UnnamedFile:
    """See the module."""

    name = "unnamed"
    record: type[UnnamedState] = UnnamedState
    carried: Sequence[str] = (
        "deleted and O_TMPFILE files with their bytes, shared by all that opened them",
        "their owner, mode, user extended attributes and ACL",
        "locks",
    )
    refused: Sequence[str] = ("a lease",)
    shown_by: Sequence[str] = (
        "programs/files.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """Regular, with bytes on a filesystem, and without a name."""
        if not stat.S_ISREG(view.stat.st_mode) or not view.link.startswith(b"/") or view.flags & os.O_PATH:
            return False
        if memfd.is_memfd(view) or kernel_files.is_kernel_file(view):
            return False
        if view.filesystem in (Magic.SECRETMEM, Magic.HUGETLBFS, Magic.MQUEUE):
            return False
        return is_unnamed(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """It must be readable."""
        if locks.leased(view):
            yield Blocker(view.subject, "there is a lease on the deleted file", "release it first")
            return
        try:
            os.close(_readable(view))
        except OSError as error:
            raise_if_exhausted(error)
            yield Blocker(
                view.subject, f"the deleted file cannot be read: {error.strerror}", "run as its owner or root"
            )
            return
        yield from locks.check(view, scope)

    def capture(self, view: FdView, scope: CaptureScope) -> UnnamedState:
        """Its attributes; its bytes go through the scope, once per inode."""
        contents = scope.peers().setdefault("unnamed", {})
        key = (view.stat.st_dev, view.stat.st_ino)
        if key not in contents:
            reader = _readable(view)
            try:
                contents[key] = scope.content(reader, os.fstat(reader).st_size)
            finally:
                os.close(reader)
        return UnnamedState(
            last_name=view.link.removesuffix(DELETED),
            replaced=taken_over(view),
            content=contents[key],
            mode=view.stat.st_mode,
            uid=scope.user(view.stat.st_uid),
            gid=scope.group(view.stat.st_gid),
            mtime_ns=view.stat.st_mtime_ns,
            attributes=attributes.captured(view.local, scope.user, scope.group),
            locks=locks.capture(view, scope),
        )

    def create(self, file: OpenFile, record: UnnamedState, scope: CreateScope) -> LocalFd:
        """Open the content file once more.

        Raises:
            RebuildError: its owner cannot be set here, or a flag does not fit (O_DIRECT).
        """
        content = scope.content(record.content)
        try:
            scope.once(("unnamed", record.content), lambda: _own(content, record, scope))
            return open_again(content, file.flags)
        except OSError as error:
            name = os.fsdecode(record.last_name)
            why = f"{describe(file)}, deleted {name}, cannot be made again: {error.strerror}"
            raise RebuildError(why) from error

    def connect(self, file: OpenFile, record: UnnamedState, scope: CreateScope) -> None:
        """Position and locks of the description."""
        seek(file, scope)
        locks.connect(file, record.locks, scope)

    def finish(self, file: OpenFile, record: UnnamedState, scope: CreateScope) -> None:
        """Modification time, once the bytes are there, and locks of processes."""
        content = scope.content(record.content)
        os.utime(content, ns=(os.fstat(content).st_atime_ns, record.mtime_ns))
        locks.finish(file, record.locks, scope)


def _own(content: LocalFd, record: UnnamedState, scope: CreateScope) -> None:
    """Give the content file its permissions and owner."""
    uid, gid = scope.user(record.uid), scope.group(record.gid)
    found = os.fstat(content)
    if (found.st_uid, found.st_gid) != (uid, gid):
        os.fchown(content, uid, gid)
    os.fchmod(content, stat.S_IMODE(record.mode))
    attributes.give(content, record.attributes, scope.user, scope.group)


KIND = UnnamedFile()
