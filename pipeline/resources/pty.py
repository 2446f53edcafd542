"""Pseudo-terminals whose two sides are in the tree, and the controlling terminals of its sessions.

The kernel holds a pair: a master (one open file) and a slave that is opened by number.
Kept: the number (programs know it as /dev/pts/N), settings, window size, packet mode,
lock, exclusive mode, owner and mode of the node, bytes under way on both sides and lines
half typed (`pipeline.resources.terminal_bytes`), whether the slave was ever closed, the session
that it controls with its foreground group, slaves that are hung up, descriptors of /dev/tty.

Refused by name: a side outside the tree (a shell's own terminal), other kinds of terminals,
other line disciplines, events of packet mode not read yet, a terminal that is stopped
(^S) or whose buffers are full.

Not preserved: a foreground group without a process
becomes the session leader's; a hung-up slave may have another number; input typed before
the slave was ever opened.

Source: pts(4), ioctl_tty(2), credentials(7); drivers/tty/{tty_io,tty_jobctrl,pty}.c.
"""

from __future__ import annotations

import os
import select
import stat
import struct
import termios
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError, Refused
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import U32, Id, Index, OpenFile, PathRef, Pid, Record
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.resources import outside, pty_sides, sockets, terminal, terminal_bytes
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import O_LARGEFILE, filesystem
from pipeline.resources.pty_sides import Role
from pipeline.resources.terminal_bytes import UnderWay

_REMEDY = "start the tree with setsid and its stdio redirected, or run tmux inside the tree"


class Node(Record, frozen=True, kw_only=True):
    """The file /dev/pts/N."""

    path: PathRef
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    uid: Id
    gid: Id


class Terminal(Record, frozen=True, kw_only=True):
    """State of a pair, recorded with its master.

    `settings`: struct termios2. `window`: struct winsize. `left`: every slave was closed, the master reads EIO.
    `session`: level-0 pid of the leader, 0 if none; `foreground`: the group's number inside the leader's
    own pid namespace. `under_way`: what waits on both sides.
    """

    settings: Annotated[bytes, Meta(min_length=44, max_length=44)]
    window: Annotated[bytes, Meta(min_length=8, max_length=8)]
    packet_mode: bool
    locked: bool
    exclusive: bool
    slave_exclusive: bool
    left: bool
    session: Pid = 0
    foreground: Pid = 0
    under_way: UnderWay = UnderWay()
    node: Node | None = None


class PtyState(Record, frozen=True, kw_only=True):
    """One open file of a terminal.

    `master`: the open file that stands for the pair (itself for a master; None for role ``hung-up``).
    `ptmx`: what to open for a new pair. `path`: /dev/tty for role ``tty``. `terminal`: of a master only.
    """

    role: Role
    number: U32
    ptmx: PathRef
    master: Index | None = None
    path: PathRef | None = None
    terminal: Terminal | None = None


def check_controlling_terminal(pid: HostPid, scope: CaptureScope) -> Iterator[Blocker]:
    """The controlling terminal of process `pid`, which needs no descriptor, must be a pty of the tree."""
    found = procfs.stat(pid)
    if not found.tty_nr:
        return
    major, number = terminal.decode(found.tty_nr)
    if major != terminal.PTS_MAJOR:
        yield Blocker(f"pid {pid}", f"its controlling terminal is device {major}:{number}", _REMEDY)
        return
    for _, master in pty_sides.masters(scope, number):
        if terminal.session(master.local) == found.session:
            return
    owner = pty_sides.owner_outside(number, scope)
    yield Blocker(
        f"pid {pid}",
        f"its controlling terminal /dev/pts/{number} belongs to {owner} outside the tree",
        _REMEDY,
    )


class Pty:
    """See the module."""

    name = "pty"
    record: type[PtyState] = PtyState
    carried: Sequence[str] = (
        "pseudo-terminals with both sides in the tree: settings, number, unread bytes, session, foreground group",
        "hung-up terminals, /dev/tty",
    )
    refused: Sequence[str] = (
        "a terminal with a side outside the tree, a console or serial line",
        "a terminal that is stopped or full, unread events of packet mode",
    )

    def matches(self, view: FdView) -> bool:
        """Every terminal device; those that are no pseudo-terminal are refused here."""
        return pty_sides.is_terminal(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Both sides in the tree."""
        role = pty_sides.role(view)
        if role is None:
            number = f"{os.major(view.stat.st_rdev)}:{os.minor(view.stat.st_rdev)}"
            yield Blocker(view.subject, f"terminal device {number} is no pseudo-terminal", _REMEDY)
            return
        if role == "hung-up":
            return
        if role == "master":
            yield from _check_master(view, scope)
            return
        if pty_sides.master_of(view, scope) is None:
            yield Blocker(
                view.subject,
                f"the terminal belongs to {pty_sides.owner_outside(pty_sides.number(view), scope)} outside the tree",
                _REMEDY,
            )
        if role == "slave":
            holders = outside.same_link(view, scope)
            yield from outside.blockers(view, holders, "the terminal is also open in")

    def capture(self, view: FdView, scope: CaptureScope) -> PtyState:
        """Which pair; the master's record holds the state of both sides."""
        role = pty_sides.role(view)
        assert role is not None, "check refuses it"
        if role == "hung-up":
            directory = os.path.dirname(view.link)
            if filesystem(view.local) == pty_sides.DEVPTS_MAGIC:
                directory = os.path.dirname(directory)
            ptmx = scope.path(view.pid, os.path.join(directory, b"ptmx"))
            return PtyState(role=role, number=pty_sides.number(view), ptmx=ptmx)
        if role == "master":
            index = scope.file_at(view.pid, view.fd)
            ptmx = scope.path(view.pid, view.link)
            state = _terminal(view, scope)
            return PtyState(role=role, number=pty_sides.number(view), ptmx=ptmx, master=index, terminal=state)
        found = pty_sides.master_of(view, scope)
        assert found is not None, "check refuses a slave without master"
        index, master = found
        return PtyState(
            role=role,
            number=pty_sides.number(view),
            ptmx=scope.path(master.pid, master.link),
            master=index,
            path=scope.path(view.pid, view.link) if role == "tty" else None,
        )

    def create(self, file: OpenFile, record: PtyState, scope: CreateScope) -> LocalFd:
        """The master, or a slave of the pair that is made with the first side asked for.

        Raises:
            RebuildError: the number is taken.
        """
        access = file.flags & (os.O_ACCMODE | O_LARGEFILE | os.O_CLOEXEC)
        if record.role == "hung-up":
            return _open_hung_up(record, access, scope)
        master = scope.once(
            ("pty", record.master), lambda: scope.own(_open_master(record.ptmx, record.number, scope))
        )
        if record.role == "master":
            return LocalFd(os.dup(master))
        if record.role == "slave" or record.path is None:
            return terminal.open_slave(master, access)
        slave = terminal.open_slave(master)
        try:
            node = scope.open(record.path, os.O_PATH)
            try:
                return terminal.open_controlling(slave, node, file.flags & os.O_ACCMODE | os.O_NOCTTY)
            finally:
                os.close(node)
        finally:
            os.close(slave)

    def connect(self, file: OpenFile, record: PtyState, scope: CreateScope) -> None:
        """Settings, size, owner of the node, bytes under way."""
        state = record.terminal
        if state is None:
            return
        master = scope.file(file.index)
        terminal.set_settings(master, terminal.Settings.unpack(state.settings))
        terminal.set_window(master, state.window)
        if state.node is not None:
            _own_node(state.node, record.number, scope)
        if state.left or state.under_way != UnderWay():
            terminal_bytes.put(master, state.under_way)

    def finish(self, file: OpenFile, record: PtyState, scope: CreateScope) -> None:
        """Let the session leader take its terminal and name the foreground group; then what would forbid that.

        Raises:
            RebuildError: the leader cannot take it.
        """
        state = record.terminal
        if state is None:
            return
        master = scope.file(file.index)
        if state.session or state.slave_exclusive:
            slave = terminal.open_slave(master)
            try:
                if state.session:
                    _take_control(state, record.number, slave, scope)
                if state.slave_exclusive:
                    terminal.set_exclusive(slave)
            finally:
                os.close(slave)
        if state.packet_mode:
            terminal.set_packet_mode(master, True)
        if state.exclusive:
            terminal.set_exclusive(master)
        if state.locked:
            terminal.set_locked(master, True)


def _check_master(view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
    name = f"/dev/pts/{pty_sides.number(view)}"
    holders = outside.same_file(view, scope)
    yield from outside.blockers(view, holders, "the terminal's master is also held by")
    inside = pty_sides.slaves(view, scope)
    if not inside:
        instance = pty_sides.instance(view)
        for pid, fd in outside.of_link(name.encode(), scope):
            with suppress(OSError):
                if os.stat(f"/proc/{pid}/fd/{fd}").st_dev == instance:
                    yield Blocker(
                        view.subject,
                        f"its terminal {name} is used by {outside.name_of(pid)} outside the tree",
                        "include that process or end it",
                    )
    elif not all(sockets.events(slave.local, select.POLLOUT) & select.POLLOUT for slave in inside):
        yield Blocker(
            view.subject, f"{name} is stopped (^S) or full", "wait until it is read", transient=True
        )
    if terminal.discipline(view.local):
        yield Blocker(view.subject, "the terminal has a line discipline other than N_TTY", "reset it")
    leader = terminal.session(view.local)
    if leader and not scope.member(leader):
        yield Blocker(
            view.subject, f"the terminal controls the session of pid {leader} outside the tree", _REMEDY
        )
    if sockets.events(view.local, select.POLLPRI) & select.POLLPRI:
        yield Blocker(
            view.subject,
            f"an event of {name} (packet mode) waits to be read",
            "wait until it is read",
            transient=True,
        )


def _terminal(view: FdView, scope: CaptureScope) -> Terminal:
    """The state of the pair of a master."""
    master = view.local
    slaves = pty_sides.slaves(view, scope)
    left = bool(sockets.events(master, 0) & select.POLLHUP)
    session = terminal.session(master)
    return Terminal(
        settings=terminal.settings(master).pack(),
        window=terminal.window(master),
        packet_mode=terminal.packet_mode(master),
        locked=terminal.locked(master),
        exclusive=terminal.exclusive(master),
        slave_exclusive=any(terminal.exclusive(slave.local) for slave in slaves),
        left=left,
        session=scope.member(session) if session else 0,
        foreground=_foreground(master, HostPid(session)) if session else 0,
        under_way=_bytes(view) if slaves or left else UnderWay(),
        node=_node(view, scope),
    )


def _bytes(view: FdView) -> UnderWay:
    try:
        return terminal_bytes.capture(view.local)
    except BlockingIOError:
        raise Refused(
            [
                Blocker(
                    view.subject,
                    "the terminal is stopped (^S), or its buffers are full",
                    "wait until its bytes are read",
                    transient=True,
                )
            ]
        ) from None


def _foreground(master: LocalFd, leader: HostPid) -> Pid:
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


def _node(view: FdView, scope: CaptureScope) -> Node | None:
    path = os.path.join(pty_sides.slave_directory(view), str(pty_sides.number(view)).encode())
    try:
        found = os.stat(f"/proc/{view.pid}/root".encode() + path)
    except OSError:
        return None  # its devpts is not mounted where the process could see it
    if found.st_dev != pty_sides.instance(view):
        return None
    return Node(
        path=scope.path(view.pid, path),
        mode=stat.S_IMODE(found.st_mode),
        uid=scope.user(found.st_uid),
        gid=scope.group(found.st_gid),
    )


def _own_node(node: Node, number: int, scope: CreateScope) -> None:
    fd = scope.open(node.path, os.O_PATH)
    try:
        found = os.fstat(fd)
        if os.minor(found.st_rdev) != number:
            raise RebuildError(f"terminal {os.fsdecode(node.path.path)}: another device is there")
        wanted = scope.user(node.uid), scope.group(node.gid)
        name = f"/proc/self/fd/{fd}"
        if (found.st_uid, found.st_gid) != wanted:
            os.chown(name, *wanted)
        if stat.S_IMODE(found.st_mode) != node.mode:
            os.chmod(name, node.mode)
    except OSError as error:
        raise RebuildError(f"terminal {os.fsdecode(node.path.path)}: {error.strerror}") from error
    finally:
        os.close(fd)


def _open_master(ptmx: PathRef, number: int, scope: CreateScope) -> LocalFd:
    """A new, unlocked pair with this number; the kernel gives the lowest free one, so lower ones are held.

    Raises:
        RebuildError: the number is taken here.
    """
    held: list[LocalFd] = []
    try:
        while True:
            master = scope.open(ptmx, os.O_RDWR | os.O_NOCTTY)
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


def _open_hung_up(record: PtyState, access: int, scope: CreateScope) -> LocalFd:
    """A slave whose master is closed; with its number if that is free."""
    try:
        master = _open_master(record.ptmx, record.number, scope)
    except RebuildError:
        master = scope.open(record.ptmx, os.O_RDWR | os.O_NOCTTY)
        terminal.set_locked(master, False)
    try:
        return terminal.open_slave(master, access)
    finally:
        os.close(master)


def _take_control(state: Terminal, number: int, slave: LocalFd, scope: CreateScope) -> None:
    """TIOCSCTTY and TIOCSPGRP by the leader of the session, through a descriptor lent to it."""
    lent = scope.send(state.session, slave)
    try:
        scope.inject(state.session, NR.ioctl, lent, termios.TIOCSCTTY, 0)
        if state.foreground:
            scope.inject(
                state.session, NR.ioctl, lent, termios.TIOCSPGRP, struct.pack("<i", state.foreground)
            )
    except OSError as error:
        raise RebuildError(
            f"pid {state.session} cannot take its controlling terminal /dev/pts/{number}: {error.strerror}"
        ) from error
    finally:
        scope.inject(state.session, NR.close, lent)


KIND = Pty()
