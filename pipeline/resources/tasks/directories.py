"""Where a process is: its working directory and its root directory.

The kernel holds a mount and an inode for each; /proc prints a path, which has to lead there. A working directory that
was removed is made once more and removed (`pipeline.resources.removed`). Either may be a directory of /proc whose
process has ended: nothing can be found in it, which is why sandboxes, as those of browsers, have such a root (a child
that shares it by CLONE_FS calls chroot(2) with its own /proc/self/fdinfo, and ends). It becomes that of a helper.
Refused: another root directory that was removed; a working directory that its path does not lead to, such as one below
a mount that was taken away or covered.

Source: proc_pid_cwd(5), proc_pid_root(5); fs/proc/fd.c, proc_fdinfo_permission.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Protocol

from pipeline.errors import Blocker, raise_if_exhausted
from pipeline.ids import HostPid
from pipeline.image.schema import Id, PathRef, Place
from pipeline.kernel import procfs
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.resources import removed
from pipeline.resources.paths import DELETED, NAME_REMOVED, wrong_name
from pipeline.resources.support import Support

SUPPORT = Support(
    kind="directories",
    carried=(
        "working directory, root (chroot), umask; a working directory that was removed",
        "either of a process that has ended, in /proc (sandboxes of browsers)",
    ),
    refused=(
        "another root that was removed; a working directory that its path does not lead to (a mount is gone, covered)",
    ),
    shown_by=("programs/files.py", "programs/file_states.py", "resources/test_directories.py"),
)

#: where a file system of processes is mounted, and what is meant below a process or thread of it
_OF_PROCESS = re.compile(rb"(/.*)(?<!/task)/[0-9]+(?:/task/[0-9]+)?((?:/.*)?)", re.DOTALL)


class Scope(Protocol):
    """What is asked about the rest of the tree."""

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        """See `CaptureScope`."""

    def user(self, uid: int) -> Id:
        """See `CaptureScope`."""

    def group(self, gid: int) -> Id:
        """See `CaptureScope`."""


def check(pid: HostPid) -> Iterator[Blocker]:
    """Whether both can be found again."""
    cwd = procfs.read_link(pid, "cwd")
    wrong = _wrong(pid, "cwd", cwd)
    if wrong and wrong != NAME_REMOVED and not _is_of_ended(pid, "cwd", cwd):
        yield Blocker(
            f"pid {pid}",
            f"its working directory {os.fsdecode(cwd)} cannot be found again: {wrong}",
            "let it change its directory",
        )
    if is_removed(pid):
        yield Blocker(f"pid {pid}", "its root directory has been removed", "end it")


def is_removed(task: HostPid) -> bool:
    """Whether the root directory of a task cannot be found again, nor made."""
    link = procfs.read_link(task, "root")
    return (
        link.endswith(DELETED) and bool(_wrong(task, "root", link)) and not _is_of_ended(task, "root", link)
    )


def captured(task: HostPid, pid: HostPid, umask: int, scope: Scope) -> Place:
    """Where a task of `pid` is, and what is needed to make its working directory again where it was removed."""
    cwd, root = procfs.read_link(task, "cwd"), procfs.read_link(task, "root")
    cwd_removed = None
    cwd_of_ended = _is_of_ended(task, "cwd", cwd)
    if not cwd_of_ended and _wrong(task, "cwd", cwd) == NAME_REMOVED:
        cwd = cwd.removesuffix(DELETED)
        found = os.stat(f"/proc/{task}/cwd")
        cwd_removed = removed.captured(found, scope.user, scope.group)
    return Place(
        cwd=scope.path(pid, cwd),
        cwd_removed=cwd_removed,
        cwd_of_ended=cwd_of_ended,
        root=scope.path(pid, root),
        root_of_ended=_is_of_ended(task, "root", root),
        umask=umask,
    )


def of_process(path: bytes) -> tuple[bytes, bytes] | None:
    """Where the file system of a directory that may be of a process is mounted, and its path below the process."""
    found = _OF_PROCESS.fullmatch(path.removesuffix(DELETED))
    return (found[1], found[2].removeprefix(b"/")) if found else None


def _is_of_ended(task: HostPid, which: str, link: bytes) -> bool:
    if of_process(link) is None:
        return False
    fd = os.open(f"/proc/{task}/{which}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if filesystem(fd) != Magic.PROC:
            return False
        os.listdir(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise_if_exhausted(error)
        return error.errno in (errno.ESRCH, errno.ENOENT)
    finally:
        os.close(fd)
    return False


def _wrong(pid: HostPid, which: str, link: bytes) -> str | None:
    return wrong_name(pid, link, os.stat(f"/proc/{pid}/{which}"))
