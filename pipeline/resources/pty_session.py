"""Sessions and their controlling terminals: captured, refused where a side is outside, taken again.

A process has its controlling terminal from its parent, or takes it as the leader of a
session: nobody can be given one later. So at a rebuild the pairs that control a session
are made before any process is born, the leader takes its own as soon as it has founded
the session, and its children are born with it. The foreground group is named when all
processes stand.

Source: credentials(7), tty(4), ioctl_tty(2); drivers/tty/tty_jobctrl.c.
"""

from __future__ import annotations

import os
import struct
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import msgspec

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index, OpenFile, PathRef, Pid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet
from pipeline.resources import pty_sides, terminal
from pipeline.resources.kinds import CaptureScope, CreateScope
from pipeline.resources.pty_state import KIND_NAME, PtyState, Terminal

REMEDY = (
    "a job of a shell is carried with --shell-job; else start the tree with setsid and its stdio redirected, "
    "or run tmux inside the tree"
)
_LEADS = (
    "a terminal controls one session only: run tmux inside the tree, or dump the job that runs in this shell"
)


def check_controlling_terminal(pid: HostPid, scope: CaptureScope) -> Iterator[Blocker]:
    """The controlling terminal of process `pid`, which needs no descriptor, must be a pty of the tree."""
    found = procfs.stat(pid)
    if not found.tty_nr:
        return
    if scope.policy.shell_job and not scope.member(found.session):
        return
    major, number = terminal.decode(found.tty_nr)
    if major != terminal.PTS_MAJOR:
        yield Blocker(f"pid {pid}", f"its controlling terminal is device {major}:{number}", REMEDY)
        return
    for _, master in pty_sides.masters(scope, number):
        if terminal.session(master.local) == found.session:
            return
    owner = pty_sides.owner_outside(number, scope)
    yield Blocker(
        f"pid {pid}",
        f"its controlling terminal /dev/pts/{number} belongs to {owner} outside the tree",
        _LEADS if scope.member(found.session) else REMEDY,
    )


def foreground(master: LocalFd, leader: HostPid) -> Pid:
    """The foreground group's number in the pid namespace of the session leader; 0 if nobody is in it."""
    group = terminal.foreground(master)
    if not group:
        return 0
    level = len(procfs.status(leader).ns_tgid) - 1
    candidates = [group, *(int(name) for name in os.listdir("/proc") if name.isdecimal())]
    for pid in candidates:
        with suppress(ProcessLookupError):
            if procfs.stat(HostPid(pid)).pgrp == group:
                return procfs.status(HostPid(pid)).ns_pgid[level]
    return 0


def without(session: int, scope: CaptureScope) -> list[Pid]:
    """Members of a session in the tree that have no controlling terminal."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and (pid := scope.member(int(name))):
            with suppress(ProcessLookupError):
                stat = procfs.stat(HostPid(int(name)))
                if stat.session == session and not stat.tty_nr and stat.state != "Z":
                    found.append(pid)
    return sorted(found)


def open_master(ptmx: PathRef, number: int, open_path: Callable[[PathRef, int], LocalFd]) -> LocalFd:
    """A new, unlocked pair with this number; the kernel gives the lowest free one, so lower ones are held.

    Raises:
        RebuildError: the number is taken here.
    """
    held: list[LocalFd] = []
    try:
        while True:
            master = open_path(ptmx, os.O_RDWR | os.O_NOCTTY)
            held.append(master)
            got = terminal.number(master)
            if got == number:
                terminal.set_locked(master, False)
                return held.pop()
            if got > number:
                raise RebuildError(f"terminal number {number} (/dev/pts/{number}) is in use here")
    finally:
        for fd in held:
            os.close(fd)


class ControllingTerminals:
    """The pairs of an image that control a session, made before the processes are born, when the mounts are there.

    Ownership: holds one descriptor a pair until `close`; `made` lends them to `CreateScope.once`.
    """

    def __init__(self, files: Iterable[OpenFile], open_path: Callable[[PathRef, int], LocalFd]) -> None:
        self._files = list(files)
        self._open_path = open_path
        self._pairs: dict[Index, LocalFd] = {}
        self._of_leader: dict[Pid, LocalFd] = {}

    def open(self) -> None:
        """Open the pairs.

        Raises:
            RebuildError: a number is taken here.
        """
        try:
            for file in self._files:
                if file.kind == KIND_NAME:
                    record = msgspec.convert(file.state, PtyState)
                    if record.terminal is not None and record.terminal.session:
                        master = open_master(record.ptmx, record.number, self._open_path)
                        LEDGER.take("pseudo-terminal", master)
                        # before anybody is there to be told of another size (SIGWINCH)
                        terminal.set_window(master, record.terminal.window)
                        self._pairs[file.index] = self._of_leader[record.terminal.session] = master
        except BaseException:
            self.close()
            raise

    @property
    def made(self) -> dict[tuple[Any, ...], Any]:
        """What `CreateScope.once` shall find made already."""
        return {pair_key(index): master for index, master in self._pairs.items()}

    def session_founded(self, leader: Pid, puppet: Puppet) -> None:
        """Let a new session leader take its terminal, if it has one.

        Raises:
            RebuildError: it cannot.
        """
        if leader not in self._of_leader:
            return
        slave = terminal.open_slave(self._of_leader[leader])
        try:
            (lent,) = puppet.send_fds([slave])
            puppet.syscall(NR.ioctl, lent, termios.TIOCSCTTY, 0)
            puppet.syscall(NR.close, lent)
        except OSError as error:
            raise RebuildError(f"pid {leader} cannot take its controlling terminal: {error}") from error
        finally:
            os.close(slave)

    def close(self) -> None:
        """Close the pairs, as far as nobody else has them open; idempotent."""
        self._of_leader.clear()
        while self._pairs:
            _, master = self._pairs.popitem()
            os.close(master)
            LEDGER.give_back("pseudo-terminal", master)


def pair_key(master: Index | None) -> tuple[Any, ...]:
    """Under which `CreateScope.once` knows the pair of an open file that is a master."""
    return "pty", master


def settle_session(state: Terminal, number: int, slave: LocalFd, scope: CreateScope) -> None:
    """TIOCSPGRP by the leader of the session, through a descriptor lent to it; TIOCNOTTY by who had none."""
    lent = scope.send(state.session, slave)
    try:
        if state.foreground:
            scope.inject(
                state.session, NR.ioctl, lent, termios.TIOCSPGRP, struct.pack("<i", state.foreground)
            )
    except OSError as error:
        raise RebuildError(
            f"pid {state.session} cannot name the foreground group of /dev/pts/{number}: {error}"
        ) from error
    finally:
        scope.inject(state.session, NR.close, lent)
    for pid in state.without:
        lent = scope.send(pid, slave)
        with suppress(OSError):  # born before the leader took the terminal, it has none
            scope.inject(pid, NR.ioctl, lent, termios.TIOCNOTTY, 0)
        scope.inject(pid, NR.close, lent)
