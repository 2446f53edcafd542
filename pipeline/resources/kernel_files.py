"""Files of the kernel's own filesystems: /proc, /sys, cgroups and their relatives.

What such a file says is made when it is read, so nothing of it can be carried; what
can be done is to open the same name again. That is right for a file opened read-only
that describes the system (/proc/meminfo, /sys/class/…): kept are name, flags, position.

Refused: files about one process (/proc/PID/…), because they hold on to that process and
often to its memory, not to a name; everything open for writing; filesystems whose
files have a state of their own (tracefs, debugfs, bpf, …). Source: proc(5), sysfs(5).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import OpenFile, PathRef, Record
from pipeline.resources import locks
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import (
    Magic,
    closed_on_error,
    describe,
    filesystem,
    look_up,
    misnamed,
    reopen,
    seek,
)
from pipeline.resources.steps import CompleteOnceCreated

#: read-only files there can be opened again by name
_BY_NAME = {Magic.PROC: "/proc", Magic.SYSFS: "/sys", Magic.CGROUP: "a cgroup", Magic.CGROUP2: "a cgroup"}
_WITH_STATE = {
    Magic.DEBUGFS: "debugfs",
    Magic.TRACEFS: "tracefs",
    Magic.SECURITYFS: "securityfs",
    Magic.SELINUX: "selinuxfs",
    Magic.CONFIGFS: "configfs",
    Magic.BPF: "bpf",
    Magic.EFIVARFS: "efivarfs",
    Magic.PSTOREFS: "pstore",
    Magic.BINFMTFS: "binfmt_misc",
    Magic.RESCTRL: "resctrl",
}
_PROC_ROOT_INODE = 1
_CONSUMED_BY_READING = (b"kmsg", b"kcore")


class KernelFileState(Record, frozen=True, kw_only=True):
    """A read-only file of /proc, /sys or a cgroup filesystem."""

    path: PathRef


def is_kernel_file(view: FdView) -> bool:
    """Whether the regular file of `view` is on a filesystem that the kernel makes up."""
    magic = filesystem(view.local)
    return stat.S_ISREG(view.stat.st_mode) and (magic in _BY_NAME or magic in _WITH_STATE)


def about_a_process(pid: HostPid, link: bytes, device: int) -> bool:
    """Whether `link`, on the proc filesystem `device`, is below the directory of one process."""
    parts = link.split(b"/")
    for at, part in enumerate(parts):
        if not part.isdigit():
            continue
        try:
            above = look_up(pid, b"/".join(parts[:at]) or b"/")
        except OSError:
            return True
        if (above.st_dev, above.st_ino) == (device, _PROC_ROOT_INODE):
            return True
    return False


class KernelFile(CompleteOnceCreated):
    """See the module."""

    name = "kernel-file"
    record: type[KernelFileState] = KernelFileState
    carried: Sequence[str] = (
        "read-only files of /proc, /sys and cgroups that are not about one process, with position",
    )
    refused: Sequence[str] = (
        "/proc/PID files",
        "files open for writing",
        "tracefs, debugfs, bpf and the like",
    )
    shown_by: Sequence[str] = (
        "programs/files.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """By filesystem."""
        return not view.flags & os.O_PATH and is_kernel_file(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Read-only, about the system, and reachable by name."""
        magic = filesystem(view.local)
        if magic not in _BY_NAME:
            where = _WITH_STATE.get(Magic(magic), "a kernel filesystem")
            yield Blocker(view.subject, f"files of {where} have a state that cannot be carried", "close it")
            return
        where = _BY_NAME[Magic(magic)]
        if view.flags & os.O_ACCMODE != os.O_RDONLY:
            yield Blocker(
                view.subject, f"a file of {where} that is open for writing is not carried", "close it"
            )
        if magic == Magic.PROC:
            if about_a_process(view.namer, view.link, view.stat.st_dev):
                yield Blocker(
                    view.subject, "a /proc file about one process is not carried", "open it anew for each use"
                )
                return
            if os.path.basename(view.link) in _CONSUMED_BY_READING:
                yield Blocker(view.subject, "what was read of this /proc file cannot be carried", "close it")
        wrong = misnamed(view)
        if wrong:
            yield Blocker(view.subject, f"the file cannot be opened again by name: {wrong}", "close it")
        yield from locks.check(view, carried=False)

    def capture(self, view: FdView, scope: CaptureScope) -> KernelFileState:
        """Its name."""
        return KernelFileState(path=scope.path(view.namer, view.link))

    def create(self, file: OpenFile, record: KernelFileState, scope: CreateScope) -> LocalFd:
        """Open the same name.

        Raises:
            RebuildError: it is not there, or not a kernel file.
        """
        with closed_on_error(reopen(file, record.path, file.flags, scope)) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or filesystem(fd) not in _BY_NAME:
                raise RebuildError(f"{describe(file, record.path)} is not a file of the kernel here")
        return fd

    def connect(self, file: OpenFile, record: KernelFileState, scope: CreateScope) -> None:
        """Position, which these files understand as so many bytes of text."""
        if file.position:
            seek(file, scope)


KIND = KernelFile()
