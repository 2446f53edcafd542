"""fanotify(7) groups: what they watch.

The kernel holds: flags of the group, flags of the descriptors it hands out with events, marks (of an inode, a mount or
a filesystem) with masks of what is reported and of what is ignored, and a queue of events that nobody has read yet.

Kept: both kinds of flags and every mark. What is marked is found as inotify's watches are
(`pipeline.resources.watched`): an inode by a name or as an open file of the tree, a mount and a filesystem by where
they are mounted. Marks are set when all other open files stand. A group of a process without CAP_SYS_ADMIN in the
initial user namespace is made without that, too: it may watch less, and is told less. One with flags that only
CAP_SYS_ADMIN gives (`_is_for_admins`) is made with it, if its process is in the initial user namespace.

Not preserved: against whose limits (/proc/sys/fs/fanotify) groups and marks count. What happens while the tree does
not run is not reported.
Refused: a group that is asked for permission (FAN_CLASS_CONTENT, FAN_CLASS_PRE_CONTENT), because files would be
accessed unasked while it does not run; unread events, while there are some and `--file-events drop` is not said; marks
of mount namespaces, and those of mounts and filesystems that were set in a user namespace, or that are covered by
another mount; a group with flags for admins in a user namespace; a group shared with a process outside.
Source: fanotify_init(2), fanotify_mark(2); fs/notify/fdinfo.c, fs/notify/fanotify/fanotify_user.c.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError, TargetError, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import U32, U64, Index, OpenFile, PathRef, Record
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.syscalls import syscall
from pipeline.resources import outside, watched
from pipeline.resources.acting import acting_as
from pipeline.resources.inotify import unread
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe, look_up, open_place
from pipeline.resources.steps import CompleteOnceCreated

#: FAN_CLASS_CONTENT and FAN_CLASS_PRE_CONTENT
_CLASSES = 0xC
#: FAN_UNLIMITED_QUEUE, _UNLIMITED_MARKS, _REPORT_PIDFD, _REPORT_TID, _REPORT_FD_ERROR
_FOR_ADMINS = 0x10 | 0x20 | 0x80 | 0x100 | 0x2000
#: FAN_REPORT_FID, _DIR_FID, _NAME, _TARGET_FID and _MNT: nobody else gets descriptors with events
_REPORTS = 0x200 | 0x400 | 0x800 | 0x1000 | 0x4000
_ADD, _IGNORED_MASK, _SURVIVES, _EVICTABLE, _IGNORE = 1, 0x20, 0x40, 0x200, 0x400
_MARK_FLAGS = _SURVIVES | _EVICTABLE | _IGNORE
_TYPES = {"inode": 0, "mount": 0x10, "filesystem": 0x100}
#: any other id than root's
_NOBODY = 65534
#: PROC_USER_INIT_INO
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_CAP_SYS_ADMIN = 21


class Mark(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is marked, open file `file` or what `path` leads to, which is of type `type` (S_IFMT); masks and flags."""

    of: Literal["inode", "mount", "filesystem"]
    mask: U64
    ignored: U64
    flags: U32
    type: U32
    file: Index | None = None
    path: PathRef | None = None


class FanotifyState(Record, frozen=True, kw_only=True):
    """`flags` of fanotify_init(2), `event_flags` of its descriptors; whether its maker was privileged."""

    flags: U32
    event_flags: U32
    privileged: bool
    marks: Annotated[list[Mark], Meta(max_length=1 << 20)]


Words = dict[str, str]


def _lines(view: FdView) -> tuple[Words, list[Words]]:
    """The words of the group's line, and of those of its marks, the oldest first."""
    lines = [
        dict(word.partition(":")[::2] for word in line.split()) for line in view.info.get("fanotify", [])
    ]
    return lines[0], lines[:0:-1]


def _is_privileged(view: FdView, flags: int, scope: CaptureScope) -> bool:
    """Whether a process that has the group may have made it with CAP_SYS_ADMIN in the initial user namespace."""
    index = scope.file_at(view.pid, view.fd)
    holders = [pid for pid, _ in scope.holders(index)] if index is not None else [view.pid]
    return any(_is_admin(pid) or (_is_for_admins(flags) and _is_outermost(pid)) for pid in holders)


def _is_for_admins(flags: int) -> bool:
    """Whether a group of these flags was made with CAP_SYS_ADMIN, which its process may have given up since."""
    return bool(flags & _FOR_ADMINS) or not flags & _REPORTS


def _is_outermost(pid: HostPid) -> bool:
    """Whether a process is in the initial user namespace."""
    return os.stat(f"/proc/{pid}/ns/user").st_ino == _INITIAL_USER_NAMESPACE


def _is_admin(pid: HostPid) -> bool:
    return _is_outermost(pid) and bool(procfs.status(pid).caps[2] >> _CAP_SYS_ADMIN & 1)


def _place(pid: HostPid, words: Words) -> bytes | None:
    """Where the mount or the filesystem of a mark is mounted for `pid`, as a magic link of /proc/PID says it."""
    root = procfs.read_link(pid, "root").rstrip(b"/")
    for mount in mountinfo(pid):
        if "mnt_id" in words:
            found = mount.id == int(words["mnt_id"], 16)
        else:
            found = mount.device == watched.device(words["sdev"])
        name = (root + mount.point).rstrip(b"/") or b"/"
        if found and _leads(pid, name, mount.id):
            return name
    return None


def _leads(pid: HostPid, name: bytes, mount: int) -> bool:
    """Whether a name leads to a mount, which another one may cover."""
    try:
        place = open_place(pid, name)
        try:
            return int(procfs.fdinfo(HostPid(os.getpid()), place)["mnt_id"][0]) == mount
        finally:
            os.close(place)
    except OSError as error:
        raise_if_exhausted(error)
        return False


def _type_of(words: Words) -> Literal["inode", "mount", "filesystem"] | None:
    if "ino" in words:
        return "inode"
    if "mnt_id" in words:
        return "mount"
    return "filesystem" if "sdev" in words else None


class Fanotify(CompleteOnceCreated):
    """See the module."""

    name = "fanotify"
    record: type[FanotifyState] = FanotifyState
    carried: Sequence[str] = ("groups with their flags, and marks of inodes, mounts and filesystems",)
    refused: Sequence[str] = (
        "groups that are asked for permission",
        "unread events, after a while, unless `--file-events drop`",
        "a mark of what has no name and is not open in the tree, or of a mount namespace",
        "a mark of a mount or a filesystem that was set in a user namespace, or is covered by another",
        "a group with flags for admins in a user namespace",
        "a group shared with outside",
    )
    shown_by: Sequence[str] = ("programs/watching.py", "resources/test_fanotify.py")

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:[fanotify]"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """It must only be told, nothing may be unread, and everything that is marked must be found again."""
        group, marks = _lines(view)
        if int(group["flags"], 16) & _CLASSES:
            why = "a fanotify group is asked for permission to access files, which nobody gives while it does not run"
            yield Blocker(view.subject, why, "stop the program (a virus scanner?)")
            return
        yield from unread(view, scope, "fanotify")
        flags = int(group["flags"], 16)
        privileged = _is_privileged(view, flags, scope)
        if _is_for_admins(flags) and not privileged:
            why = "a fanotify group of an admin is open in a user namespace where nobody can make it again"
            yield Blocker(view.subject, why, "close it")
        for words in marks:
            wrong = _unfound(view, scope, words)
            if not wrong and not privileged and _type_of(words) != "inode":
                wrong = f"fanotify watches a {_type_of(words)} for a process in a user namespace of its own"
            if wrong:
                yield Blocker(view.subject, wrong, "remove the mark")
        yield from outside.blockers(view, outside.same_file(view, scope), "the fanotify group is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> FanotifyState:
        """Flags and marks.

        Raises:
            TargetError: something has lost its name since it was checked.
        """
        group, marks = _lines(view)
        flags = int(group["flags"], 16)
        return FanotifyState(
            flags=flags,
            event_flags=int(group["event-flags"], 16),
            privileged=_is_privileged(view, flags, scope),
            marks=[_mark(view, scope, words) for words in marks],
        )

    def create(self, file: OpenFile, record: FanotifyState, scope: CreateScope) -> LocalFd:
        """A group that watches nothing yet.

        Raises:
            RebuildError: EPERM: it takes CAP_SYS_ADMIN in the initial user namespace; EMFILE.
        """
        homes = {scope.host_pid(pid) for pid, _ in scope.holders(file.index)}
        if record.privileged and not any(map(_is_outermost, homes)):
            raise RebuildError(
                f"{describe(file)} is privileged, and of a process in a user namespace of its own"
            )
        if not record.privileged and any(mark.of != "inode" for mark in record.marks):
            raise RebuildError(
                f"{describe(file)} watches more than files, for a process who is not privileged"
            )

        def make() -> LocalFd:
            made = LocalFd(syscall(NR.fanotify_init, record.flags & ~_CLASSES, record.event_flags))
            os.set_inheritable(made, False)
            return made

        try:
            own = record.privileged or not _is_admin(HostPid(os.getpid()))
            return make() if own else acting_as(make, euid=_NOBODY)
        except OSError as error:
            raise RebuildError(f"{describe(file)} cannot be made: {error.strerror}") from error

    def finish(self, file: OpenFile, record: FanotifyState, scope: CreateScope) -> None:
        """Set every mark.

        Raises:
            RebuildError: what is marked is missing here, or is of another type.
        """
        for mark in record.marks:
            try:
                _set(scope.file(file.index), mark, scope)
            except OSError as error:
                raise RebuildError(
                    f"{describe(file, mark.path)}: a mark cannot be set: {error.strerror}"
                ) from error


def _unfound(view: FdView, scope: CaptureScope, words: Words) -> str:
    """Why what a mark is of is not found again."""
    match _type_of(words):
        case None:
            return "fanotify watches something that is not known here"
        case "inode":
            wanted = watched.parse(words)
            if (
                watched.open_file_of(wanted, scope) is None
                and watched.name_of(view.pid, wanted, scope) is None
            ):
                return f"fanotify watches {wanted.subject}, for which no name is found"
        case of:
            if _place(view.pid, words) is None:
                return f"fanotify watches a {of} that the process's mount namespace has not, or covers with another"
    return ""


def _mark(view: FdView, scope: CaptureScope, words: Words) -> Mark:
    of = _type_of(words)
    if of is None:
        raise TargetError(f"{view.subject}: what it watches is not known here")
    masks = (int(words["mask"], 16), int(words["ignored_mask"], 16), int(words["mflags"], 16) & _MARK_FLAGS)
    if of == "inode":
        wanted = watched.parse(words)
        found = watched.open_file_of(wanted, scope)
        if found is not None:
            return Mark(of, *masks, stat.S_IFMT(found[1].stat.st_mode), file=found[0])
        name = watched.name_of(view.pid, wanted, scope)
    else:
        name = _place(view.pid, words)
    if name is None:
        raise TargetError(f"{view.subject}: something that it watches has lost its name")
    return Mark(of, *masks, stat.S_IFMT(look_up(view.pid, name).st_mode), path=scope.path(view.pid, name))


def _set(group: LocalFd, mark: Mark, scope: CreateScope) -> None:
    common = _ADD | _TYPES[mark.of] | mark.flags & _EVICTABLE
    with watched.opened("a mark of fanotify", scope, mark.path, mark.file, mark.type) as place:
        if mark.mask:
            syscall(NR.fanotify_mark, group, common, mark.mask, -1, place)
        if mark.ignored:
            how = mark.flags & _IGNORE or _IGNORED_MASK
            syscall(NR.fanotify_mark, group, common | how | mark.flags & _SURVIVES, mark.ignored, -1, place)


KIND = Fanotify()
