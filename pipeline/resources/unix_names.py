"""Giving unix sockets their path names, exactly as they were written, without disturbing what is there.

bind(2) makes a file and keeps the string. To get both right whatever the string is
(relative, through directories of another mount namespace), the socket is bound in a
throw-away thread whose root or working directory is an empty directory made for that
purpose beside the wanted place; the file is then moved over the place in one step. Where
the file of a name was removed, only the string is wanted: the private directory is
then a temporary one, and removed.

An existing file is replaced only if it is what was recorded: a socket file with that modification time, to the
nanosecond, those permissions and that owner. (Not by its inode number: a tmpfs of the tree is made anew.)

Source: bind(2), unix(7), unshare(2), chroot(2), rename(2).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import PathRef
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import CLONE, syscall, unshare
from pipeline.resources.acting import acting_as, in_changed_thread, in_thread
from pipeline.resources.kinds import CreateScope
from pipeline.resources.shielded import shielded
from pipeline.resources.unix_state import Peer, SocketFile, is_path, shown

T = TypeVar("T")


def as_peer(who: Peer | None, scope: CreateScope, act: Callable[[], T]) -> T:
    """Run `act` with the effective ids and groups of `who`, which sockets remember (SO_PEERCRED, SO_PEERGROUPS).

    Where this process may not take on those ids it runs as it is. The pid that is
    remembered is that of this process: only a process itself can leave its pid.
    """
    if who is None:
        return act()
    uid, gid, groups = scope.user(who.uid), scope.group(who.gid), groups_here(who, scope)
    if (uid, gid, groups) == (os.geteuid(), os.getegid(), sorted(os.getgroups())):
        return act()
    return acting_as(act, euid=uid, egid=gid, groups=groups)


def groups_here(who: Peer, scope: CreateScope) -> list[int]:
    """The numbers here of those groups of a peer that have one."""
    found = []
    for group in who.groups:
        with suppress(RebuildError):
            found.append(scope.group(group))
    return sorted(found)


def _making(directory: int, act: Callable[[], T]) -> T:
    """Run `act`, which makes files in a directory; if need be in a thread, as the owner of that directory.

    The file system of another user namespace (a tmpfs) takes no files of ids which that does not map.
    """
    found = os.fstat(directory)

    def as_owner() -> T:
        syscall(NR.setfsgid, found.st_gid)
        syscall(NR.setfsuid, found.st_uid)
        return act()

    try:
        return act()
    except OSError as error:
        if error.errno != errno.EOVERFLOW:
            raise
    return in_changed_thread(as_owner)


def address_of(socket_file: LocalFd) -> str:
    """A name by which this process reaches the socket behind a descriptor of its file (O_PATH), or of what was one."""
    return f"/proc/self/fd/{socket_file}"


class Place:
    """A socket bound to a path name in a private directory, until `settle` puts the file where it belongs.

    Ownership: `settle` or `close` removes the directory and closes what is held; `close` after `settle`
    does nothing.
    """

    def __init__(self, sock: socket.socket, name: bytes, file: SocketFile | None, scope: CreateScope) -> None:
        """Bind `sock`.

        Raises:
            RebuildError: the directory does not exist here, cannot be written to, or holds a file that
                must not be replaced.
        """
        self._file, self._scope = file, scope
        self._subject = f"unix socket {shown(name)}"
        if b"\0" in name:
            raise RebuildError(f"{self._subject}: no name of a file")
        self._held: list[int] = []
        self._private: tuple[int, str] | None = None
        try:
            self._bind(sock, name)
        except OSError as error:
            self.close()
            raise RebuildError(f"{self._subject}: cannot be bound: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _hold(self, fd: int) -> int:
        self._held.append(fd)
        return fd

    def _bind(self, sock: socket.socket, name: bytes) -> None:
        if self._file is None:
            parent = self._hold(os.open(tempfile.gettempdir(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        else:
            check_target(self._file, self._scope)
            parent = self._hold(open_directory(self._file, self._scope))
        private = f".pipeline-{secrets.token_hex(8)}"
        _making(parent, lambda: os.mkdir(private, 0o700, dir_fd=parent))
        self._private = parent, private
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        inside = self._hold(os.open(private, flags, dir_fd=parent))
        bind = _binder(sock, name, inside)
        try:
            found = _making(parent, lambda: in_thread(bind))
        except PermissionError:
            found = _in_child(bind)
        self._found = found
        self._socket_file = LocalFd(
            self._hold(os.open(found, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside))
        )
        self._inside = inside

    @property
    def address(self) -> str:
        """A name by which this process can connect or send to the socket, wherever its file is."""
        return address_of(self._socket_file)

    def leave(self) -> LocalFd:
        """Remove the file and `close`; returns what the socket can be reached by all the same, the caller's now.

        See `address_of`.
        """
        self._held.remove(self._socket_file)
        self.close()
        return self._socket_file

    def settle(self) -> None:
        """Move the file to its place with its owner and mode, or remove it if it has none; then `close`.

        Raises:
            RebuildError: the place is taken by another file, or the owner cannot be set.
        """
        try:
            if self._file is not None:
                self._move(self._file)
        except OSError as error:
            raise RebuildError(f"{self._subject}: {error.strerror or error}") from error
        finally:
            self.close()

    def _move(self, file: SocketFile) -> None:
        uid, gid = self._scope.user(file.uid), self._scope.group(file.gid)
        now = os.stat(self._found, dir_fd=self._inside, follow_symlinks=False)
        if (now.st_uid, now.st_gid) != (uid, gid):
            os.chown(self._found, uid, gid, dir_fd=self._inside, follow_symlinks=False)
        os.chmod(self._found, file.mode, dir_fd=self._inside)
        check_target(file, self._scope)
        target = os.path.basename(file.path.path)
        os.rename(self._found, target, src_dir_fd=self._inside, dst_dir_fd=self._held[0])

    def close(self) -> None:
        """Remove the private directory and close what is held; idempotent."""
        if self._private is not None:
            parent, private = self._private
            self._private = None
            shutil.rmtree(private, ignore_errors=True, dir_fd=parent)
        while self._held:
            os.close(self._held.pop())


def open_directory(file: SocketFile, scope: CreateScope) -> LocalFd:
    """The directory that holds, or shall hold, the socket file (O_PATH); the caller owns it."""
    where = PathRef(file.path.mntns, os.path.dirname(file.path.path) or b"/")
    return scope.open(where, os.O_PATH | os.O_DIRECTORY)


def check_target(file: SocketFile, scope: CreateScope) -> None:
    """The place of a socket file is free, or taken by the stale file that was recorded.

    Raises:
        RebuildError: something else is there, or the directory is missing.
    """
    path = os.fsdecode(file.path.path)
    try:
        parent = open_directory(file, scope)
    except OSError as error:
        raise RebuildError(f"unix socket {path}: its directory: {error.strerror}") from error
    try:
        found = os.stat(os.path.basename(file.path.path), dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    finally:
        os.close(parent)
    recorded = (file.mtime_ns, file.mode, scope.user(file.uid), scope.group(file.gid))
    present = (found.st_mtime_ns, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
    if not stat.S_ISSOCK(found.st_mode) or recorded != present:
        raise RebuildError(
            f"unix socket {path}: another file is there, which is not replaced (remove it if nobody needs it)"
        )


def _binder(sock: socket.socket, name: bytes, inside: int) -> Callable[[], bytes]:
    """What the throw-away thread does: bind, and say where below `inside` the file is."""
    if not is_path(name):
        raise ValueError(f"{name!r} is not a path")
    *parents, last = name.split(b"/")

    def bind() -> bytes:
        unshare(CLONE.FS)
        os.umask(0)
        os.fchdir(inside)
        where: list[bytes] = []
        if name.startswith(b"/"):
            os.chroot(".")
        else:
            # Deep enough for every ".." of a relative name.
            for _ in range(parents.count(b"..")):
                where.append(b"d")
                os.mkdir(b"d")
                os.chdir(b"d")
        base = [b"/"] if name.startswith(b"/") else []
        walked = list(base)
        for part in parents:
            walked.append(part)
            if part == b"..":
                del where[-1:]
            elif part not in (b"", b"."):
                where.append(part)
                with suppress(FileExistsError):
                    os.mkdir(os.path.join(*walked))
        sock.bind(name)
        return b"/".join([*where, last])

    return bind


def _in_child(act: Callable[[], bytes]) -> bytes:
    """Run `act` in a forked child in a user namespace of its own, where it may chroot.

    Raises:
        OSError: with the errno that `act` raised there.
    """

    def alone() -> bytes:
        unshare(CLONE.NEWUSER)
        return act()

    return shielded(alone)
