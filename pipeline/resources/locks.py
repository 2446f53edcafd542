"""Locks on open files: flock(2), open-file-description locks and POSIX locks (fcntl(2)).

The kernel ties a flock and an OFD lock to the open file description, and a POSIX lock
to a descriptor table and an inode. /proc/PID/fdinfo/N shows each under the
description that it was taken through, so every holder's fdinfo is asked.

Kept: kind, read or write, range, and for POSIX locks the process. flock and OFD
locks are taken again in `connect`, POSIX locks from inside the process in `finish`;
a lock that somebody else holds by then is an error, never waited for.
A POSIX lock goes when *any* descriptor of that file is closed in the process: nothing
may be closed there after `finish`.

Not carried: leases and delegations (refused). Sources: fcntl(2), flock(2),
proc_locks(5); fs/locks.c `lock_get_status`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import U64, OpenFile, Pid
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe

_LINE = re.compile(r"\s*\d+:\s+(\w+)\s+\w+\s+(\w+)\s+(-?\d+)\s+\S+\s+(\d+)\s+(\d+|EOF)")
_KINDS: dict[str, Literal["flock", "ofd", "posix"]] = {"FLOCK": "flock", "OFDLCK": "ofd", "POSIX": "posix"}
F_OFD_SETLK = 37
#: struct flock: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("<hh4xqqi4x")


class Lock(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One lock: `start` and `length` in bytes (0: to the end), `pid`: level-0 pid of a POSIX lock's owner."""

    kind: Literal["flock", "ofd", "posix"]
    write: bool
    start: U64 = 0
    length: U64 = 0
    pid: Pid = 0


def _lines(pid: HostPid, fd: int) -> list[str]:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
        return [line.removeprefix("lock:").strip() for line in info if line.startswith("lock:")]


def _parse(line: str, pid: Pid) -> Lock | None:
    """One line of fdinfo; None for what is not carried."""
    match = _LINE.match(line)
    if match is None or match[1] not in _KINDS or match[2] not in ("READ", "WRITE"):
        return None
    kind, start = _KINDS[match[1]], int(match[4])
    length = 0 if match[5] == "EOF" else int(match[5]) - start + 1
    return Lock(kind, match[2] == "WRITE", start, length, pid if kind == "posix" else 0)


def check(view: FdView, carried: bool = True) -> Iterator[Blocker]:
    """Blockers for every lock on `view` that is not carried; for all of them where `carried` is false."""
    for line in view.info.get("lock", []):
        lock = _parse(line, 0)
        if lock is None:
            yield Blocker(
                view.subject, f"it has a lease or an unknown lock: {line.strip()}", "release it first"
            )
        elif not carried:
            yield Blocker(
                view.subject, f"a {lock.kind} lock on this kind of file is not carried", "release it first"
            )


def capture(view: FdView, scope: CaptureScope) -> list[Lock]:
    """Every lock taken through the open file of `view`, by whichever process of the tree."""
    locks: dict[Lock, None] = {}
    index = scope.file_at(view.pid, view.fd)
    holders = scope.holders(index) if index is not None else [(view.pid, view.fd)]
    for pid, fd in holders:
        member = scope.member(pid)
        own = (pid, fd) == (view.pid, view.fd)
        for line in view.info.get("lock", []) if own else _lines(pid, fd):
            lock = _parse(line, member)
            if lock is not None:
                locks[lock] = None
    return list(locks)


def _request(lock: Lock) -> bytes:
    return _FLOCK.pack(
        fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK, os.SEEK_SET, lock.start, lock.length, 0
    )


def _refused(file: OpenFile, lock: Lock, error: OSError) -> RebuildError:
    taken = error.errno in (errno.EAGAIN, errno.EACCES)
    why = "another process holds a lock that conflicts" if taken else error.strerror or str(error)
    return RebuildError(f"{describe(file)}: its {lock.kind} lock cannot be taken again: {why}")


def connect(file: OpenFile, locks: Sequence[Lock], scope: CreateScope) -> None:
    """Take flock and OFD locks again, through the local descriptor.

    Raises:
        RebuildError: somebody else holds the lock.
    """
    for lock in locks:
        if lock.kind == "posix":
            continue
        local = scope.file(file.index)
        try:
            if lock.kind == "flock":
                fcntl.flock(local, (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            else:
                fcntl.fcntl(local, F_OFD_SETLK, _request(lock))
        except OSError as error:
            raise _refused(file, lock, error) from error


def finish(file: OpenFile, locks: Sequence[Lock], scope: CreateScope) -> None:
    """Take POSIX locks again, inside the process that held each.

    Raises:
        RebuildError: somebody else holds the lock.
    """
    numbers = dict(reversed(scope.holders(file.index)))
    for lock in locks:
        if lock.kind != "posix":
            continue
        if lock.pid not in numbers:
            raise RebuildError(f"{describe(file)}: pid {lock.pid} holds a lock on it but no descriptor")
        try:
            scope.inject(lock.pid, NR.fcntl, numbers[lock.pid], fcntl.F_SETLK, _request(lock))
        except OSError as error:
            raise _refused(file, lock, error) from error
