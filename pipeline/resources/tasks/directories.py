"""Where a process is: its working directory and its root directory.

The kernel holds a mount and an inode for each; /proc prints a path, which has to lead there. A working directory that
was removed is made once more and removed (`pipeline.resources.removed`). Refused: a removed root directory; a
working directory that its path does not lead to, such as one below a mount that was taken away or covered.

Source: proc_pid_cwd(5), proc_pid_root(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import FileOwner, Id, PathRef
from pipeline.kernel import procfs
from pipeline.resources import removed
from pipeline.resources.paths import DELETED, NAME_REMOVED, wrong_name


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
    wrong = _wrong(pid, "cwd")
    if wrong and wrong != NAME_REMOVED:
        yield Blocker(
            f"pid {pid}",
            f"its working directory {os.fsdecode(procfs.read_link(pid, 'cwd'))} cannot be found again: {wrong}",
            "let it change its directory",
        )
    if procfs.read_link(pid, "root").endswith(DELETED) and _wrong(pid, "root"):
        yield Blocker(f"pid {pid}", "its root directory has been removed", "end it")


def captured(task: HostPid, pid: HostPid, scope: Scope) -> tuple[PathRef, FileOwner | None]:
    """The working directory of a task of `pid`, and what is needed to make it again where it was removed."""
    link = procfs.read_link(task, "cwd")
    if _wrong(task, "cwd") != NAME_REMOVED:
        return scope.path(pid, link), None
    found = os.stat(f"/proc/{task}/cwd")
    return scope.path(pid, link.removesuffix(DELETED)), removed.captured(found, scope.user, scope.group)


def _wrong(pid: HostPid, which: str) -> str | None:
    return wrong_name(pid, procfs.read_link(pid, which), os.stat(f"/proc/{pid}/{which}"))
