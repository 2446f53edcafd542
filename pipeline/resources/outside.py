"""Who else holds an open file, or is in a process group or session: processes that are not part of the tree.

A pipe, an eventfd or a memfd whose other user stays behind would lose its meaning.
Their /proc/PID/fd links are compared, as far as this process may read them; the
pipeline itself does not count, because it holds duplicates of everything it looks at.
What another user's process holds stays invisible to a plain user.

A host may have many thousand descriptors, which take longer to read than a tree should stand still. So they are read
before it does, and inside only those of processes that are new, or have another number of descriptors than before.
Somebody who has closed one meanwhile, and got one of the tree in its place, is not found out; no more is who gets it
right behind the look, or has it on the way to him in a socket.

Sources: proc_pid_fd(5) (the size of the directory is their number since Linux 6.2), kcmp(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
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

    def look_anew(self) -> None:
        """Before a tree stands still: read all of them, if anybody has ever asked."""
        if self._seen:
            for known in (self._seen, self._holders, self._groups):
                known.clear()
            self.look()

    def look(self) -> None:
        """Read what has changed."""
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

    def _look_at(self, pid: HostPid) -> None:
        found = os.stat(f"/proc/{pid}/fd")
        state = found.st_ino, found.st_size
        before = self._seen.get(pid)
        if before is not None and before.state == state and _are_counted():
            return
        self._forget(pid)
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

    def in_group(self, number: int) -> Iterator[HostPid]:
        """Who was in a process group or a session of this number."""
        yield from self._groups.get(number, ())


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
    for pid, fd in _outside(link, scope):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}".encode()) == link:
                found.append((pid, fd))
    return found


def same_link(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same inode, for links that name the inode or a path."""
    found = []
    for pid, fd in _outside(view.link, scope):
        with suppress(OSError):
            found_there = os.stat(f"/proc/{pid}/fd/{fd}")
            if (found_there.st_dev, found_there.st_ino) == (view.stat.st_dev, view.stat.st_ino):
                found.append((pid, fd))
    return found


def same_file(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same open file description, where kcmp(2) may compare them."""
    found = []
    holder, number = view.seat
    for pid, fd in _outside(view.link, scope):
        with suppress(OSError):
            if kcmp(holder, pid, KCMP.FILE, number, fd) == 0:
                found.append((pid, fd))
    return found


def _outside(link: bytes, scope: CaptureScope) -> Iterator[Holder]:
    return (holder for holder in scope.outsiders().of(link) if not scope.member(holder[0]))


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
