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

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.remote.puppet import Puppet, seen_pids

_ATTEMPTS = 50
#: how long the parent of a dumped tree may take to collect its dead root
_REAP_TIMEOUT_S = 10.0
_REAP_PAUSE_S = 0.01


class Announcer(Protocol):
    """Says in one pid namespace which pid is to be given out next."""

    def announce(self, pid: int) -> None:
        """Announce `pid`."""

    def done(self) -> None:
        """The clone was made, or failed."""


class Here:
    """Announces pids in the pipeline's own pid namespace, and sets the counter back at once.

    Left where it is, the counter would give the next programs of this host the numbers right behind
    the tree's, which the tree of somebody else may be waiting for.
    """

    _PATH = "/proc/sys/kernel/ns_last_pid"

    def __init__(self) -> None:
        self._before = 0

    def announce(self, pid: int) -> None:
        """See `Announcer`; OSError: EPERM without CAP_CHECKPOINT_RESTORE in the namespace's owner."""
        with open(self._PATH, "r+b", buffering=0) as file:
            self._before = max(self._before, int(file.read(32)))
            os.pwrite(file.fileno(), str(pid - 1).encode(), 0)

    def done(self) -> None:
        """Set the counter to the highest it was before an announcement."""
        with open(self._PATH, "wb", buffering=0) as file:
            file.write(str(self._before).encode())


class Inside:
    """Announces pids in the pid namespace of a puppet that has all capabilities in its owner."""

    def __init__(self, puppet: Puppet) -> None:
        self.puppet = puppet
        self._fd = -1

    def announce(self, pid: int) -> None:
        """See `Announcer`."""
        text = str(pid - 1).encode()
        self.puppet.syscall(NR.pwrite64, self._counter(), text, len(text), 0)

    def _counter(self) -> int:
        """A descriptor of the counter in the puppet, one of its own (see `Stage`); clones have it, too."""
        if self._fd < 0:
            fd = self.puppet.syscall(
                NR.openat, -100, b"/proc/sys/kernel/ns_last_pid\0", os.O_WRONLY | os.O_CLOEXEC, 0
            )
            own = self.puppet.stage.channel_fd + 2
            self._fd = self.puppet.syscall(NR.dup3, fd, own, os.O_CLOEXEC)
            self.puppet.syscall(NR.close, fd)
        return self._fd

    def done(self) -> None:
        """Nobody but the tree is there to be disturbed."""


def clone_with_pids(
    creator: Puppet,
    pids: Sequence[int | None],
    choosable: int,
    announcers: Sequence[Announcer | None],
    flags: int = 0,
    *,
    exit_signal: int = 0,
    child_tid: int = 0,
) -> Puppet:
    """Clone `creator` so that the new task has exactly these pids.

    Args:
        pids: outermost first, as `seen_pids` gives them; None where any will do.
        choosable: how many of the innermost levels the creator may list in set_tid.
        announcers: per level of `pids`, who can announce a pid there; None where nobody can.
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
    announced: list[tuple[Announcer, int]] = []
    for level, pid in enumerate(pids[: len(pids) - len(chosen)]):
        announcer = announcers[level]
        if pid is not None and announcer is None:
            raise RebuildError(
                f"pid {pid} of pid namespace level {level} cannot be chosen here "
                "(restore into a pid namespace of its own: --new-pidns)"
            )
        if pid is not None and announcer is not None:
            announced.append((announcer, pid))
    deadline = time.monotonic() + _REAP_TIMEOUT_S
    missed = 0
    while True:
        try:
            child = _clone_announced(creator, announced, flags, chosen, exit_signal, child_tid)
        except FileExistsError:
            child = None
        if child is not None:
            seen = seen_pids(child.tid)[-len(pids) :]
            if all(want in (None, got) for want, got in zip(pids, seen, strict=True)):
                return child
            undo_clone(creator, child, flags)
            missed += 1
        if _is_dead(pids[0]) and time.monotonic() < deadline:
            time.sleep(_REAP_PAUSE_S)
        elif child is None or missed >= _ATTEMPTS:
            wanted = "/".join("*" if pid is None else str(pid) for pid in pids)
            raise RebuildError(
                f"pid {wanted} is in use here{_named(pids[0])}; end that process, "
                "or restore into a pid namespace of its own (--new-pidns)"
            )


def _clone_announced(
    creator: Puppet,
    announced: Sequence[tuple[Announcer, int]],
    flags: int,
    chosen: Sequence[int],
    exit_signal: int,
    child_tid: int,
) -> Puppet:
    try:
        for announcer, pid in announced:
            announcer.announce(pid)
        return creator.clone_task(flags, set_tid=chosen, exit_signal=exit_signal, child_tid=child_tid)
    finally:
        for announcer, _ in announced:
            announcer.done()


def _holders(pid: int | None) -> list[procfs.Stat]:
    """Who keeps a number from being given out: its process or thread, else the members of its group or session."""
    if pid is None:
        return []
    with suppress(procfs.ProcessGone):
        return [procfs.stat(HostPid(pid))]
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(procfs.ProcessGone):
                stat = procfs.stat(HostPid(int(name)))
                if pid in (stat.pgrp, stat.session):
                    found.append(stat)
    return found


def _named(pid: int | None) -> str:
    holders = _holders(pid)
    if not holders:
        return ""
    names = ", ".join(f"{h.comm.decode(errors='replace')}, pid {h.pid}" for h in holders[:3])
    return f" ({names})" if holders[0].pid == pid else f" (as the group or session of {names})"


def _is_dead(pid: int | None) -> bool:
    """Whether a pid is only held by processes that have ended and are about to be collected by their parents."""
    holders = _holders(pid)
    return bool(holders) and all(h.state in "ZX" or procfs.is_exiting(HostPid(h.pid)) for h in holders)


def undo_clone(creator: Puppet, child: Puppet, flags: int) -> None:
    """End a helper or a missed clone, and collect it where the kernel wants its parent to."""
    if flags & CLONE.THREAD:
        child.run_to_exit(NR.exit, 0)  # this thread alone
        return
    child.kill_and_reap()
    if not flags & CLONE.PARENT:
        creator.reap_children()
