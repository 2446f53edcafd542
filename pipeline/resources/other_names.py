"""Files whose name was removed, or given to another file, while another hard link of them is left.

Such a file is not carried by its bytes: whoever writes to it through the other name goes on with the same file. The
other name is looked for in the directory where it was, and in those of the tree's other open files. At the
destination the file is linked under its old name once more, opened, and the name is removed; where that cannot
be (another file has the name, the directory may not be written), it is opened by the other name.

Source: link(2), proc_pid_fd(5).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from pipeline.errors import passed_over
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import PathRef
from pipeline.kernel.syscalls import RESOLVE, openat2
from pipeline.resources.paths import DELETED, open_place, same_inode

_MOST_ENTRIES = 100_000

#: opens a path of the image with flags
Open = Callable[[PathRef, int], LocalFd]


def other_name(pid: HostPid, link: bytes, wanted: os.stat_result, more: Iterable[bytes] = ()) -> bytes | None:
    """Another name of a file that `link` does not name any more, as `pid` sees it; None if none is found.

    Args:
        wanted: what fstat says of the file.
        more: names of other files, in whose directories it may be, too.
    """
    if not wanted.st_nlink:
        return None
    places = dict.fromkeys(os.path.dirname(name) for name in (link.removesuffix(DELETED), *more))
    for place in places:
        with passed_over():
            for name in _entries(pid, place, wanted.st_ino):
                path = os.path.join(place, name)
                found = open_place(pid, path)
                try:
                    if same_inode(os.fstat(found), wanted):
                        return path
                finally:
                    os.close(found)
    return None


def _entries(pid: HostPid, place: bytes, inode: int) -> Iterator[bytes]:
    directory = open_place(pid, place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(directory) as entries:
            for count, entry in enumerate(entries):
                if count >= _MOST_ENTRIES:
                    return
                if entry.inode() == inode:
                    yield os.fsencode(entry.name)
    finally:
        os.close(directory)


def open_as(last_name: bytes, open_path: Open, path: PathRef, flags: int) -> LocalFd:
    """Open `path` so that its name is the removed `last_name`, if that can be; the caller owns the result.

    Raises:
        OSError: `path` cannot be opened.
    """
    with suppress(OSError):
        return _linked(last_name, open_path, path, flags)
    return open_path(path, flags)


def _linked(last_name: bytes, open_path: Open, path: PathRef, flags: int) -> LocalFd:
    above, name = os.path.split(last_name)
    there = open_path(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        directory = open_path(PathRef(path.mntns, above), os.O_PATH | os.O_DIRECTORY)
        try:
            os.link(b"/proc/self/fd/%d" % there, name, dst_dir_fd=directory, follow_symlinks=True)
            try:
                return openat2(directory, name, flags, 0, RESOLVE.BENEATH | RESOLVE.NO_SYMLINKS)
            finally:
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)
    finally:
        os.close(there)
