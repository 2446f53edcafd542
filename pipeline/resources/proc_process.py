"""Files and directories of /proc that are about one process: /proc/PID, and what is below it.

Their name says the process by its number in the pid namespace that this /proc shows. It has to be a process of
the tree, which has the same number there again, so that the same name leads to it. Who is meant is found by pid
namespace and number, which are read in that very directory.

Source: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from pipeline.errors import Blocker, passed_over, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Pid
from pipeline.kernel import procfs
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.paths import look_up, open_place

PROC_ROOT_INODE = 1


class Subject(NamedTuple):
    """Who a name in /proc is about: `directory` is the name of /proc/PID, `below` what follows it."""

    directory: bytes
    below: bytes


def subject(pid: HostPid, link: bytes, device: int) -> Subject | None:
    """Who `link`, on the proc filesystem `device`, is about; None if about no process."""
    parts = link.split(b"/")
    for at, part in enumerate(parts):
        if not part.isdigit():
            continue
        try:
            above = look_up(pid, b"/".join(parts[:at]) or b"/")
        except OSError as error:
            raise_if_exhausted(error)
            continue
        if (above.st_dev, above.st_ino) == (device, PROC_ROOT_INODE):
            return Subject(b"/".join(parts[: at + 1]), b"/".join(parts[at + 1 :]))
    return None


def check(view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
    """Whether `view`, a file of a proc filesystem, is about a process of the tree, or about none."""
    found = subject(view.namer, view.link, view.stat.st_dev)
    if found is None:
        return
    try:
        known = member(view.namer, found.directory, scope)
    except OSError as error:
        raise_if_exhausted(error)
        why = f"it cannot be seen which process {os.fsdecode(found.directory)} is: {error.strerror}"
        yield Blocker(view.subject, why, "close it")
        return
    if not known:
        name = os.fsdecode(os.path.basename(found.directory))
        yield Blocker(
            view.subject,
            f"it is about process {name}, which is not part of the tree",
            "close it, or include that process",
        )


def member(viewer: HostPid, directory: bytes, scope: CaptureScope) -> Pid:
    """The level-0 pid of the process of the tree that `directory` is about; 0 if it is none.

    Raises:
        OSError: it cannot be seen.
    """
    at = open_place(viewer, directory, os.O_PATH | os.O_DIRECTORY)
    try:
        namespace = os.readlink(b"ns/pid", dir_fd=at)
        innermost = _innermost(at)
    finally:
        os.close(at)
    for name in os.listdir("/proc"):
        if name.isdigit() and scope.member(int(name)):
            pid = HostPid(int(name))
            with passed_over(), suppress(procfs.ProcessGone):
                same = procfs.status(pid).ns_pid[-1] == innermost
                if same and os.readlink(f"/proc/{pid}/ns/pid".encode()) == namespace:
                    return scope.member(pid)
    return 0


def _innermost(directory: LocalFd) -> int:
    """The number that the process of a directory of /proc has in its own pid namespace."""
    fd = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        for line in os.read(fd, 1 << 16).split(b"\n"):
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    finally:
        os.close(fd)
    raise ProcessLookupError(3, "it has ended")
