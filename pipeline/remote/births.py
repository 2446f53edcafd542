"""Cloning puppets with exact pids, in every pid namespace they will be seen in.

clone3's set_tid wants CAP_CHECKPOINT_RESTORE in the owner of *every* namespace that is
listed, from the innermost outwards. A puppet that sits in a nested user namespace has
it only there, so for the levels further out the next pid is announced by somebody who
may: a write of pid - 1 to that namespace's ``ns_last_pid``, just before the clone. The
announcement is not a promise: another process may take the number in between. So the
result is read back, and a miss is undone and tried again.

Source: clone3 in clone(2); pid_namespaces(7) on ns_last_pid.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

from pipeline.errors import RebuildError
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.remote.puppet import Puppet, seen_pids

_ATTEMPTS = 50
#: how long the parent of a dumped tree may take to collect its dead root
_REAP_TIMEOUT_S = 3.0
_REAP_PAUSE_S = 0.01

#: Writes the pid to be used next in one pid namespace.
Announce = Callable[[int], None]


class AnnounceHere:
    """Announces pids in the pipeline's own pid namespace, and sets the counter back at the end.

    Left where it is, the counter would give the next programs of this host the numbers right behind
    the tree's, which the tree of somebody else may be waiting for.
    """

    _PATH = "/proc/sys/kernel/ns_last_pid"

    def __init__(self) -> None:
        self._before: int | None = None

    def __call__(self, pid: int) -> None:
        """Announce `pid`; OSError: EPERM without CAP_CHECKPOINT_RESTORE in the namespace's owner."""
        if self._before is None:
            with open(self._PATH, "rb") as file:
                self._before = int(file.read())
        self._write(pid - 1)

    def _write(self, value: int) -> None:
        with open(self._PATH, "wb", buffering=0) as file:
            file.write(str(value).encode())

    def set_back(self) -> None:
        """Set the counter to what it was before the first announcement; idempotent."""
        if self._before is not None:
            before, self._before = self._before, None
            self._write(before)


def announce_by(puppet: Puppet) -> Announce:
    """Announces pids in the pid namespace of `puppet`, which has all capabilities in its owner."""

    def announce(pid: int) -> None:
        fd = puppet.syscall(NR.openat, -100, b"/proc/sys/kernel/ns_last_pid\0", os.O_WRONLY, 0)
        text = str(pid - 1).encode()
        puppet.syscall(NR.write, fd, text, len(text))
        puppet.syscall(NR.close, fd)

    return announce


def clone_with_pids(
    creator: Puppet,
    pids: Sequence[int | None],
    choosable: int,
    announce: Sequence[Announce | None],
    flags: int = 0,
    *,
    exit_signal: int = 0,
    child_tid: int = 0,
) -> Puppet:
    """Clone `creator` so that the new task has exactly these pids.

    Args:
        pids: outermost first, as `seen_pids` gives them; None where any will do.
        choosable: how many of the innermost levels the creator may list in set_tid.
        announce: per level of `pids`, how to announce a pid there; None where nobody can.
        flags: CLONE_*.
        exit_signal: see `Puppet.clone`.
        child_tid: see `Puppet.clone`.

    Raises:
        RebuildError: a pid is taken, or cannot be chosen.
    """
    chosen: list[int] = []
    for pid in reversed(pids):
        if pid is None or len(chosen) == choosable:
            break
        chosen.append(pid)
    announced = [(level, pid) for level, pid in enumerate(pids[: len(pids) - len(chosen)]) if pid is not None]
    for level, pid in announced:
        if announce[level] is None:
            raise RebuildError(
                f"pid {pid} of pid namespace level {level} cannot be chosen here "
                "(restore into a pid namespace of its own: --new-pidns)"
            )
    seen: tuple[int, ...] = ()
    attempts = 0
    deadline = time.monotonic() + _REAP_TIMEOUT_S
    while attempts < (_ATTEMPTS if announced else 1):
        for level, pid in announced:
            writer = announce[level]
            assert writer is not None
            writer(pid)
        try:
            child = creator.clone_task(flags, set_tid=chosen, exit_signal=exit_signal, child_tid=child_tid)
        except OSError as error:
            if error.errno == errno.EEXIST and time.monotonic() < deadline and _is_dead(pids[0]):
                time.sleep(_REAP_PAUSE_S)
                continue
            if error.errno == errno.EEXIST:
                raise RebuildError(
                    f"pid {'/'.join(map(str, reversed(chosen)))} is in use here; end that process, "
                    "or restore into a pid namespace of its own (--new-pidns)"
                ) from error
            raise
        seen = seen_pids(child.tid)[-len(pids) :]
        if all(want in (None, got) for want, got in zip(pids, seen, strict=True)):
            return child
        attempts += 1
        undo_clone(creator, child, flags)
    wanted = "/".join("*" if pid is None else str(pid) for pid in pids)
    raise RebuildError(f"pids {wanted} are in use here or taken again and again; the last clone got {seen}")


def _is_dead(pid: int | None) -> bool:
    """Whether a pid is only held by a process that has ended and is about to be collected by its parent."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"ZX"
    except OSError:
        return pid is not None


def undo_clone(creator: Puppet, child: Puppet, flags: int) -> None:
    """End a helper or a missed clone, and collect it where the kernel wants its parent to."""
    if flags & CLONE.THREAD:
        raise RebuildError(f"thread of puppet {creator.pid} got another pid than announced")
    child.kill_and_reap()
    if not flags & CLONE.PARENT:
        creator.reap_children()
