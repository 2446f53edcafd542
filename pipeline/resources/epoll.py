"""epoll(7) instances and what they watch.

The kernel holds a set of items, each keyed by an open file *and the descriptor number it
was registered under*, with events and data; an item lives as long as the open file, even
if that number was closed or reused. fdinfo prints the number; kcmp(2) with
KCMP_EPOLL_TFD tells which open file is really behind it, and so does capture.

Kept: items with number, events (EPOLLET, EPOLLONESHOT, EPOLLEXCLUSIVE, EPOLLWAKEUP) and
data, nested instances, busy-poll parameters. Items are registered in `finish`, from
inside a process that has the epoll instance, under the number they had.

What has been reported of edge-triggered items is not told. But if nothing of an instance is
ready to be reported, as when a program waits for it, then every edge has been: what such a
file is ready for is recorded, and is collected behind the registration. Only what is more
than that is reported then. Where something is ready, edges may be reported once more.

Differences that remain: EPOLLWAKEUP needs CAP_BLOCK_SUSPEND in the host's user namespace,
the kernel drops it silently elsewhere. Edges may be reported once more by an instance that
watches other things than sockets, pipes and `_POLLED` (asking may change what is asked), and
of items that are exclusive or whose number is closed. A one-shot item that had fired is put
back by letting it fire once more where the file is ready; where it is not, errors and
hang-ups (which the kernel adds by itself) can make it fire before it is armed again.
Refused: an item whose file no process of the tree has open, an instance shared with a process
outside. Source: epoll(7), fs/eventpoll.c, kernel/kcmp.c `kcmp_epoll_target`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import stat
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import Blocker, RebuildError, TargetError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, Index, OpenFile, Pid, Record
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import CLONE, syscall, unshare
from pipeline.remote.calls import Call
from pipeline.resources import locks, outside
from pipeline.resources.acting import in_thread
from pipeline.resources.epoll_items import lines, target
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe
from pipeline.resources.steps import CompleteOnceCreated

#: struct epoll_event is packed on x86 only
_EVENT = struct.Struct("<IQ" if arch.MACHINE == "x86_64" else "<I4xQ")
_EPOLL_CTL_ADD = 1
_EPOLL_CTL_MOD = 3
_EPOLLWAKEUP = 1 << 29
#: bits that say how to report; a one-shot item that has fired keeps only these (EP_PRIVATE_BITS)
_HOW = select.EPOLLONESHOT | select.EPOLLET | select.EPOLLEXCLUSIVE | _EPOLLWAKEUP
#: what poll(2) and epoll call the same
_POLL_BITS = 0xFFFF
#: links of files that may be polled, besides sockets and pipes
_POLLED = frozenset(b"anon_inode:" + name for name in (b"[eventfd]", b"[timerfd]", b"inotify"))
_ANY_EVENT = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLRDHUP
#: struct epoll_params: u32 busy_poll_usecs, u16 busy_poll_budget, u8 prefer_busy_poll, u8 pad
_PARAMS_BYTES = 8
_EPIOCSPARAMS = 0x40088A01
_EPIOCGPARAMS = 0x80088A02


class Item(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One registration: the number it was made under, the open file, EPOLL* bits, the program's data.

    `reported`: of an edge-triggered one, what the file was ready for and the program has been told.
    """

    fd: Annotated[int, Meta(ge=0, le=1 << 24)]
    file: Index
    events: U32
    data: Annotated[bytes, Meta(min_length=8, max_length=8)]
    reported: U32 = 0


class EpollState(Record, frozen=True, kw_only=True):
    """`busy_poll`: struct epoll_params, empty where not set."""

    items: Annotated[list[Item], Meta(max_length=1 << 20)]
    busy_poll: Annotated[bytes, Meta(max_length=_PARAMS_BYTES)] = b""


def _has_posix_lock(index: Index, scope: CaptureScope) -> bool:
    """Whether open file `index` has a lock that goes when any descriptor of it is closed, as registering would."""
    found = next(view for number, view in scope.files() if number == index)
    return any(lock.kind == "posix" for lock in locks.capture(found, scope))


def _would_unlock(view: FdView, number: int, watched: Index, scope: CaptureScope) -> bool:
    """Whether a process that may have to register `watched` as `number` has a file with POSIX locks there."""
    index = scope.file_at(view.pid, view.fd)
    homes = {pid for pid, _ in scope.holders(index)} if index is not None else set()
    there = [scope.file_at(pid, number) for pid in homes]
    return watched not in there and any(own is not None and _has_posix_lock(own, scope) for own in there)


class Epoll(CompleteOnceCreated):
    """See the module."""

    name = "epoll"
    record: type[EpollState] = EpollState
    carried: Sequence[str] = (
        "items with number, events and data; nested instances; busy-poll parameters",
        "which edges were reported, of an instance that has nothing to report",
    )
    refused: Sequence[str] = (
        "an item whose file no process of the tree has open",
        "an instance shared with outside",
    )
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:[eventpoll]"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Every watched file must be open somewhere in the tree."""
        for line in lines(view):
            watched = target(view, line, scope)
            if watched is not None and _would_unlock(view, line.fd, watched, scope):
                why = f"epoll watches a file as fd {line.fd}, a number that now names a file with POSIX locks"
                yield Blocker(view.subject, why, "remove the old file from epoll, or release the locks")
            if watched is None and not scope.unseen:
                why = (
                    f"epoll watches a file, registered as fd {line.fd}, that no process of the tree has open"
                )
                # a tree that runs has opened and closed files since its descriptors were listed
                remedy = "close it everywhere, or remove it from epoll first"
                yield Blocker(view.subject, why, remedy, transient=not scope.still)
        yield from outside.blockers(view, outside.same_file(view, scope), "the epoll instance is held by")

    def capture(self, view: FdView, scope: CaptureScope) -> EpollState:
        """All items, in the kernel's order.

        Raises:
            TargetError: the set changed since it was checked.
        """
        items = []
        for line in lines(view):
            watched = target(view, line, scope)
            if watched is None:
                raise TargetError(f"{view.subject}: what it watches as fd {line.fd} is gone")
            items.append(Item(line.fd, watched, line.events, line.data.to_bytes(8, "little")))
        views = dict(scope.files())
        if all(_may_be_asked(views[item.file]) for item in items):
            told = [msgspec.structs.replace(one, reported=_reported(one, views[one.file])) for one in items]
            # asked last: what has come to a file from outside before it was asked makes the instance ready
            if not _ready_for(view.local, select.POLLIN):
                items = told
        busy_poll = b""
        with suppress(OSError):  # ENOTTY before Linux 6.9: there are none
            busy_poll = fcntl.ioctl(view.local, _EPIOCGPARAMS, bytes(_PARAMS_BYTES))
        return EpollState(items=items, busy_poll=busy_poll if any(busy_poll) else b"")

    def create(self, file: OpenFile, record: EpollState, scope: CreateScope) -> LocalFd:
        """An instance that watches nothing yet.

        Raises:
            RebuildError: the busy-poll parameters are not granted here.
        """
        with select.epoll() as instance:
            if record.busy_poll:
                try:
                    fcntl.ioctl(instance, _EPIOCSPARAMS, record.busy_poll)
                except OSError as error:
                    raise RebuildError(
                        f"{describe(file)}: busy polling is refused here: {error.strerror}"
                    ) from error
            return LocalFd(fcntl.fcntl(instance, fcntl.F_DUPFD_CLOEXEC, 3))

    def finish(self, file: OpenFile, record: EpollState, scope: CreateScope) -> None:
        """Register every item from inside; those that had fired first, so that they can be let fire alone.

        Raises:
            RebuildError: no process of the tree has the instance, or a registration is refused.
        """
        if not record.items:
            return
        homes = dict(reversed(scope.holders(file.index)))
        if not homes:
            _register_apart(file, record, scope)
            return
        instance, collected = scope.file(file.index), []
        #: what is asked of each process at once: nothing has to be seen between these
        waiting: dict[Pid, list[Call]] = defaultdict(list)
        for item in sorted(record.items, key=lambda item: not _is_silent(item, scope)):
            targets = set(scope.holders(item.file))
            pid = next((pid for pid in homes if (pid, item.fd) in targets), None)
            try:
                if pid is not None and not item.reported and not _has_fired(item):
                    waiting[pid].append(_registration(homes[pid], item))
                elif pid is not None:
                    silent = item.reported and _is_silent(item, scope)
                    _register(pid, homes[pid], item, scope)
                    if silent:
                        _let_fire(instance)
                        collected.append((pid, item))
                else:
                    pid = next(iter(homes))
                    with _Borrowed(pid, item, scope):
                        _register(pid, homes[pid], item, scope)
                if _has_fired(item):
                    _let_fire(instance)
            except OSError as error:
                why = f"{describe(file)} cannot watch open file {item.file} as fd {item.fd}: {error.strerror}"
                raise RebuildError(why) from error
        for pid, calls in waiting.items():
            try:
                scope.inject_all(pid, calls)
            except OSError as error:
                raise RebuildError(f"{describe(file)} cannot {error.strerror}") from error
        for pid, item in collected:
            if not _is_silent(item, scope):  # it has become ready meanwhile
                scope.inject(pid, NR.epoll_ctl, homes[pid], _EPOLL_CTL_MOD, item.fd, _event(item))


def _may_be_asked(view: FdView) -> bool:
    """Whether polling a file changes nothing about it, as it does of /proc/self/mountinfo."""
    kind = stat.S_IFMT(view.stat.st_mode)
    return kind in (stat.S_IFSOCK, stat.S_IFIFO) or view.link in _POLLED


def _ready_for(fd: LocalFd, events: int) -> int:
    asked = select.poll()
    asked.register(fd, events)
    return next((found for _, found in asked.poll(0)), 0)


def _reported(item: Item, view: FdView) -> int:
    """What the program has been told of an item, none of whose instance is ready to be reported."""
    if not item.events & select.EPOLLET or item.events & (select.EPOLLONESHOT | select.EPOLLEXCLUSIVE):
        return 0
    return _ready_for(view.local, item.events & _POLL_BITS)


def _is_silent(item: Item, scope: CreateScope) -> bool:
    """Whether it has nothing to report that the program was not told."""
    told = item.reported and not _ready_for(scope.file(item.file), item.events & _POLL_BITS) & ~item.reported
    return _has_fired(item) or bool(told)


def _has_fired(item: Item) -> bool:
    """Whether it is a one-shot item that has been reported and not been armed again."""
    return bool(item.events & select.EPOLLONESHOT) and not item.events & ~_HOW


def _register_apart(file: OpenFile, record: EpollState, scope: CreateScope) -> None:
    """Register the items of an instance that no process has, because it is in flight: from a table of our own.

    Raises:
        RebuildError: a registration is refused.
    """

    def register() -> None:
        unshare(CLONE.FILES)
        above = max(item.fd for item in record.items) + 1
        instance = fcntl.fcntl(scope.file(file.index), fcntl.F_DUPFD_CLOEXEC, above)
        targets = {
            item.file: LocalFd(fcntl.fcntl(scope.file(item.file), fcntl.F_DUPFD_CLOEXEC, above))
            for item in record.items
        }

        def control(action: int, number: int, event: bytes) -> None:
            syscall(NR.epoll_ctl, instance, action, number, ctypes.create_string_buffer(event))

        collected = []
        for item in sorted(record.items, key=lambda item: not _is_silent(item, scope)):
            os.dup2(targets[item.file], item.fd)
            silent = _is_silent(item, scope)
            _add(control, targets[item.file], item)
            if silent:
                _let_fire(LocalFd(instance))
                collected.append(item)
        for item in collected:
            if not _is_silent(item, scope):  # it has become ready meanwhile
                os.dup2(targets[item.file], item.fd)
                control(_EPOLL_CTL_MOD, item.fd, _event(item))

    try:
        in_thread(register)
    except OSError as error:
        raise RebuildError(f"{describe(file)} cannot watch its files again: {error.strerror}") from error


def _event(item: Item, more: int = 0) -> bytes:
    """Its struct epoll_event, with `more` bits of events."""
    return _EVENT.pack(item.events | more, int.from_bytes(item.data, "little"))


def _registration(epoll: int, item: Item) -> Call:
    return Call(
        NR.epoll_ctl,
        (epoll, _EPOLL_CTL_ADD, item.fd, _event(item)),
        name=f"watch open file {item.file} as fd {item.fd}",
    )


def _register(pid: Pid, epoll: int, item: Item, scope: CreateScope) -> None:
    def control(action: int, number: int, event: bytes) -> None:
        scope.inject(pid, NR.epoll_ctl, epoll, action, number, event)

    _add(control, scope.file(item.file), item)


def _add(control: Callable[[int, int, bytes], None], target: LocalFd, item: Item) -> None:
    """Register an item by `control`: action, number, struct epoll_event."""
    control(_EPOLL_CTL_ADD, item.fd, _event(item, _ANY_EVENT if _has_fired(item) else 0))
    if _has_fired(item):
        fired = select.poll()
        fired.register(target, _POLL_ANY)
        if not fired.poll(0):
            control(_EPOLL_CTL_MOD, item.fd, _event(item))


_POLL_ANY = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDHUP


def _let_fire(instance: LocalFd) -> None:
    """Collect what is ready: one-shot items are silent afterwards. Nothing else is registered yet."""
    with select.epoll.fromfd(os.dup(instance)) as own:
        own.poll(0, 1)


class _Borrowed:
    """The target of an item, for a moment under its number, where that is free or names another file now.

    Args:
        pid: level-0 pid of a process that has the epoll instance.
    """

    def __init__(self, pid: Pid, item: Item, scope: CreateScope) -> None:
        self._pid, self._item, self._scope = pid, item, scope
        self._saved: int | None = None
        self._saved_flags = 0

    def __enter__(self) -> None:
        pid, number, scope = self._pid, self._item.fd, self._scope
        try:
            self._saved_flags = scope.inject(pid, NR.fcntl, number, fcntl.F_GETFD, 0)
            self._saved = scope.inject(pid, NR.fcntl, number, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
        scope.send(pid, scope.file(self._item.file), number)

    def __exit__(self, *_: object) -> None:
        pid, number, scope = self._pid, self._item.fd, self._scope
        if self._saved is None:
            scope.inject(pid, NR.close, number)
            return
        cloexec = os.O_CLOEXEC if self._saved_flags & fcntl.FD_CLOEXEC else 0
        scope.inject(pid, NR.dup3, self._saved, number, cloexec)
        scope.inject(pid, NR.close, self._saved)


KIND = Epoll()
