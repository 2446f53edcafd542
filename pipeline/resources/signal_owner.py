"""Who is sent the signals of an open file: SIGIO when it becomes ready, SIGURG, notices of leases and directories.

The kernel holds a task, a process or a process group, which signal, and the real and effective uid of who said so: on
their behalf the signal is sent, so they decide whether it may be. All of it is kept.

Refused by name: signals to somebody outside of the tree, or to a process group whose leader has ended.

Sources: fcntl(2) on F_SETOWN_EX, F_SETSIG, F_GETOWNER_UIDS; fs/fcntl.c (sigio_perm).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Owner
from pipeline.resources.acting import UNCHANGED, acting_as
from pipeline.resources.kinds import FdView

_F_SETSIG, _F_GETSIG, _F_SETOWN_EX, _F_GETOWN_EX, _F_GETOWNER_UIDS = 10, 11, 15, 16, 17
_WHO = {0: "thread", 1: "pid", 2: "process group"}

#: level-0 pid of a member of the tree, 0 for others
Member = Callable[[int], int]


def check(view: FdView, member: Member) -> Iterator[Blocker]:
    """Whether those who are sent signals are of the tree."""
    kind, pid, _ = _asked(view)
    if pid and not member(pid):
        yield Blocker(
            view.subject,
            f"sends its signals to {_WHO.get(kind, 'pid')} {pid}, which is not part of the tree",
            "take them back: fcntl(F_SETOWN, 0)",
        )


def capture(view: FdView, member: Member) -> Owner | None:
    """Who is sent signals, and which; None for nobody. Ids are as the pipeline sees them (`Id(0, …)`)."""
    kind, pid, signal = _asked(view)
    if not pid and not signal:
        return None
    uid = euid = None
    try:
        uid, euid = map(_id, struct.unpack("<2I", fcntl.fcntl(view.local, _F_GETOWNER_UIDS, bytes(8))))
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel that does not tell
            raise
    return Owner(kind, member(pid), signal, uid, euid)


def create(fd: LocalFd, owner: Owner, host_pid: Callable[[int], int], number: Callable[[Id], int]) -> None:
    """Say so again, on behalf of who did.

    Args:
        host_pid: the pid here of a process or thread of the tree.
        number: what a uid is called here.

    Raises:
        OSError: what the kernel says.
    """
    if owner.pid:
        packed = struct.pack("<ii", owner.type, host_pid(owner.pid))
        uid, euid = (UNCHANGED if one is None else number(one) for one in (owner.uid, owner.euid))
        if (uid, euid) in {(os.getuid(), os.geteuid()), (UNCHANGED, UNCHANGED)}:
            fcntl.fcntl(fd, _F_SETOWN_EX, packed)
        else:
            acting_as(lambda: fcntl.fcntl(fd, _F_SETOWN_EX, packed), uid=uid, euid=euid)
    if owner.signal:
        fcntl.fcntl(fd, _F_SETSIG, owner.signal)


def _asked(view: FdView) -> tuple[int, int, int]:
    """Type, pid as the pipeline sees it, signal."""
    if view.flags & os.O_PATH:
        return 0, 0, 0
    kind, pid = struct.unpack("<ii", fcntl.fcntl(view.local, _F_GETOWN_EX, bytes(8)))
    return kind, pid, fcntl.fcntl(view.local, _F_GETSIG)


def _id(seen: int) -> Id:
    return Id(0, seen)
