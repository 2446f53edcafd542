"""Which open files a tree has, and which of its descriptors are the same one.

Two descriptors share an open file description (position, flags, locks) after dup or
fork; the kernel says so by kcmp(KCMP_FILE), which also orders descriptions, so each
new descriptor finds its like in a sorted list in a few comparisons, however many
there are. Files that are in flight in unix sockets count as well, when the tree stands still.
Every distinct open file is held by one duplicate in our own table until the capture ends;
nothing in the target is touched.

Source: kcmp(2), pidfd_getfd(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Self

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import FdEntry
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import KCMP, PIDFD_THREAD, kcmp, pidfd_getfd, pidfd_open
from pipeline.ledger import LEDGER
from pipeline.remote.tracer import check_cancelled
from pipeline.resources import in_flight
from pipeline.resources.kinds import FdView
from pipeline.resources.unix_unread import Unread

_LESS = 1
#: looks at a number whose file is closed and opened again as fast as it is looked at
_ATTEMPTS = 20


class OpenFiles:
    """All open files of a tree; a context manager that holds one duplicate of each."""

    def __init__(self) -> None:
        self.views: list[FdView] = []
        self.slots: dict[HostPid, list[FdEntry]] = defaultdict(list)
        self.blockers: list[Blocker] = []
        #: by the index of a unix socket with descriptors in flight in its queue: what is in it
        self.unread: dict[int, list[Unread]] = {}
        self._sorted: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        self._holders: dict[int, list[tuple[HostPid, int]]] = defaultdict(list)
        self._at: dict[tuple[HostPid, int], int] = {}
        #: of descriptors with locks, what fdinfo says of them
        self.lock_lines: dict[tuple[HostPid, int], list[str]] = {}
        #: by number: who was found last to have it, and the index of what that is
        self._last: dict[int, tuple[HostPid, int]] = {}
        self._apart: dict[HostPid, bool] = {}
        self._mounts: dict[HostPid, frozenset[int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back every duplicate; idempotent."""
        while self.views:
            view = self.views.pop()
            os.close(view.local)
            LEDGER.give_back("duplicate", view.local)

    def collect(
        self, pids: Sequence[HostPid], still: bool, status_of: Callable[[HostPid], procfs.Status]
    ) -> None:
        """Look at every descriptor of these processes (none of them a zombie).

        Args:
            pids: the processes.
            still: they are stopped: what is in flight between them is looked at, too.
            status_of: reads /proc/TID/status, or remembers it.
        """
        for pid in pids:
            check_cancelled()
            with suppress(ProcessLookupError, procfs.ProcessGone):
                self._collect(pid, status_of(pid).tgid)
        if still:
            for found in in_flight.gather(self.views, self._adopt):
                if isinstance(found, Blocker):
                    self.blockers.append(found)
                else:
                    index, unread = found
                    self.unread[index] = unread

    def _collect(self, pid: HostPid, number: int) -> None:
        try:
            pidfd = pidfd_open(pid, 0 if number == pid else PIDFD_THREAD)
        except OSError as error:
            if number == pid or error.errno != errno.EINVAL:
                raise
            gone = "its first thread has ended, and then this kernel shows its open files to nobody"
            self.blockers.append(Blocker(f"pid {number}", gone, "use Linux 6.9 or newer"))
            return
        try:
            for fd in sorted(map(int, procfs.list_dir(pid, "fdinfo"))):
                failed = self._attempt(pid, fd, pidfd)
                if failed is not None:
                    raise_if_exhausted(failed)
                    self.blockers.append(Blocker(f"pid {pid} fd {fd}", f"cannot be looked at: {failed}"))
        finally:
            os.close(pidfd)

    def _attempt(self, pid: HostPid, fd: int, pidfd: LocalFd) -> OSError | None:
        """Why a descriptor cannot be looked at; one that was closed meanwhile, as a tree that runs does, is in no way.

        Between the look that fails and the one for its name, the number can be another file's already.
        """
        failed = None
        for _ in range(_ATTEMPTS):
            try:
                self._add(pid, fd, pidfd)
                return None
            except OSError as error:
                failed = error
            if not os.path.lexists(f"/proc/{pid}/fdinfo/{fd}"):
                return None
        return failed

    def _add(self, pid: HostPid, fd: int, pidfd: LocalFd) -> None:
        info = procfs.fdinfo(pid, fd)
        index = self._inherited(pid, fd)
        if index is None:
            local = pidfd_getfd(pidfd, fd)
            LEDGER.take("duplicate", local)
            index = self._place(local, pid, fd, info)
        cloexec = bool(int(info["flags"][0], 8) & os.O_CLOEXEC)
        self.slots[pid].append(FdEntry(fd, index, cloexec))
        self._holders[index].append((pid, fd))
        self._at[pid, fd] = index
        self._last[fd] = (pid, index)
        if "lock" in info:
            self.lock_lines[pid, fd] = info["lock"]

    def _inherited(self, pid: HostPid, fd: int) -> int | None:
        """The index of an open file that a process before has under the same number, as forks do; None if it has not.

        One question instead of a duplicate, and what is asked of that.
        """
        if fd not in self._last:
            return None
        other, index = self._last[fd]
        try:
            return None if kcmp(other, pid, KCMP.FILE, fd, fd) else index
        except OSError:  # it is closed by now, or may not be compared
            return None

    def _adopt(self, local: LocalFd, queue: FdView) -> int:
        """The index of an open file that is in flight in the queue of a socket. Takes `local` over."""
        LEDGER.take("duplicate", local)
        in_flight_as = -1 - len(self.views)
        index = self._place(local, queue.pid, in_flight_as)
        view = self.views[index]
        if view.fd == in_flight_as:
            self._at[view.pid, view.fd] = index
        return index

    def _place(self, local: LocalFd, pid: HostPid, fd: int, info: dict[str, list[str]] | None = None) -> int:
        """The index of the open file behind a duplicate, which is kept if the file is new; `info`: its fdinfo."""
        try:
            stat = os.fstat(local)
            if info is None:
                info = procfs.fdinfo(HostPid(os.getpid()), local)
            flags = fcntl.fcntl(local, fcntl.F_GETFL)
            group = self._sorted[stat.st_dev, stat.st_ino, flags]
            at, same = self._find(group, local)
            if not same:
                link = os.readlink(b"/proc/self/fd/%d" % local)
                if fd < 0 and link.startswith(b"/"):
                    pid = self._sender(pid, info)
                position = int(info["pos"][0])
                here = self._opened_here(pid, info)
                self.views.append(FdView(pid, fd, local, link, stat, info, flags, position, here))
                group.insert(at, len(self.views) - 1)
                return len(self.views) - 1
        except BaseException:
            os.close(local)
            LEDGER.give_back("duplicate", local)
            raise
        os.close(local)
        LEDGER.give_back("duplicate", local)
        return group[at]

    def _sender(self, receiver: HostPid, info: dict[str, list[str]]) -> HostPid:
        """A process of the tree that sees the mount a file in flight is on: its name is a name there."""
        mount = int(info.get("mnt_id", ["-1"])[0])
        for pid in (receiver, *self.slots):
            if pid not in self._mounts:
                self._mounts[pid] = frozenset(found.id for found in mountinfo(pid))
            if mount in self._mounts[pid]:
                return pid
        return receiver

    def _opened_here(self, pid: HostPid, info: dict[str, list[str]]) -> bool:
        """Whether a process of another mount namespace has a file that was opened in ours."""
        if pid not in self._apart:
            self._apart[pid] = nsfs.key(pid, "mnt") != self._own_mounts[0]
        return self._apart[pid] and int(info.get("mnt_id", ["-1"])[0]) in self._own_mounts[1]

    @cached_property
    def _own_mounts(self) -> tuple[NamespaceKey | None, frozenset[int]]:
        """Our mount namespace, and the numbers of the mounts in it."""
        me = HostPid(os.getpid())
        return nsfs.key(me, "mnt"), frozenset(mount.id for mount in mountinfo(me))

    def _find(self, group: Sequence[int], local: LocalFd) -> tuple[int, bool]:
        """Where in the sorted `group` the open file of `local` is or belongs."""
        me = os.getpid()
        low, high = 0, len(group)
        while low < high:
            middle = (low + high) // 2
            order = kcmp(me, me, KCMP.FILE, local, self.views[group[middle]].local)
            if order == 0:
                return middle, True
            if order == _LESS:
                high = middle
            else:
                low = middle + 1
        return low, False

    def files(self) -> Iterator[tuple[int, FdView]]:
        """Every open file: index and one view of it."""
        return iter(list(enumerate(self.views)))

    def file_at(self, pid: HostPid, fd: int) -> int | None:
        """Index of the open file behind a descriptor; None for an empty slot."""
        return self._at.get((pid, fd))

    def holders(self, index: int) -> Sequence[tuple[HostPid, int]]:
        """Every descriptor of the tree that refers to an open file."""
        return self._holders[index]
