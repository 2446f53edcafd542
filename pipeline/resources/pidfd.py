"""pidfd_open(2) descriptors of processes and threads of the tree.

The kernel holds a reference to a struct pid and flags (O_NONBLOCK, PIDFD_THREAD). Kept:
which process or thread it is, by its level-0 pid, and the flags. The real one can only
be opened when the process exists again: `create` returns a stand-in, and `finish` puts
the real pidfd in its place in every holder. So `finish` of this kind has to run before
that of epoll instances that watch it.

Refused: a pidfd of a process outside the tree, or of one that is gone (its exit status
cannot be made again). Source: pidfd_open(2), fs/pidfs.c `pidfd_show_fdinfo`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import OpenFile, Pid, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import pidfd_open
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

#: of pidfd_open: for a thread that does not lead its group; kept in the status flags
PIDFD_THREAD = os.O_EXCL


class PidfdState(Record, frozen=True, kw_only=True):
    """`pid`: level-0 pid; `thread`: whether PIDFD_THREAD was given."""

    pid: Pid
    thread: bool = False


def _pid(view: FdView) -> int:
    """The pid here; 0 in another pid namespace, -1 if it is gone."""
    return int(view.info["Pid"][0])


class Pidfd(CompleteOnceCreated):
    """See the module."""

    name = "pidfd"
    record: type[PidfdState] = PidfdState
    carried: Sequence[str] = ("pidfds of processes and threads of the tree",)
    refused: Sequence[str] = ("a pidfd of a process outside the tree, or of one that is gone",)

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

    def capture(self, view: FdView, scope: CaptureScope) -> PidfdState:
        """Whose it is."""
        return PidfdState(pid=scope.member(_pid(view)), thread=bool(view.flags & PIDFD_THREAD))

    def create(self, file: OpenFile, record: PidfdState, scope: CreateScope) -> LocalFd:
        """A stand-in: a pidfd of this process, which no holder gets to use."""
        return pidfd_open(HostPid(os.getpid()))

    def finish(self, file: OpenFile, record: PidfdState, scope: CreateScope) -> None:
        """Put the real one in place of the stand-in, in every holder.

        Raises:
            RebuildError: the process is not there.
        """
        flags = (os.O_NONBLOCK & file.flags) | (PIDFD_THREAD if record.thread else 0)
        try:
            real = pidfd_open(scope.host_pid(record.pid), flags)
        except OSError as error:
            raise RebuildError(
                f"{describe(file)} of pid {record.pid} cannot be opened: {error.strerror}"
            ) from error
        try:
            for holder, number in scope.holders(file.index):
                cloexec = scope.inject(holder, NR.fcntl, number, fcntl.F_GETFD, 0) & fcntl.FD_CLOEXEC
                scope.send(holder, real, number, cloexec=bool(cloexec))
        finally:
            os.close(real)


KIND = Pidfd()
