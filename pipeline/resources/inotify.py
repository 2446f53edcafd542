"""inotify(7) instances: watches and their numbers.

The kernel holds watches, each of an inode with a mask and a number (wd), and a queue of events that nobody has read
yet. A number is not given again before all have been given.

Kept: every watch under its number, with its mask (IN_ONESHOT and IN_EXCL_UNLINK too). What is watched is opened again
by a name that it has (`pipeline.resources.watched`), or it is an open file of the tree, a deleted one too. Watches are
made when all other open files stand, so that a restore causes no events.

Not preserved: that numbers of watches removed behind the last one left are not given again; against whose limits
(/proc/sys/fs/inotify) they count: the restorer's. What happens to watched files while the tree does not run is not
reported.
Refused: events that nobody has read, while there are some (a queue is read by taking, and nobody can put back; with
`--file-events drop` they stay behind); a watch of a file that has no name and is not open in the tree; an instance
shared with a process outside.
Source: inotify(7), fs/notify/inotify/inotify_user.c (INOTIFY_IOC_SETNEXTWD needs CONFIG_CHECKPOINT_RESTORE).
"""

from __future__ import annotations

import fcntl
import os
import stat
import termios
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError, TargetError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, Index, OpenFile, PathRef, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import outside, watched
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe, look_up
from pipeline.resources.steps import CompleteOnceCreated
from pipeline.resources.watched import Watched

_INOTIFY_IOC_SETNEXTWD = 0x40044900
_IN_ALL_EVENTS = 0xFFF
_IN_EXCL_UNLINK = 0x0400_0000
_IN_ONESHOT = 0x8000_0000
_MASK = _IN_ALL_EVENTS | _IN_EXCL_UNLINK | _IN_ONESHOT


class Watch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Number, mask, and what is watched: open file `file`, or what `path` leads to, of type `type` (S_IFMT)."""

    wd: Annotated[int, Meta(ge=0, le=0x7FFF_FFFF)]
    mask: U32
    type: U32
    file: Index | None = None
    path: PathRef | None = None


class InotifyState(Record, frozen=True, kw_only=True):
    """Watches by number."""

    watches: Annotated[list[Watch], Meta(max_length=1 << 20)]


def _lines(view: FdView) -> Iterator[tuple[int, int, Watched]]:
    """Number, mask and inode of every watch, by number."""
    found = []
    for line in view.info.get("inotify", []):
        words = dict(word.partition(":")[::2] for word in line.split())
        found.append((int(words["wd"], 16), int(words["mask"], 16), watched.parse(words)))
    return iter(sorted(found))


def unread(view: FdView, scope: CaptureScope, what: str) -> Iterator[Blocker]:
    """Refuse a queue in which there are events, unless they may be dropped."""
    size = int.from_bytes(fcntl.ioctl(view.local, termios.FIONREAD, bytes(4)), "little")
    if size and scope.policy.file_events == "refuse":
        why = f"there are events of {what} that the program has not read, and that nobody can put back"
        yield Blocker(view.subject, why, "let it read them, or --file-events drop", transient=True)


class Inotify(CompleteOnceCreated):
    """See the module."""

    name = "inotify"
    record: type[InotifyState] = InotifyState
    carried: Sequence[str] = (
        "watches with number and mask, of files by name and of open files, deleted ones too",
    )
    refused: Sequence[str] = (
        "unread events, after a while, unless `--file-events drop`",
        "a watch of a file without a name that the tree has not open",
        "an instance shared with outside",
    )
    shown_by: Sequence[str] = (
        "programs/watching.py",
        "resources/test_watching.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:inotify"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Nothing may be unread, and everything that is watched must be found again."""
        yield from unread(view, scope, "inotify")
        for wd, _, wanted in _lines(view):
            if (
                watched.open_file_of(wanted, scope) is None
                and watched.name_of(view.pid, wanted, scope) is None
            ):
                why = f"watch {wd} is of {wanted.subject}, for which no name is found"
                yield Blocker(view.subject, why, "remove the watch, or run as root")
        yield from outside.blockers(view, outside.same_file(view, scope), "the inotify instance is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> InotifyState:
        """All watches.

        Raises:
            TargetError: something has lost its name since it was checked.
        """
        return InotifyState(watches=[_watch(view, scope, *line) for line in _lines(view)])

    def create(self, file: OpenFile, record: InotifyState, scope: CreateScope) -> LocalFd:
        """An instance that watches nothing yet.

        Raises:
            RebuildError: EMFILE: the restorer has as many instances as it may.
        """
        try:
            return LocalFd(syscall(NR.inotify_init1, os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            why = (
                f"{describe(file)} cannot be made: {error.strerror} (/proc/sys/fs/inotify/max_user_instances)"
            )
            raise RebuildError(why) from error

    def finish(self, file: OpenFile, record: InotifyState, scope: CreateScope) -> None:
        """Add every watch under its number, in rising order: the next new one gets the number behind the last.

        Raises:
            RebuildError: what is watched is missing here, is of another type, or is watched under another number too.
        """
        instance = scope.file(file.index)
        for watch in sorted(record.watches, key=lambda watch: watch.wd):
            if not watch.mask & _IN_ALL_EVENTS or watch.mask & ~_MASK:
                raise RebuildError(
                    f"{describe(file)}: watch {watch.wd} has an impossible mask {watch.mask:#x}"
                )
            try:
                _add(instance, watch, scope)
            except OSError as error:
                why = f"{describe(file, watch.path)}: watch {watch.wd} cannot be made: {error.strerror}"
                raise RebuildError(why) from error


def _watch(view: FdView, scope: CaptureScope, wd: int, mask: int, wanted: Watched) -> Watch:
    found = watched.open_file_of(wanted, scope)
    if found is not None:
        return Watch(wd, mask, stat.S_IFMT(found[1].stat.st_mode), file=found[0])
    name = watched.name_of(view.pid, wanted, scope)
    if name is None:
        raise TargetError(f"{view.subject}: what it watches as {wd} has lost its name")
    kind = stat.S_IFMT(look_up(view.pid, name).st_mode)
    return Watch(wd, mask, kind, path=scope.path(view.pid, name))


def _add(instance: LocalFd, watch: Watch, scope: CreateScope) -> None:
    of = f"watch {watch.wd} of inotify"
    with watched.opened(of, scope, watch.path, watch.file, watch.type) as place:
        fcntl.ioctl(instance, _INOTIFY_IOC_SETNEXTWD, watch.wd)
        got = syscall(NR.inotify_add_watch, instance, place, watch.mask)
    if got != watch.wd:
        raise RebuildError(f"{of}: the same file is watched as {got} already")


KIND = Inotify()
