"""Which side of which pseudo-terminal an open file is, and where in the tree the other side is.

A pair is known by its number and its devpts instance, a master by the device number of the
devpts mounted beside its ptmx, as its process sees it. A descriptor of /dev/tty tells the
number only; the session that its process is in tells the pair.

Source: pts(4), tty(4); fs/devpts/inode.c.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Literal

from pipeline.image.schema import Index
from pipeline.kernel import procfs
from pipeline.resources import outside, terminal
from pipeline.resources.kinds import CaptureScope, FdView

DEVPTS_MAGIC = 0x1CD1
_TTY_MAJOR = 4
_AUX_MAJOR = 5
_DEV_TTY = 0
_DEV_PTMX = 2

Role = Literal["master", "slave", "tty", "hung-up"]


def role(view: FdView) -> Role | None:
    """Which side `view`, a terminal, is; None for terminals that are no pseudo-terminals."""
    device = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    if device == (_AUX_MAJOR, _DEV_PTMX):
        return "master"
    if device != (_AUX_MAJOR, _DEV_TTY) and device[0] != terminal.PTS_MAJOR:
        return None
    found = terminal.device(view.local)
    if found is None:
        return "hung-up"
    if found[0] != terminal.PTS_MAJOR:
        return None
    return "tty" if device == (_AUX_MAJOR, _DEV_TTY) else "slave"


def number(view: FdView) -> int:
    """N of /dev/pts/N; of a slave that is hung up: what its own node says."""
    found = terminal.device(view.local)
    return found[1] if found else os.minor(view.stat.st_rdev)


def slave_directory(view: FdView) -> bytes:
    """Where the devpts instance of a master or slave is mounted, as its process sees it."""
    directory = os.path.dirname(view.link)
    if view.filesystem == DEVPTS_MAGIC:
        return directory
    return os.path.join(directory, b"pts")


def instance(view: FdView) -> int | None:
    """Device number of the devpts instance that a master or slave belongs to; None if it cannot be seen."""
    if view.filesystem == DEVPTS_MAGIC:
        return view.stat.st_dev
    with suppress(OSError):
        return os.stat(f"/proc/{view.pid}/root".encode() + slave_directory(view)).st_dev
    return None


def by_number(files: Iterable[tuple[Index, FdView]]) -> dict[int, list[tuple[Index, FdView]]]:
    """Those of some open files that are a side of a pair which has both, by the number of the pair."""
    found: dict[int, list[tuple[Index, FdView]]] = {}
    for index, view in files:
        if is_terminal(view) and role(view) in ("master", "slave", "tty"):
            found.setdefault(number(view), []).append((index, view))
    return found


def masters(scope: CaptureScope, wanted: int) -> Iterator[tuple[Index, FdView]]:
    """Every master in the tree that has the number `wanted` (one for each devpts instance)."""
    for index, view in scope.terminals(wanted):
        if role(view) == "master":
            yield index, view


def master_of(view: FdView, scope: CaptureScope) -> tuple[Index, FdView] | None:
    """The master of a slave or /dev/tty descriptor, if it is in the tree."""
    for index, master in masters(scope, number(view)):
        if role(view) == "slave":
            if instance(master) == instance(view):
                return index, master
        elif terminal.session(master.local) == procfs.stat(view.pid).session:
            return index, master
    return None


def slaves(master: FdView, scope: CaptureScope) -> list[FdView]:
    """Every slave (or /dev/tty) of `master` that is open in the tree."""
    return [
        view
        for _, view in scope.terminals(number(master))
        if role(view) in ("slave", "tty")
        and (found := master_of(view, scope)) is not None
        and (found[1].pid, found[1].fd) == (master.pid, master.fd)
    ]


def is_terminal(view: FdView) -> bool:
    """Whether `view` is a terminal device of any sort, or a master."""
    if not stat.S_ISCHR(view.stat.st_mode) or view.flags & os.O_PATH:
        return False
    major, minor = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    return major in (_TTY_MAJOR, terminal.PTS_MAJOR) or (major == _AUX_MAJOR and minor <= _DEV_PTMX)


def owner_outside(wanted: int, scope: CaptureScope) -> str:
    """Who outside the tree has the master of terminal `wanted`."""
    for link in (b"/dev/ptmx", b"/dev/pts/ptmx"):
        for pid, fd in outside.of_link(link, scope):
            with suppress(OSError):
                if procfs.fdinfo(pid, fd).get("tty-index") == [str(wanted)]:
                    return outside.name_of(pid)
    return "a process that cannot be seen"
