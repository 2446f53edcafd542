"""Who else holds an open file: processes that are not part of the tree.

A pipe, an eventfd or a memfd whose other user stays behind would lose its meaning.
Their /proc/PID/fd links are compared, as far as this process may read them; the
pipeline itself does not count, because it holds duplicates of everything it looks at.
What another user's process holds stays invisible to a plain user.

Sources: proc_pid_fd(5), kcmp(2).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel.syscalls import KCMP, kcmp
from pipeline.resources.kinds import CaptureScope, FdView

#: (process here, descriptor number there)
Holder = tuple[HostPid, int]


def _table(scope: CaptureScope) -> dict[bytes, list[Holder]]:
    """Link text -> descriptors outside the tree; read once a capture."""
    cached: dict[bytes, list[Holder]] | None = scope.peers().get("outside")
    if cached is not None:
        return cached
    table: dict[bytes, list[Holder]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid() or scope.member(int(name)):
            continue
        pid = HostPid(int(name))
        with suppress(PermissionError, FileNotFoundError, ProcessLookupError):
            for entry in os.listdir(f"/proc/{pid}/fd"):
                with suppress(PermissionError, FileNotFoundError, ProcessLookupError):
                    table[os.readlink(f"/proc/{pid}/fd/{entry}".encode())].append((pid, int(entry)))
    scope.peers()["outside"] = table
    return table


def name_of(pid: HostPid) -> str:
    """``pid 12 (bash)``."""
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
        return f"pid {pid} ({comm.read().strip()})"
    return f"pid {pid}"


def same_link(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same inode, for links that name the inode or a path."""
    found = []
    for pid, fd in _table(scope).get(view.link, []):
        with suppress(OSError):
            stat = os.stat(f"/proc/{pid}/fd/{fd}")
            if (stat.st_dev, stat.st_ino) == (view.stat.st_dev, view.stat.st_ino):
                found.append((pid, fd))
    return found


def same_file(view: FdView, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree of the same open file description, where kcmp(2) may compare them."""
    found = []
    holder, number = view.seat
    for pid, fd in _table(scope).get(view.link, []):
        with suppress(OSError):
            if kcmp(holder, pid, KCMP.FILE, number, fd) == 0:
                found.append((pid, fd))
    return found


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


def of_link(link: bytes, scope: CaptureScope) -> list[Holder]:
    """Descriptors outside the tree whose link reads `link`: of another open file than those at hand."""
    return _table(scope).get(link, [])
