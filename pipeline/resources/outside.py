"""Who else holds an open file, or is in a process group or session: processes that are not part of the tree.

A pipe, an eventfd or a memfd whose other user stays behind would lose its meaning.
Their /proc/PID/fd links are compared, as far as this process may read them; the
pipeline itself does not count, because it holds duplicates of everything it looks at.
What another user's process holds stays invisible to a plain user.

A host may have many thousand descriptors, which take longer to read than a tree should stand still. So they are read
before it does, and inside only those of processes that are new, or have another number of descriptors than before.
Somebody who has closed one meanwhile, and got one of the tree in its place, is not found out; no more is who gets it
right behind the look, or has it on the way to him in a socket.

Links of some kinds say nothing but the kind (``anon_inode:[eventfd]``), and a host may have thousands of such. Whose
open file it is tells kcmp(2), which also brings open files into an order, the same until the host is booted anew. So
they are brought in order before the tree stands still, too, and looked up inside.

Sources: proc_pid_fd(5) (the size of the directory is their number since Linux 6.2), kcmp(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import pairwise, takewhile
from typing import NamedTuple

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel.procfs import ProcessGone, stat
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.shielded import Shield

#: (process here, descriptor number there)
Holder = tuple[HostPid, int]
_GONE = (PermissionError, FileNotFoundError, ProcessLookupError)
#: of fewer descriptors with one link each is compared
_MANY = 32
#: what kcmp(2) says of one that is behind the other
_GREATER = 2


class _Seen(NamedTuple):
    """A process: what /proc/PID/fd itself was (its inode, and how many are in it), the links in it; its groups."""

    state: tuple[int, int]
    links: list[bytes]
    groups: set[int]


class Outsiders:
    """The descriptors of every process of this host but our own, as they were at the last look.

    `shield`: whose child may have duplicates, too.
    """

    def __init__(self, shield: Shield | None = None) -> None:
        self._shield = shield
        self._seen: dict[HostPid, _Seen] = {}
        self._holders: dict[bytes, dict[HostPid, list[int]]] = {}
        self._groups: dict[int, set[HostPid]] = {}
        self._ranked: dict[bytes, Ranked] = {}
        #: who was in the tree then, and is not among them
        self._members: set[HostPid] = set()
        #: who was read, or has ended, since they were brought in order
        self._changed: set[HostPid] = set()
        #: device and inode of descriptors, at this look; None: it is gone
        self._inodes: dict[Holder, tuple[int, int] | None] = {}

    def look_anew(self, members: Collection[HostPid]) -> None:
        """Before a tree of these processes stands still: read all of them, and bring in order what it may be asked."""
        for known in (self._seen, self._holders, self._groups, self._ranked):
            known.clear()
        self.look()
        self._changed.clear()
        self._members = set(members)
        if not _are_counted():
            return  # all are read again, and would have to be brought in order again
        links = {link for pid in self._members if pid in self._seen for link in self._seen[pid].links}
        for link in links:
            holders = [holder for holder in self.of(link) if holder[0] not in self._members]
            if len(holders) > _MANY:
                self._ranked[link] = Ranked(holders)

    def look(self) -> None:
        """Read what has changed."""
        self._inodes.clear()
        own = {os.getpid(), self._shield.child if self._shield is not None else 0}
        gone = set(self._seen)
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) not in own:
                pid = HostPid(int(name))
                with suppress(*_GONE, ProcessGone):
                    self._look_at(pid)
                    gone.discard(pid)
        for pid in gone:
            self._forget(pid)
        for ranked in self._ranked.values():
            ranked.forget(self._changed)

    def _look_at(self, pid: HostPid) -> None:
        found = os.stat(f"/proc/{pid}/fd")
        state = found.st_ino, found.st_size
        before = self._seen.get(pid)
        if before is not None and before.state == state and _are_counted():
            return
        self._forget(pid)
        self._changed.add(pid)
        task = stat(pid)
        groups = {task.pgrp, task.session}
        links: list[bytes] = []
        self._seen[pid] = _Seen(state, links, groups)
        for group in groups:
            self._groups.setdefault(group, set()).add(pid)
        entries: list[str] = []
        with suppress(*_GONE):  # it is somebody else's, or has ended and was not collected: its groups count
            entries = os.listdir(f"/proc/{pid}/fd")
        for entry in entries:
            with suppress(*_GONE):
                link = os.readlink(f"/proc/{pid}/fd/{entry}".encode())
                self._holders.setdefault(link, {}).setdefault(pid, []).append(int(entry))
                links.append(link)

    def _forget(self, pid: HostPid) -> None:
        self._changed.add(pid)
        seen = self._seen.pop(pid, None)
        if seen is None:
            return
        for group in seen.groups:
            self._groups[group].discard(pid)
            if not self._groups[group]:
                del self._groups[group]
        for link in seen.links:
            holders = self._holders.get(link, {})
            holders.pop(pid, None)
            if not holders:
                self._holders.pop(link, None)

    def of(self, link: bytes) -> Iterator[Holder]:
        """The descriptors whose link read `link`."""
        for pid, numbers in self._holders.get(link, {}).items():
            for number in numbers:
                yield pid, number

    def of_inode(self, link: bytes, inode: tuple[int, int]) -> Iterator[Holder]:
        """Those of them that refer to this device and inode now."""
        for holder in self.of(link):
            if holder not in self._inodes:
                self._inodes[holder] = None
                with suppress(OSError):
                    found = os.stat(f"/proc/{holder[0]}/fd/{holder[1]}")
                    self._inodes[holder] = found.st_dev, found.st_ino
            if self._inodes[holder] == inode:
                yield holder

    def of_file(self, link: bytes, seat: Holder, counts: Callable[[HostPid], bool]) -> Iterator[Holder]:
        """Those of them that are the open file of `seat` now, where kcmp(2) may compare them.

        Args:
            link: what they read.
            seat: a descriptor of the tree.
            counts: whether a process is outside of it.
        """
        holders = self._holders.get(link, {})
        pids: Iterable[HostPid] = holders.keys()
        ranked = self._ranked.get(link)
        found = ranked.find(seat) if ranked is not None else None
        if found is not None:
            yield from (holder for holder in found if counts(holder[0]))
            pids = holders.keys() & (self._changed | self._members)
        yield from _same(seat, ((pid, fd) for pid in pids if counts(pid) for fd in holders[pid]))

    def in_group(self, number: int) -> Iterator[HostPid]:
        """Who was in a process group or a session of this number."""
        yield from self._groups.get(number, ())


class Ranked:
    """Descriptors in the order that kcmp(2) gives to their open files; those that it may not compare are left out."""

    def __init__(self, holders: Iterable[Holder]) -> None:
        self._order: list[Holder] = []
        for holder in holders:
            with suppress(OSError):
                _compare(holder, holder)
                self._order.insert(self._place(holder), holder)

    def _place(self, holder: Holder) -> int:
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            try:
                is_behind = _compare(holder, self._order[middle]) == _GREATER
            except OSError:  # that one is gone
                del self._order[middle]
                high -= 1
                continue
            low, high = (middle + 1, high) if is_behind else (low, middle)
        return low

    def forget(self, pids: Collection[HostPid]) -> None:
        """Leave out what these have."""
        if any(holder[0] in pids for holder in self._order):
            self._order = [holder for holder in self._order if holder[0] not in pids]

    def find(self, seat: Holder) -> list[Holder] | None:
        """Which are the open file of `seat`; None if they are not in order any more, as far as that is seen.

        Who has another file by now under the same number may lead astray, unless it would be in the same place; so
        each that is compared with has to be in order with those beside it.
        """
        try:
            low, high = 0, len(self._order)
            while low < high:
                middle = (low + high) // 2
                around = self._order[max(middle - 1, 0) : middle + 2]
                if any(_compare(one, other) == _GREATER for one, other in pairwise(around)):
                    return None
                is_behind = _compare(seat, self._order[middle]) == _GREATER
                low, high = (middle + 1, high) if is_behind else (low, middle)
            return list(takewhile(lambda one: _compare(seat, one) == 0, self._order[low:]))
        except OSError:
            return None


def _compare(one: Holder, other: Holder) -> int:
    return kcmp(one[0], other[0], KCMP.FILE, one[1], other[1])


def _same(seat: Holder, holders: Iterable[Holder]) -> Iterator[Holder]:
    for holder in holders:
        with suppress(OSError):
            if _compare(seat, holder) == 0:
                yield holder


@cache
def _are_counted() -> bool:
    """Whether this kernel says how many descriptors a process has."""
    return os.stat("/proc/self/fd").st_size > 0


def name_of(pid: HostPid) -> str:
    """``pid 12 (bash)``."""
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
        return f"pid {pid} ({comm.read().strip()})"
    return f"pid {pid}"


def of_link(link: bytes, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree whose link reads `link`: of another open file than those at hand."""
    found = []
    for pid, fd in _outside(scope.outsiders().of(link), scope):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}".encode()) == link:
                found.append((pid, fd))
    return found


def same_link(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same inode, for links that name the inode or a path."""
    return _outside(scope.outsiders().of_inode(view.link, (view.stat.st_dev, view.stat.st_ino)), scope)


def same_file(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same open file description, where kcmp(2) may compare them."""
    return list(scope.outsiders().of_file(view.link, view.seat, lambda pid: not scope.member(pid)))


def _outside(holders: Iterable[Holder], scope: CaptureScope) -> list[Holder]:
    return [holder for holder in holders if not scope.member(holder[0])]


def blockers(
    view: FdView, holders: list[Holder], what: str, remedy: str = "include that process or redirect it"
) -> Iterator[Blocker]:
    """One blocker that names up to four of the holders."""
    if holders:
        pids = sorted({pid for pid, _ in holders})
        named = ", ".join(name_of(pid) for pid in pids[:4]) + (
            f" and {len(pids) - 4} more" if len(pids) > 4 else ""
        )
        yield Blocker(view.subject, f"{what} {named} outside the tree", remedy)
