"""Finding a name of a file that is only known by its number, as inotify and fanotify tell of what they watch.

The kernel says device, inode number and, where the filesystem has them, a file handle. In this order are tried: what
the tree has open (then no name is needed); the handle, opened on each mount of the device in the mount
namespace of the process (open_by_handle_at(2), for root); and a search for the inode number, from the working
directory of the process outwards and then from the mounts of the device, for `SEARCH_S` at most. Every name that is
found is looked up and must lead to the inode.

Sources: proc_pid_fdinfo(5), open_by_handle_at(2); show_mark_fhandle in fs/notify/fdinfo.c.
"""

from __future__ import annotations

import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.syscalls import syscall
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.paths import DELETED, look_up

#: how long a search for a name may take
SEARCH_S = 1.0
_MINOR_BITS = 20
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


def is_it(found: os.stat_result, wanted: Watched) -> bool:
    """Whether a file is the watched one."""
    return (found.st_dev, found.st_ino) == (wanted.device, wanted.inode)


def open_file_of(wanted: Watched, scope: CaptureScope) -> tuple[Index, FdView] | None:
    """An open file of the tree that is the watched one, and its view."""
    table: dict[tuple[int, int], tuple[Index, FdView]] | None = scope.peers().get("watched")
    if table is None:
        table = {(view.stat.st_dev, view.stat.st_ino): (index, view) for index, view in scope.files()}
        scope.peers()["watched"] = table
    return table.get((wanted.device, wanted.inode))


def name_of(pid: HostPid, wanted: Watched) -> bytes | None:
    """A path of it in the mount namespace of `pid`, as a magic link of /proc/PID prints it; None if none is found."""
    before = _known.get(wanted)
    if before is not None and _leads(pid, before, wanted):
        return before
    for path in _candidates(pid, wanted):
        if not path.endswith(DELETED) and _leads(pid, path, wanted):
            _known[wanted] = path
            return path
    return None


def _leads(pid: HostPid, path: bytes, wanted: Watched) -> bool:
    with suppress(OSError):
        return is_it(look_up(pid, path), wanted)
    return False


def _candidates(pid: HostPid, wanted: Watched) -> Iterator[bytes]:
    points = [mount.point for mount in mountinfo(pid) if mount.device == wanted.device]
    root = procfs.read_link(pid, "root").rstrip(b"/")
    own = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    base = b"/proc/self/root" if own and not root else f"/proc/{pid}/root".encode()
    if wanted.handle:
        for point in points:
            with suppress(OSError):
                yield _by_handle(base + point, wanted.handle)
    places = []
    with suppress(OSError):
        directory = procfs.read_link(pid, "cwd").removeprefix(root)
        while directory not in (b"", b"/"):
            places.append(directory)
            directory = os.path.dirname(directory)
    for path in _search(base, [*places, *points], wanted):
        yield root + path


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


def _search(base: bytes, places: list[bytes], wanted: Watched) -> Iterator[bytes]:
    """Paths below `base` whose last component has the inode number, nearest first."""
    deadline = time.monotonic() + SEARCH_S
    queue = deque(dict.fromkeys(places))
    seen = set(queue)
    while queue and time.monotonic() < deadline:
        directory = queue.popleft()
        with suppress(OSError):
            if os.stat(base + directory).st_ino == wanted.inode:
                yield directory
            with os.scandir(base + directory) as entries:
                for entry in entries:
                    path = os.path.join(directory, entry.name)
                    if entry.inode() == wanted.inode:
                        yield path
                    if path not in seen and entry.is_dir(follow_symlinks=False):
                        seen.add(path)
                        queue.append(path)
