"""What a tmpfs of the tree holds: names, attributes, and the bytes of its files.

The names are *entries*, in the order in which they can be made: a directory before what it holds, the first name
of a file before its other hard links. The bytes of all files of one tmpfs travel as one *content*, each file
beginning on a page of its own; holes stay holes.

A tmpfs is looked at and filled by a visitor that sits in the user namespace that owns the mount namespace: there,
and only there, every id of it has a number, access is not refused, and extended attributes that hold ids mean the
same on both sides. It works on a detached copy of the mount, so that what is mounted on its directories does not
hide them.

Kept: kinds, permissions, owners, modification times, device numbers, hard links, extended attributes and ACLs.
Not preserved: access and change times, inode numbers, flags of chattr(1), and trusted attributes in the tmpfs of a user
namespace, which nobody in it can see. Refused by name: ids without a number in
the user namespace, more than 2^20 names, a tmpfs that has locked mounts on it.

Sources: tmpfs(5), open_tree(2), acl(5), xattr(7), lseek(2) on SEEK_DATA.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import ImageError
from pipeline.ids import LocalFd
from pipeline.image.schema import I64, U32, U64, Id, Path, Small
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.kernel.syscalls import CLONE, mount, open_tree, umount2, unshare
from pipeline.resources.memory.pages import data_runs
from pipeline.resources.paths import closed_on_error
from pipeline.userns.forest import OVERFLOW_ID

_MAX_ENTRIES = 1 << 20
_COPY_BYTES = 1 << 20
#: a name that is gone, or another kind of file, since it was looked at
_CHANGED = {errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ENODATA}
_PRIVATE = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
_DETACH = 2


class Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One name. The first entry is the root directory, ``.``.

    `path`: from the root of the file system.
    `target`: of a symbolic link. `link`: the index of the entry that names the same file, -1 for its first name.
    `offset`, `size_bytes`: where the bytes of a regular file are in the content, and how long it is.
    """

    path: Path
    mode: U32
    uid: Id
    gid: Id
    mtime_ns: I64
    size_bytes: U64 = 0
    offset: U64 = 0
    device: U64 = 0
    link: I64 = -1
    target: Path = b""
    attributes: dict[str, Small] = {}


Entries = Annotated[list[Entry], Meta(max_length=_MAX_ENTRIES)]
_PACKED = msgspec.msgpack.Decoder(Entries)


class Place(msgspec.Struct, frozen=True):
    """Where a tmpfs is mounted; `covers`: where other mounts lie on it or above it, the last one first."""

    point: bytes
    covers: Sequence[bytes] = ()

    def enter(self) -> None:
        """Make a copy of the mount the working directory, without what lies on it; for a visitor.

        Raises:
            OSError: EINVAL: mounts on it were locked by another user namespace.
        """
        if self.covers:
            unshare(CLONE.NEWNS)
            mount(None, b"/", None, _PRIVATE)
            for point in self.covers:
                umount2(point, _DETACH)
        tree = open_tree(-100, self.point)
        try:
            os.fchdir(tree)
        finally:
            os.close(tree)


def scan(place: Place, userns: int, mapped: tuple[bool, bool]) -> bytes:
    """List a tmpfs; for a visitor. `unpack` reads the answer.

    Args:
        place: where it is mounted, in the visitor's mount namespace.
        userns: the user namespace that the visitor is in; the index that the ids get.
        mapped: whether the overflow uid and gid are numbers of this user namespace, too.

    Raises:
        OSError: EINVAL: mounts that were locked by another user namespace lie on it; E2BIG: too many names;
            EOVERFLOW: an id has no number here.
    """
    place.enter()
    return msgspec.msgpack.encode(list(_entries(userns, mapped)))


def unpack(answer: bytes) -> list[Entry]:
    """The entries that `scan` has listed."""
    return _PACKED.decode(answer)


def content_bytes(entries: Sequence[Entry]) -> int:
    """How long the content is: up to the end of its last page."""
    return max((_pages(entry.offset + entry.size_bytes) for entry in entries), default=0)


def pack(place: Place, entries: Sequence[Entry]) -> int:
    """Copy the bytes of every file into a new memfd and return it; for a visitor.

    Raises:
        OSError: a file cannot be read, or memory is out.
    """
    place.enter()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC
    with closed_on_error(LocalFd(os.memfd_create("tmpfs", os.MFD_CLOEXEC))) as memory:
        os.ftruncate(memory, content_bytes(entries))
        for entry in _files(entries):
            fd = LocalFd(os.open(entry.path, flags))
            try:
                _copy_data(fd, 0, memory, entry.offset, entry.size_bytes)
            finally:
                os.close(fd)
    return memory


def check(entries: Sequence[Entry]) -> None:
    """See that no entry leads anywhere else: every one lies in a directory that came before it.

    Raises:
        ImageError: names the one that does not.
    """
    directories = set()
    for number, entry in enumerate(entries):
        above, _, name = entry.path.rpartition(b"/")
        wrong = (
            name in {b"", b".."}
            or (number and name == b".")
            or (number and (above or b".") not in directories)
        )
        if wrong or entry.link >= number or (not number and entry.path != b"."):
            raise ImageError(f"a tmpfs of the image holds {os.fsdecode(entry.path)!r}, which leads elsewhere")
        if stat.S_ISDIR(entry.mode):
            directories.add(entry.path)


def fill(entries: Sequence[Entry], owners: Sequence[tuple[int, int]], content: LocalFd) -> bytes:
    """Make every entry in an empty tmpfs; for a visitor that has entered it (`Place.enter`).

    Args:
        entries: `check` has seen them.
        owners: uid and gid of each, as the visitor's user namespace knows them.
        content: a descriptor of their bytes; -1 if no file has any.

    Raises:
        OSError: the kernel refuses something.
    """
    os.umask(0)
    for entry in entries:
        if entry.path != b".":
            _make(entry, entries, content)
    for entry, owner in zip(entries, owners, strict=True):
        if entry.link < 0:
            _furnish(entry, owner)
    for entry in reversed(entries):  # a directory behind what it holds
        os.utime(entry.path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
    return b""


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _files(entries: Iterable[Entry]) -> Iterator[Entry]:
    return (e for e in entries if stat.S_ISREG(e.mode) and e.link < 0 and e.size_bytes)


# -- looking ---------------------------------------------------------------------------------


def _entries(userns: int, mapped: tuple[bool, bool]) -> Iterator[Entry]:
    seen: dict[int, int] = {}
    offset = 0
    for number, (path, found, target, attributes) in enumerate(_walk(b".")):
        if number == _MAX_ENTRIES:
            raise OSError(errno.E2BIG, "too many names")
        for value, has_number in zip((found.st_uid, found.st_gid), mapped, strict=True):
            if value == OVERFLOW_ID and not has_number:
                raise OSError(errno.EOVERFLOW, "an id has no number here")
        uid, gid = Id(userns, found.st_uid), Id(userns, found.st_gid)
        if not stat.S_ISDIR(found.st_mode) and found.st_ino in seen:
            yield Entry(path, found.st_mode, uid, gid, found.st_mtime_ns, link=seen[found.st_ino])
            continue
        seen[found.st_ino] = number
        size_bytes = found.st_size if stat.S_ISREG(found.st_mode) else 0
        yield Entry(
            path,
            found.st_mode,
            uid,
            gid,
            found.st_mtime_ns,
            size_bytes=size_bytes,
            offset=offset if stat.S_ISREG(found.st_mode) else 0,
            device=found.st_rdev,
            target=target,
            attributes=attributes,
        )
        offset += _pages(size_bytes)


class _Found(NamedTuple):
    path: bytes
    status: os.stat_result
    target: bytes
    attributes: dict[str, bytes]


def _walk(top: bytes) -> Iterator[_Found]:
    """`top` and every path below it, a directory before what it holds.

    Everything about a path is read here, so that one that goes while it is read is passed over as a whole.
    """
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            found, names = _look(path)
        except OSError as error:
            if error.errno in _CHANGED:
                continue
            raise
        prefix = b"" if path == b"." else path + b"/"
        waiting += [prefix + name for name in sorted(names, reverse=True)]
        yield found


def _look(path: bytes) -> tuple[_Found, list[bytes]]:
    """One path, and the names in it if it is a directory."""
    status = os.lstat(path)
    found = _Found(
        path,
        status,
        target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else b"",
        attributes={
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        },
    )
    return found, os.listdir(path) if stat.S_ISDIR(status.st_mode) else []


def _copy_data(source: LocalFd, at: int, target: int, offset: int, size_bytes: int) -> None:
    """Copy `size_bytes` from `at` of `source` to `offset` of `target`, leaving holes out."""
    for start, end in data_runs(source, at + size_bytes, at):
        position, stop = start, min(end, at + size_bytes)
        while position < stop:
            data = os.pread(source, min(_COPY_BYTES, stop - position), position)
            if not data:
                return
            os.pwrite(target, data, offset + position - at)
            position += len(data)


# -- making ----------------------------------------------------------------------------------


def _make(entry: Entry, entries: Sequence[Entry], content: LocalFd) -> None:
    kind = stat.S_IFMT(entry.mode)
    if entry.link >= 0:
        os.link(entries[entry.link].path, entry.path, follow_symlinks=False)
    elif kind == stat.S_IFDIR:
        os.mkdir(entry.path, 0o700)
    elif kind == stat.S_IFLNK:
        os.symlink(entry.target, entry.path)
    elif kind == stat.S_IFREG:
        fd = os.open(entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, entry.size_bytes)
            if entry.size_bytes:
                _copy_data(content, entry.offset, fd, 0, entry.size_bytes)
        finally:
            os.close(fd)
    else:
        os.mknod(entry.path, kind | 0o600, entry.device)


def _furnish(entry: Entry, owner: tuple[int, int]) -> None:
    """Owner before permissions and attributes: a change of it takes set-user-id bits and file capabilities away."""
    os.chown(entry.path, *owner, follow_symlinks=False)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(entry.path, stat.S_IMODE(entry.mode))
    for name, value in entry.attributes.items():
        os.setxattr(entry.path, name, value, follow_symlinks=False)
