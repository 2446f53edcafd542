"""Finding a name of a file that is only known by its number, as inotify and fanotify tell of what they watch.

The kernel says device, inode number and, where the filesystem has them, a file handle. In this order are tried: what
the tree has open (then no name is needed); the handle, opened on each mount of the device in the mount
namespace of the process (open_by_handle_at(2), for root); and a search for the inode number, from the working
directory of the process outwards and then from the mounts of the device, for `SEARCH_S` in all. Every name that is
found is looked up and must lead to the inode.

Sources: proc_pid_fdinfo(5), open_by_handle_at(2); show_mark_fhandle in fs/notify/fdinfo.c.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pipeline.errors import RebuildError, passed_over, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index, PathRef
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.kernel.syscalls import syscall
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import DELETED, open_place

#: how long may be searched for the names of a process
SEARCH_S = 1.0
_MINOR_BITS = 20
_IN_ATTRIB = 4
#: names found before, by inode: a tree is looked at twice
_known: dict[Watched, bytes] = {}


class Watched(NamedTuple):
    """An inode: st_dev and number; `handle` is struct file_handle, empty where there is none."""

    device: int
    inode: int
    handle: bytes

    @property
    def subject(self) -> str:
        """How a message names it."""
        return f"inode {self.inode} of device {os.major(self.device)}:{os.minor(self.device)}"


def device(text: str) -> int:
    """st_dev of the kernel's own device number, in hexadecimal."""
    number = int(text, 16)
    return os.makedev(number >> _MINOR_BITS, number & (1 << _MINOR_BITS) - 1)


def parse(words: dict[str, str]) -> Watched:
    """From the words of a line of fdinfo (``ino:8e7ac2`` and so on), all in hexadecimal."""
    handle = b""
    if words.get("f_handle"):
        content = bytes.fromhex(words["f_handle"])
        handle = struct.pack("<Ii", len(content), int(words["fhandle-type"], 16)) + content
    return Watched(device(words["sdev"]), int(words["ino"], 16), handle)


def is_it(place: LocalFd, wanted: Watched) -> bool:
    """Whether an open file is the watched one. On overlay, several files may have the numbers that the kernel tells."""
    found = os.fstat(place)
    if found.st_ino != wanted.inode:
        return False
    told = found.st_dev == wanted.device and filesystem(place) != Magic.OVERLAYFS
    return told or _as_watched(place) == wanted


def open_file_of(wanted: Watched, scope: CaptureScope) -> tuple[Index, FdView] | None:
    """An open file of the tree that is the watched one, and its view."""
    table: dict[tuple[int, int], tuple[Index, FdView]] | None = scope.peers().get("watched")
    if table is None:
        table = {(view.stat.st_dev, view.stat.st_ino): (index, view) for index, view in scope.files()}
        scope.peers()["watched"] = table
    found = table.get((wanted.device, wanted.inode))
    return found if found is not None and is_it(found[1].local, wanted) else None


def name_of(pid: HostPid, wanted: Watched, scope: CaptureScope) -> bytes | None:
    """A path of it in the mount namespace of `pid`, as a magic link of /proc/PID prints it; None if none is found."""
    before = _known.get(wanted)
    if before is not None and _leads(pid, before, wanted):
        return before
    names: _Names | None = scope.peers().get(("names", pid))
    if names is None:
        names = scope.peers()["names", pid] = _Names(pid)
    for path in names.candidates(wanted):
        if not path.endswith(DELETED) and _leads(pid, path, wanted):
            _known[wanted] = path
            return path
    return None


@contextmanager
def opened(
    of: str, scope: CreateScope, path: PathRef | None, file: Index | None, kind: int
) -> Iterator[bytes]:
    """What is to be watched, as a path that leads to it: what `path` leads to, or open file `file`.

    Args:
        of: how a message names who watches it.
        kind: its type (S_IFMT).

    Raises:
        RebuildError: it is of another type.
        OSError: it is not there.
    """
    own = None
    if path is not None:
        found = own = scope.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    elif file is not None:
        found = scope.file(file)
    else:
        raise RebuildError(f"{of} is of nothing")
    try:
        if stat.S_IFMT(os.fstat(found).st_mode) != kind:
            raise RebuildError(f"{of}: a file of another type is there")
        yield b"/proc/self/fd/%d\0" % found
    finally:
        if own is not None:
            os.close(own)


def _leads(pid: HostPid, path: bytes, wanted: Watched) -> bool:
    try:
        place = open_place(pid, path)
        try:
            return is_it(place, wanted)
        finally:
            os.close(place)
    except OSError as error:
        raise_if_exhausted(error)
        return False


def _as_watched(place: LocalFd) -> Watched | None:
    """What the kernel says of a watch of a file: some filesystems (overlay, btrfs) tell stat(2) of another device."""
    instance = LocalFd(syscall(NR.inotify_init1, os.O_CLOEXEC))
    try:
        syscall(NR.inotify_add_watch, instance, b"/proc/self/fd/%d\0" % place, _IN_ATTRIB)
        for line in procfs.fdinfo(HostPid(os.getpid()), instance).get("inotify", []):
            return parse(dict(word.partition(":")[::2] for word in line.split()))
    finally:
        os.close(instance)
    return None


class _Names:
    """Where a process may have names for inodes; a search goes on where the one before has stopped."""

    def __init__(self, pid: HostPid) -> None:
        self._root = procfs.read_link(pid, "root").rstrip(b"/")
        own = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        self._base = b"/proc/self/root" if own and not self._root else f"/proc/{pid}/root".encode()
        self._mounts = mountinfo(pid)
        #: whether directories may list other inode numbers than stat(2) tells
        self._layered = any(mount.kind == b"overlay" for mount in self._mounts)
        self._left_s = SEARCH_S
        self._found: dict[int, list[bytes]] = {}
        self._queue: deque[bytes] = deque()
        self._seen: set[bytes] = set()
        with suppress(OSError):
            directory = procfs.read_link(pid, "cwd").removeprefix(self._root)
            while directory not in (b"", b"/"):
                self._add(directory)
                directory = os.path.dirname(directory)

    def candidates(self, wanted: Watched) -> Iterator[bytes]:
        """Paths that may lead to an inode, the likeliest first."""
        points = [mount.point for mount in self._mounts if mount.device == wanted.device]
        if wanted.handle:
            for point in points:
                with passed_over():
                    yield _by_handle(self._base + point, wanted.handle)
        for point in points:
            self._add(point)
        tried = 0
        while True:
            found = self._found.get(wanted.inode, [])
            for path in found[tried:]:
                yield self._root + path
            tried = len(found)
            if not self._queue or self._left_s <= 0:
                return
            begun = time.monotonic()
            self._look_into(self._queue.popleft())
            self._left_s -= time.monotonic() - begun

    def _add(self, directory: bytes) -> None:
        """A directory to look into, when its turn comes."""
        if directory not in self._seen:
            self._seen.add(directory)
            self._queue.append(directory)
            with suppress(OSError):
                self._found.setdefault(os.stat(self._base + directory).st_ino, []).append(directory)

    def _look_into(self, directory: bytes) -> None:
        with passed_over(), os.scandir(self._base + directory) as entries:
            for entry in entries:
                path = os.path.join(directory, entry.name)
                numbers = {entry.inode()}
                if self._layered:
                    with suppress(OSError):
                        numbers.add(entry.stat(follow_symlinks=False).st_ino)
                for number in numbers:
                    self._found.setdefault(number, []).append(path)
                if path not in self._seen and entry.is_dir(follow_symlinks=False):
                    self._seen.add(path)
                    self._queue.append(path)


def _by_handle(mount: bytes, handle: bytes) -> bytes:
    """The name that the kernel has for a file handle; raises OSError: EPERM, ESTALE."""
    place = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = LocalFd(syscall(NR.open_by_handle_at, place, handle, os.O_PATH | os.O_CLOEXEC))
    finally:
        os.close(place)
    try:
        return os.readlink(f"/proc/self/fd/{found}".encode())
    finally:
        os.close(found)
