"""Directories that were removed while somebody is in them, or has them open.

Nothing is in such a directory, and nothing can be made in it; it still has a mode, an owner, and a parent. It is made
once more at the destination under the name it had, or a made-up one where that is taken, opened, and removed again.
Directories above it that are gone, too, are made and removed with it.

Kept: permissions, owner, ``..``; one directory for all who share it. Not preserved: inode number, times, attributes.
Source: rmdir(2); fs/namei.c on S_DEAD.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import FileOwner, Id, PathRef
from pipeline.kernel.syscalls import RESOLVE, openat2
from pipeline.resources.acting import acting_as
from pipeline.resources.kinds import CreateScope
from pipeline.resources.paths import DELETED

_PLACE = os.O_PATH | os.O_DIRECTORY


def captured(found: os.stat_result, user: Callable[[int], Id], group: Callable[[int], Id]) -> FileOwner:
    """The record of a removed directory."""
    return FileOwner(stat.S_IMODE(found.st_mode), user(found.st_uid), group(found.st_gid))


def shared(path: PathRef, record: FileOwner, scope: CreateScope) -> LocalFd:
    """An O_PATH descriptor of the directory that had this name; owned by the scope.

    Raises:
        RebuildError: it cannot be made here.
    """
    try:
        uid, gid = scope.user(record.uid), scope.group(record.gid)
        return scope.once(
            ("removed directory", path.mntns, path.path),
            lambda: scope.own(_made(path, record.mode, uid, gid, scope)),
        )
    except OSError as error:
        name = os.fsdecode(path.path)
        raise RebuildError(f"the removed directory {name} cannot be made again: {error.strerror}") from error


def _made(path: PathRef, mode: int, uid: int, gid: int, scope: CreateScope) -> LocalFd:
    parts = path.path.removesuffix(DELETED).strip(b"/").split(b"/")
    depth = len(parts) - 1
    while True:
        with suppress(FileNotFoundError, NotADirectoryError):
            at = scope.open(PathRef(path.mntns, b"/" + b"/".join(parts[:depth])), _PLACE)
            break
        depth -= 1
        if depth < 0:
            raise FileNotFoundError(2, "the root directory is not there")
    with ExitStack() as places:
        places.callback(os.close, at)
        with ExitStack() as made:
            for number, name in enumerate(parts[depth:], depth + 1):
                above = at
                at, name_here = _below(above, name, mode if number == len(parts) else 0o700, uid, gid)
                places.callback(os.close, at)
                made.callback(_as_either, partial(os.rmdir, name_here, dir_fd=above), uid, gid)
        return LocalFd(os.dup(at))


def _below(above: LocalFd, name: bytes, mode: int, uid: int, gid: int) -> tuple[LocalFd, bytes]:
    """Make a directory; an O_PATH descriptor of it, and the name it got."""
    try:
        _as_either(partial(os.mkdir, name, 0o700, dir_fd=above), uid, gid)
    except FileExistsError:
        name = b".%s.%s" % (name[:200], secrets.token_hex(4).encode())
        _as_either(partial(os.mkdir, name, 0o700, dir_fd=above), uid, gid)
    try:
        fd = openat2(above, name, _PLACE | os.O_NOFOLLOW, 0, RESOLVE.BENEATH)
        try:
            own = f"/proc/self/fd/{fd}"
            found = os.stat(own)
            if (found.st_uid, found.st_gid) != (uid, gid):
                os.chown(own, uid, gid)
            os.chmod(own, mode)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        _as_either(partial(os.rmdir, name, dir_fd=above), uid, gid)
        raise
    return fd, name


def _as_either(act: Callable[[], None], uid: int, gid: int) -> None:
    """As we are, or, where our own ids may not write, as the owner."""
    try:
        act()
    except FileExistsError:
        raise
    except OSError:
        acting_as(act, euid=uid, egid=gid)
