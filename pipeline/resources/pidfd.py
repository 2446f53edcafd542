"""pidfd_open(2) descriptors of processes of the tree.

The kernel holds a reference to a struct pid and flags (O_NONBLOCK, PIDFD_THREAD). Kept:
which process it is, by its level-0 pid, and the flags. All processes of the tree stand
again, zombies too, before open files are made.

Refused: a pidfd of a process outside the tree, of one that is gone (its exit status
cannot be made again), of a thread that does not lead its group.
Source: pidfd_open(2), fs/pidfs.c `pidfd_show_fdinfo`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import OpenFile, Pid, Record
from pipeline.kernel import procfs
from pipeline.kernel.syscalls import pidfd_open
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

#: of pidfd_open: of one thread, which may be the leader; kept in the status flags
PIDFD_THREAD = os.O_EXCL


class PidfdState(Record, frozen=True, kw_only=True):
    """`pid`: level-0 pid; `thread`: whether PIDFD_THREAD was given."""

    pid: Pid
    thread: bool = False


def _pid(view: FdView) -> int:
    """The pid here; 0 in another pid namespace, -1 if it is gone."""
    return int(view.info["Pid"][0])


def _leads(pid: HostPid) -> bool:
    """Whether `pid` is a process or was one a moment ago, and not a thread besides the leader."""
    try:
        return procfs.status(pid).tgid == pid
    except procfs.ProcessGone:
        return True


class Pidfd(CompleteOnceCreated):
    """See the module."""

    name = "pidfd"
    record: type[PidfdState] = PidfdState
    carried: Sequence[str] = ("pidfds of processes of the tree, zombies too",)
    refused: Sequence[str] = (
        "a pidfd of a process outside the tree, or of one that is gone",
        "a pidfd of a thread that does not lead its group",
    )
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link and fdinfo."""
        return "Pid" in view.info and view.link.startswith((b"anon_inode:[pidfd]", b"pidfd:["))

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """The process must be in the tree."""
        pid = _pid(view)
        if pid < 0:
            yield Blocker(view.subject, "the pidfd is of a process that is gone", "close it")
        elif not scope.member(pid):
            yield Blocker(view.subject, f"the pidfd is of pid {pid or '?'}, outside the tree", "close it")
        elif view.flags & PIDFD_THREAD and not _leads(HostPid(pid)):
            why = f"the pidfd is of thread {pid}, which does not lead its group"
            yield Blocker(view.subject, why, "close it")

    def capture(self, view: FdView, scope: CaptureScope) -> PidfdState:
        """Whose it is."""
        return PidfdState(pid=scope.member(_pid(view)), thread=bool(view.flags & PIDFD_THREAD))

    def create(self, file: OpenFile, record: PidfdState, scope: CreateScope) -> LocalFd:
        """Open the process that stands for it.

        Raises:
            RebuildError: it is not there.
        """
        flags = (os.O_NONBLOCK & file.flags) | (PIDFD_THREAD if record.thread else 0)
        try:
            return pidfd_open(scope.host_pid(record.pid), flags)
        except OSError as error:
            raise RebuildError(
                f"{describe(file)} of pid {record.pid} cannot be opened: {error.strerror}"
            ) from error


KIND = Pidfd()
