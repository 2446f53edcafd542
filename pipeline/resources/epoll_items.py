"""Which files an epoll instance watches: the lines of its fdinfo, and who is behind each.

An item is keyed by an open file and the number it was registered under, which may name another
file by now; kcmp(2) with KCMP_EPOLL_TFD tells which one it is.

Source: proc_pid_fdinfo(5), kernel/kcmp.c `kcmp_epoll_target`.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from msgspec import Struct

from pipeline.errors import TargetError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.resources.kinds import CaptureScope, FdView

_ITEM = re.compile(r"\s*(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)(?:\s+pos:\S+\s+ino:([0-9a-f]+))?")


class Line(Struct, frozen=True):
    """A ``tfd:`` line of fdinfo; `nth` counts the lines of the same number before it."""

    fd: int
    nth: int
    events: int
    data: int
    inode: int | None


def lines(view: FdView) -> Iterator[Line]:
    """The items of an instance; TargetError: a line is not understood."""
    seen: Counter[int] = Counter()
    for text in view.info.get("tfd", []):
        match = _ITEM.match(text)
        if match is None:
            raise TargetError(f"{view.subject}: fdinfo has a line that is not understood: {text!r}")
        fd = int(match[1])
        inode = int(match[4], 16) if match[4] else None
        yield Line(fd, seen[fd], int(match[2], 16), int(match[3], 16), inode)
        seen[fd] += 1


def _is_target(view: FdView, line: Line, pid: HostPid, fd: int) -> bool | None:
    """Whether descriptor `fd` of `pid` is the open file of the item; None where the kernel does not say.

    The slot is struct kcmp_epoll_slot: epoll descriptor and target number in the table of
    the instance's holder, and which item of that number.
    """
    holder, number = view.seat
    slot = struct.pack("<3I", number, line.fd, line.nth)
    try:
        return kcmp(pid, holder, KCMP.EPOLL_TFD, fd, slot) == 0
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        return False


def target(view: FdView, line: Line, scope: CaptureScope) -> Index | None:
    """Index of the open file that the item watches; None if no process of the tree has it open.

    Of a tree that stands still it is looked for once.
    """
    known: dict[tuple[LocalFd, int, int], Index | None] = scope.peers().setdefault("epoll", {})
    key = view.local, line.fd, line.nth
    if key in known and scope.still:
        return known[key]
    known[key] = found = _target(view, line, scope)
    return found


def _target(view: FdView, line: Line, scope: CaptureScope) -> Index | None:
    own = scope.file_at(view.pid, line.fd)
    if own is not None:
        same = _is_target(view, line, view.pid, line.fd)
        if same:
            return own
        if same is None and line.inode is not None:
            with suppress(OSError):
                if os.stat(f"/proc/{view.pid}/fd/{line.fd}").st_ino == line.inode:
                    return own
    for index, other in scope.files():
        if _is_target(view, line, *other.seat):
            return index
    return None
