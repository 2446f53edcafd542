"""Locks on open files: flock(2), open-file-description locks, POSIX locks and leases (fcntl(2)).

The kernel ties a flock and an OFD lock to the open file description, and a POSIX lock
to a descriptor table and an inode. /proc/PID/fdinfo/N shows each under the
description that it was taken through, so every holder's fdinfo is asked.

Kept: kind, read or write, range, and the process that took it (that of a flock is only for people: lslocks(8)). OFD
locks are taken again in `connect`, all others from inside the process in `finish`;
a lock that somebody else holds by then is an error, never waited for. Only while a tree moves, the source may stand in
the way: on the same kernel or the same network file system it holds what it held until it is ended. Then the
lock is taken when the tree is let run, and whether that failed is said.
A POSIX lock goes when *any* descriptor of that file is closed in the process: nothing
may be closed there after `finish`. A thread that waits for a lock is in a system call, which is
issued again when all locks are held.

A lease tells its owner by a signal, with the number of the descriptor that it was taken through: it is taken
again through the first one that refers to the open file, by us where the process may not, with our pid in
/proc/locks. One that is being broken just now is waited for.

Refused: a flock or OFD lock of an open file that somebody outside of the tree holds, too: it would stay with
them. Not carried: delegations (refused). Sources: fcntl(2), flock(2),
proc_locks(5); fs/locks.c `lock_get_status`, `check_conflicting_open`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U64, OpenFile, Pid
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.remote import ready
from pipeline.remote.calls import Argument
from pipeline.resources import outside
from pipeline.resources.acting import in_thread
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe

_LINE = re.compile(r"\s*\d+:\s+(\w+)\s+\w+\s+(\w+)\s+(-?\d+)\s+\S+\s+(\d+)\s+(\d+|EOF)")
Kind = Literal["flock", "ofd", "posix", "lease"]
_KINDS: dict[str, Kind] = {"FLOCK": "flock", "OFDLCK": "ofd", "POSIX": "posix", "LEASE": "lease"}
_BREAKING = re.compile(r"\s*\d+:\s+LEASE\s+BREAK")
F_OFD_SETLK = 37
#: what the kernel says of a lock that somebody holds
_TAKEN = (errno.EAGAIN, errno.EACCES)
#: how long a source that was ended may still hold its locks, and between two looks
_SOURCE_ENDS_S, _PAUSE_S = 2.0, 0.005
#: struct flock: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("<hh4xqqi4x")


class Lock(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One lock: `start` and `length` in bytes (0: to the end), `pid`: level-0 pid of who took it (0: nobody here)."""

    kind: Kind
    write: bool
    start: U64 = 0
    length: U64 = 0
    pid: Pid = 0


def _parse(line: str, pid: Pid, member: Callable[[int], Pid]) -> Lock | None:
    """One line of the fdinfo of `pid`; None for what is not carried."""
    match = _LINE.match(line)
    if match is None or match[1] not in _KINDS or match[2] not in ("READ", "WRITE"):
        return None
    kind, start = _KINDS[match[1]], int(match[4])
    length = 0 if match[5] == "EOF" else int(match[5]) - start + 1
    owner = pid if kind == "posix" else member(int(match[3])) if kind == "flock" else 0
    return Lock(kind, match[2] == "WRITE", start, length, owner)


def leased(view: FdView) -> bool:
    """Whether there is a lease on the open file: opening the file once more could break it."""
    return any(" LEASE " in line for line in view.info.get("lock", []))


def check(view: FdView, scope: CaptureScope, *, carried: bool = True) -> Iterator[Blocker]:
    """Blockers for every lock on `view` that is not carried; for all of them where `carried` is false."""
    of_description = False
    for line in view.info.get("lock", []):
        lock = _parse(line, 0, scope.member)
        if _BREAKING.match(line):
            yield Blocker(
                view.subject,
                "its lease is being broken by somebody who wants the file",
                "wait",
                transient=True,
            )
        elif lock is None:
            yield Blocker(view.subject, f"it has an unknown lock: {line.strip()}", "release it first")
        elif not carried:
            yield Blocker(
                view.subject, f"a {lock.kind} lock on this kind of file is not carried", "release it first"
            )
        else:
            of_description |= lock.kind != "posix"
    if of_description:
        yield from outside.blockers(view, outside.same_file(view, scope), "its lock is shared with")


def capture(view: FdView, scope: CaptureScope) -> list[Lock]:
    """Every lock taken through the open file of `view`, by whichever process of the tree."""
    locks: dict[Lock, None] = {}
    index = scope.file_at(view.pid, view.fd)
    holders = scope.holders(index) if index is not None else [(view.pid, view.fd)]
    for pid, fd in holders:
        member = scope.member(pid)
        own = (pid, fd) == (view.pid, view.fd)
        for line in view.info.get("lock", []) if own else scope.lock_lines(pid, fd):
            lock = _parse(line, member, scope.member)
            if lock is not None:
                locks[lock] = None
    return list(locks)


def _request(lock: Lock) -> bytes:
    return _FLOCK.pack(
        fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK, os.SEEK_SET, lock.start, lock.length, 0
    )


def _refused(file: OpenFile, lock: Lock, error: OSError) -> RebuildError:
    taken = error.errno in _TAKEN
    why = "another process holds a lock that conflicts" if taken else error.strerror or str(error)
    if taken and lock.kind == "lease":
        why = "another process has the file open"
    what = "lease" if lock.kind == "lease" else f"{lock.kind} lock"
    return RebuildError(f"{describe(file)}: its {what} cannot be taken again: {why}")


def _take(
    file: OpenFile,
    lock: Lock,
    scope: CreateScope,
    act: Callable[[], object],
    later: Callable[[LocalFd], object],
) -> None:
    """Do `act`; where the source of a tree that moves is in the way, do `later` when it is gone.

    Raises:
        RebuildError: somebody else holds the lock.
    """
    try:
        act()
    except OSError as error:
        refused = _refused(file, lock, error)
        if not (scope.policy.moves and error.errno in _TAKEN):
            raise refused from error

    else:
        return

    def again(local: LocalFd) -> None:
        deadline = time.monotonic() + _SOURCE_ENDS_S
        while True:
            try:
                later(local)
                return
            except OSError as error:
                if error.errno not in _TAKEN or time.monotonic() > deadline:
                    raise _refused(file, lock, error) from error
            time.sleep(_PAUSE_S)

    scope.when_it_runs(scope.file(file.index), again, describe(file))


def connect(file: OpenFile, locks: Sequence[Lock], scope: CreateScope) -> None:
    """Take OFD locks again, through the local descriptor.

    Raises:
        RebuildError: somebody else holds the lock.
    """
    for lock in locks:
        if lock.kind == "ofd":
            local, request = scope.file(file.index), _request(lock)
            _take(
                file,
                lock,
                scope,
                partial(fcntl.fcntl, local, F_OFD_SETLK, request),
                lambda local, request=request: fcntl.fcntl(local, F_OFD_SETLK, request),  # type: ignore[misc]
            )


def finish(file: OpenFile, locks: Sequence[Lock], scope: CreateScope) -> None:
    """Take POSIX locks and flocks again, inside the process that took each, and leases.

    Raises:
        RebuildError: somebody else holds the lock.
    """
    holders = scope.holders(file.index)
    numbers = dict(reversed(holders))
    for lock in locks:
        if lock.kind == "lease":
            _take_lease(file, lock, holders, scope)
        elif lock.kind == "flock":
            _take_flock(file, lock, numbers, scope)
        elif lock.kind == "posix":
            if lock.pid not in numbers:
                if any(other.pid in numbers and replace(other, pid=lock.pid) == lock for other in locks):
                    continue  # it shares its descriptor table with that one
                raise RebuildError(f"{describe(file)}: pid {lock.pid} holds a lock on it but no descriptor")
            _take_inside(
                file, lock, scope, lock.pid, NR.fcntl, numbers[lock.pid], fcntl.F_SETLK, _request(lock)
            )


def _take_inside(
    file: OpenFile, lock: Lock, scope: CreateScope, pid: Pid, number: int, *args: Argument
) -> None:
    """By a process of the tree."""
    tid = scope.host_pid(pid)
    _take(
        file,
        lock,
        scope,
        partial(scope.inject, pid, number, *args),
        lambda _: ready.syscall(tid, number, *args),
    )


def _take_flock(file: OpenFile, lock: Lock, numbers: Mapping[Pid, int], scope: CreateScope) -> None:
    """By whoever took it, or, who has no descriptor of it any more, by us."""
    how = (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB
    if lock.pid in numbers:
        _take_inside(file, lock, scope, lock.pid, NR.flock, numbers[lock.pid], how)
    else:
        by_us = partial(fcntl.flock, scope.file(file.index), how)
        _take(file, lock, scope, by_us, lambda local: fcntl.flock(local, how))


def _take_lease(file: OpenFile, lock: Lock, holders: Sequence[tuple[Pid, int]], scope: CreateScope) -> None:
    """By the process itself; or, where that is not the owner of the file, by us, under the same number."""
    wanted = fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK
    local = scope.file(file.index)
    try:
        try:
            if not holders:  # it is on its way through a socket
                fcntl.fcntl(local, fcntl.F_SETLEASE, wanted)
                return
            pid, number = holders[0]
            scope.inject(pid, NR.fcntl, number, fcntl.F_SETLEASE, wanted)
        except PermissionError:

            def take() -> None:
                unshare(CLONE.FILES)  # a descriptor table of this thread's own, which has room for any number
                os.dup2(local, number, inheritable=False)
                fcntl.fcntl(number, fcntl.F_SETLEASE, wanted)

            in_thread(take)
    except OSError as error:
        if not (scope.policy.moves and error.errno in _TAKEN and holders):
            raise _refused(file, lock, error) from error
        pid, number = holders[0]
        _take_inside(file, lock, scope, pid, NR.fcntl, number, fcntl.F_SETLEASE, wanted)
