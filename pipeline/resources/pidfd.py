"""pidfd_open(2) descriptors of processes and threads of the tree, and of those that are gone.

The kernel holds a reference to a struct pid and flags (O_NONBLOCK, PIDFD_THREAD). Kept:
which process or thread it is, by its level-0 pid, and the flags. All of the tree stand
again, zombies too, before open files are made. For a process that has ended and was
collected, another one is made, ends in the same way and is collected: all its pidfds are
of one process again, and tell its exit status where the kernel does (PIDFD_GET_INFO).

Not preserved: inode numbers; the pid that one of a process that is gone once had, and that a core was dumped.
Refused: a pidfd of a process outside the tree.
Source: pidfd_open(2), fs/pidfs.c `pidfd_show_fdinfo`, `pidfd_info`.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index, OpenFile, Pid, Record
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import PIDFD_THREAD, pidfd_open
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
#: in struct pidfd_info
_EXIT_CODE_OFFSET = 60

#: signals by which a process can end, if it does not catch them
_ENDING = signal.valid_signals() - {
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
}  # fmt: skip


class Gone(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A process that was collected: its wait status, and for each of its pidfds whether PIDFD_THREAD was given.

    `place`: which of them it is.
    """

    number: Index
    status: Annotated[int, Meta(ge=0, le=0xFFFF)]
    threads: Annotated[list[bool], Meta(min_length=1, max_length=1 << 16)]
    place: Index


class PidfdState(Record, frozen=True, kw_only=True):
    """`pid`: level-0 pid, 0 for one that is gone; `thread`: whether PIDFD_THREAD was given."""

    pid: Pid
    thread: bool = False
    gone: Gone | None = None


def _pid(view: FdView) -> int:
    """The pid here; 0 in another pid namespace, -1 if it is gone."""
    return int(view.info["Pid"][0])


def _exit_status(view: FdView) -> int:
    """The wait status of a process that is gone; 0 where the kernel does not tell."""
    asked = struct.pack("<Q56x", _PIDFD_INFO_EXIT)
    try:
        answer = fcntl.ioctl(view.local, _PIDFD_GET_INFO, asked)
    except OSError:
        return 0
    told: int = struct.unpack_from("<Q", answer)[0] & _PIDFD_INFO_EXIT
    return int(struct.unpack_from("<I", answer, _EXIT_CODE_OFFSET)[0]) & 0xFFFF if told else 0


class Pidfd(CompleteOnceCreated):
    """See the module."""

    name = "pidfd"
    record: type[PidfdState] = PidfdState
    carried: Sequence[str] = (
        "pidfds of processes and threads of the tree, zombies too",
        "pidfds of processes that were collected, with their exit status",
    )
    refused: Sequence[str] = ("a pidfd of a process outside the tree",)
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link and fdinfo."""
        return "Pid" in view.info and view.link.startswith((b"anon_inode:[pidfd]", b"pidfd:["))

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """The process must be in the tree, or nowhere any more."""
        pid = _pid(view)
        if pid >= 0 and not scope.member(pid):
            whose = outside.name_of(HostPid(pid)) if pid else "a process"
            yield Blocker(view.subject, f"the pidfd is of {whose}, outside the tree", "close it")

    def capture(self, view: FdView, scope: CaptureScope) -> PidfdState:
        """Whose it is."""
        pid, thread = _pid(view), bool(view.flags & PIDFD_THREAD)
        if pid >= 0:
            return PidfdState(pid=scope.member(pid), thread=thread)
        alike = [(index, one) for index, one in scope.files() if self.matches(one)]
        alike = [
            (index, one) for index, one in alike if one.stat.st_ino == view.stat.st_ino and _pid(one) < 0
        ]
        first, _ = alike[0]
        place = next(n for n, (_, one) in enumerate(alike) if one is view)
        threads = [bool(one.flags & PIDFD_THREAD) for _, one in alike]
        return PidfdState(pid=0, thread=thread, gone=Gone(first, _exit_status(view), threads, place))

    def create(self, file: OpenFile, record: PidfdState, scope: CreateScope) -> LocalFd:
        """Open the process that stands for it.

        Raises:
            RebuildError: it is not there.
        """
        gone = record.gone
        if gone is not None:
            if os.WIFSIGNALED(gone.status) and os.WTERMSIG(gone.status) not in _ENDING:
                raise RebuildError(f"{describe(file)}: no process ends by signal {os.WTERMSIG(gone.status)}")
            try:
                made = scope.once(("gone", gone.number), lambda: [scope.own(fd) for fd in _ended(gone)])
            except OSError as error:
                raise RebuildError(
                    f"{describe(file)} of a process that is gone cannot be made: {error.strerror}"
                ) from error
            if not gone.place < len(made):
                raise RebuildError(f"{describe(file)}: there are {len(made)} pidfds of that process")
            return LocalFd(fcntl.fcntl(made[gone.place], fcntl.F_DUPFD_CLOEXEC, 0))
        flags = (os.O_NONBLOCK & file.flags) | (PIDFD_THREAD if record.thread else 0)
        try:
            return pidfd_open(scope.host_pid(record.pid), flags)
        except OSError as error:
            raise RebuildError(
                f"{describe(file)} of pid {record.pid} cannot be opened: {error.strerror}"
            ) from error


def _ended(gone: Gone) -> list[LocalFd]:
    """Pidfds of a process that ends as `gone` did and is collected; the caller owns them."""
    child = fork_deaf()
    if child == 0:
        try:
            if os.WIFSIGNALED(gone.status):
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                number = os.WTERMSIG(gone.status)
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    signal.signal(number, signal.SIG_DFL)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
                os.kill(os.getpid(), number)
        finally:
            os._exit(os.WEXITSTATUS(gone.status))
    fds: list[LocalFd] = []
    try:
        fds.extend(pidfd_open(HostPid(child), PIDFD_THREAD if thread else 0) for thread in gone.threads)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    finally:
        os.waitpid(child, 0)
    return fds


KIND = Pidfd()
