"""Files of the kernel's own filesystems: /proc, /sys, cgroups and their relatives.

What such a file says is made when it is read, so nothing of it can be carried; what
can be done is to open the same name again. That is right for a file that describes the system
(/proc/meminfo, /sys/class/…), and for one about a process of the tree (/proc/PID/…), which has the same number
again: kept are name, flags, position. Many of them show what whoever opened them may see, or count ids in the
opener's user namespace: so they are opened by the process that had them open. Opening one for writing has no effect by
itself: those of /proc/sys, /proc/PID, /sys and cgroups are opened again for writing, too.

Refused: files about a process outside the tree; other files of /proc that are open for writing; what remembers
something for each open file (pressure triggers, peaks that were reset); filesystems whose
files have a state of their own (tracefs, debugfs, bpf, …); the mounts of a process that has changed its root.
Files of fdinfo, about a descriptor, are opened while there is one of that number, made for it: processes get their
own later.
Not preserved: a file about a process that executed another program since holds on to its old memory, and is opened
on the new one. Source: proc(5), sysfs(5), cgroups(7); fs/proc/base.c, kernel/sched/psi.c.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError, passed_over
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile, PathRef, Pid, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.resources import locks, proc_process
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe, look_up, misnamed, open_inside, open_place, reopen, seek
from pipeline.resources.proc_process import Subject
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
_CONSUMED_BY_READING = (b"kmsg", b"kcore")
#: what is written there is remembered for the open file alone
_REMEMBERS = (b".pressure", b".peak")
_MOUNTS = (b"mounts", b"mountinfo", b"mountstats")


#: what of /proc/PID is about one descriptor
_FDINFO = re.compile(rb"(?:task/\d+/)?fdinfo/(\d+)")


class Told(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The descriptor that a file of fdinfo is about: the level-0 pid of who has it, and its number."""

    pid: Pid
    number: Annotated[int, Meta(ge=0, le=1 << 24)]


class KernelFileState(Record, frozen=True, kw_only=True):
    """A file of /proc, /sys or a cgroup filesystem; `opener`: who opens it, level-0 pid (0: whoever restores)."""

    path: PathRef
    opener: Pid = 0
    told: Told | None = None


def is_kernel_file(view: FdView) -> bool:
    """Whether the regular file of `view` is on a filesystem that the kernel makes up."""
    if not stat.S_ISREG(view.stat.st_mode):
        return False
    magic = view.filesystem
    return magic in _BY_NAME or magic in _WITH_STATE


class KernelFile(CompleteOnceCreated):
    """See the module."""

    name = "kernel-file"
    record: type[KernelFileState] = KernelFileState
    carried: Sequence[str] = (
        "files of /proc, /sys and cgroups, with position; of /proc/sys, /proc/PID, /sys and cgroups for writing, too",
        "/proc/PID files about processes of the tree, at every depth of pid namespaces",
    )
    refused: Sequence[str] = (
        "/proc/PID files about others",
        "pressure triggers, peaks that were reset",
        "tracefs, debugfs, bpf and the like",
    )
    shown_by: Sequence[str] = (
        "programs/files.py",
        "programs/file_states.py",
        "resources/test_places.py",
    )

    def matches(self, view: FdView) -> bool:
        """By filesystem."""
        return not view.flags & os.O_PATH and is_kernel_file(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Without a state of its own, about the tree or the system, and reachable by name."""
        magic = view.filesystem
        if magic not in _BY_NAME:
            where = _WITH_STATE.get(Magic(magic), "a kernel filesystem")
            yield Blocker(view.subject, f"files of {where} have a state that cannot be carried", "close it")
            return
        if magic == Magic.PROC and os.path.basename(view.link) in _CONSUMED_BY_READING:
            yield Blocker(view.subject, "what was read of this /proc file cannot be carried", "close it")
            return
        wrong = misnamed(view)
        if wrong:
            yield Blocker(view.subject, f"the file cannot be opened again by name: {wrong}", "close it")
            return
        yield from self._check_place(view, scope, Magic(magic))
        yield from locks.check(view, scope, carried=False)

    def _check_place(self, view: FdView, scope: CaptureScope, magic: Magic) -> Iterator[Blocker]:
        about = None
        if magic == Magic.PROC:
            about = proc_process.subject(view.namer, view.link, view.stat.st_dev)
            yield from proc_process.check(view, scope)
        if about is not None and about.below in _MOUNTS:
            with passed_over():
                directory = open_place(view.namer, about.directory, os.O_PATH | os.O_DIRECTORY)
                try:
                    if os.readlink(b"root", dir_fd=directory) != b"/":
                        why = "it lists the mounts below a root directory that was changed (chroot)"
                        yield Blocker(view.subject, why, "open it anew for each use")
                finally:
                    os.close(directory)
        if view.flags & os.O_ACCMODE == os.O_RDONLY:
            return
        where = _BY_NAME[magic]
        if view.link.endswith(_REMEMBERS) or b"/pressure/" in view.link:
            why = f"what was written into this file of {where} is remembered for the open file"
            yield Blocker(view.subject, why, "close it")
        elif magic == Magic.PROC and not _is_harmless(view, about):
            yield Blocker(
                view.subject, f"a file of {where} that is open for writing is not carried", "close it"
            )

    def capture(self, view: FdView, scope: CaptureScope) -> KernelFileState:
        """Its name."""
        opener = 0 if view.opened_here else scope.member(view.pid)
        return KernelFileState(path=scope.path(view.namer, view.link), opener=opener, told=_told(view, scope))

    def create(self, file: OpenFile, record: KernelFileState, scope: CreateScope) -> LocalFd:
        """Open the same name.

        Raises:
            RebuildError: it is not there, or not a kernel file.
        """
        with ExitStack() as undo:
            with _descriptor(record, scope):
                fd = self._open(file, record, scope)
                undo.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode) or filesystem(fd) not in _BY_NAME:
                raise RebuildError(f"{describe(file, record.path)} is not a file of the kernel here")
            undo.pop_all()
        return fd

    @staticmethod
    def _open(file: OpenFile, record: KernelFileState, scope: CreateScope) -> LocalFd:
        """From inside of the process; or, where what that may do has changed since, by us, for reading."""
        if not record.opener:
            return reopen(file, record.path, file.flags, scope)
        try:
            return reopen(file, record.path, file.flags, scope, partial(open_inside, record.opener, scope))
        except RebuildError:
            if file.flags & os.O_ACCMODE != os.O_RDONLY:
                raise
            return reopen(file, record.path, file.flags, scope)

    def connect(self, file: OpenFile, record: KernelFileState, scope: CreateScope) -> None:
        """Position, which these files understand as so many bytes of text."""
        if file.position and record.told is None:
            seek(file, scope)

    def finish(self, file: OpenFile, record: KernelFileState, scope: CreateScope) -> None:
        """The same, of what is about a descriptor that is there by now: the text is made for it."""
        if file.position and record.told is not None:
            seek(file, scope)


def _told(view: FdView, scope: CaptureScope) -> Told | None:
    found = proc_process.subject(view.namer, view.link, view.stat.st_dev)
    told = _FDINFO.fullmatch(found.below) if found is not None else None
    if found is None or told is None:
        return None
    return Told(proc_process.member(view.namer, found.directory, scope), int(told[1]))


@contextmanager
def _descriptor(record: KernelFileState, scope: CreateScope) -> Iterator[None]:
    """Whoever is told of has some descriptor of that number meanwhile: its own come later."""
    if record.told is None:
        yield
        return
    pid, number = record.told.pid, record.told.number
    some = LocalFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    try:
        scope.send(pid, some, at=number)
    finally:
        os.close(some)
    try:
        yield
    finally:
        scope.inject(pid, NR.close, number)


def _is_harmless(view: FdView, about: Subject | None) -> bool:
    """Whether opening this file of /proc for writing does nothing by itself, and holds nothing."""
    if about is not None:
        return not about.below.startswith(b"net/")
    above, below, _ = view.link.partition(b"/sys/")
    with suppress(OSError):
        found = look_up(view.namer, above or b"/")
        is_root = found.st_dev == view.stat.st_dev and found.st_ino == proc_process.PROC_ROOT_INODE
        return bool(below) and is_root
    return False


KIND = KernelFile()
