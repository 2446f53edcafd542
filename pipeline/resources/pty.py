"""Pseudo-terminals whose two sides are in the tree, and the controlling terminals of its sessions.

The kernel holds a pair: a master (one open file) and a slave that is opened by number.
Kept: the number (programs know it as /dev/pts/N), settings, window size, packet mode,
lock, exclusive mode, owner and mode of the node, a half-typed line, whether the slave was
ever closed, the session that it controls with its foreground group, slaves that are hung
up, descriptors of /dev/tty.

Refused by name: a side outside the tree (a shell's own terminal), other kinds of terminals,
other line disciplines, and bytes that wait to be read on either side: a terminal cannot
be peeked at, and taking them would lose them if the pipeline died.

Not preserved: output stopped by ^S flows again; a foreground group without a process
becomes the session leader's; a hung-up slave may have another number.

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
from typing import Annotated, Literal

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import U32, Id, Index, OpenFile, PathRef, Pid, Record
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.resources import outside, sockets, terminal
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import O_LARGEFILE, filesystem

_DEVPTS_MAGIC = 0x1CD1
_TTY_MAJOR = 4
_AUX_MAJOR = 5
_DEV_TTY = 0
_DEV_PTMX = 2
_DELETED = b" (deleted)"
_REMEDY = "start the tree with setsid and its stdio redirected, or run tmux inside the tree"

Role = Literal["master", "slave", "tty", "hung-up"]


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
    own pid namespace. `unfinished`: what was typed of a line.
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
    unfinished: Annotated[bytes, Meta(max_length=4096)] = b""
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


def _role(view: FdView) -> Role | None:
    """None for terminals that are no pseudo-terminals."""
    device = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    if device == (_AUX_MAJOR, _DEV_PTMX):
        return "master"
    if device != (_AUX_MAJOR, _DEV_TTY) and device[0] != terminal.PTS_MAJOR:
        return None
    found = terminal.device(view.local)
    if found is None:
        return "hung-up"
    if found[0] != terminal.PTS_MAJOR:
        return None
    return "tty" if device == (_AUX_MAJOR, _DEV_TTY) else "slave"


def _number(view: FdView) -> int:
    """N of /dev/pts/N; of a slave that is hung up: what its own node says."""
    found = terminal.device(view.local)
    return found[1] if found else os.minor(view.stat.st_rdev)


def _slave_directory(view: FdView) -> bytes:
    """Where the devpts instance of a master or slave is mounted, as its process sees it."""
    directory = os.path.dirname(view.link)
    if filesystem(view.local) == _DEVPTS_MAGIC:
        return directory
    return os.path.join(directory, b"pts")


def _instance(view: FdView) -> int | None:
    """Device number of the devpts instance that a master or slave belongs to; None if it cannot be seen."""
    if filesystem(view.local) == _DEVPTS_MAGIC:
        return view.stat.st_dev
    with suppress(OSError):
        return os.stat(f"/proc/{view.pid}/root".encode() + _slave_directory(view)).st_dev
    return None


def _masters(scope: CaptureScope, number: int) -> Iterator[tuple[Index, FdView]]:
    """Every master in the tree that has this number (one for each devpts instance)."""
    for index, view in scope.files():
        if _is_terminal(view) and _role(view) == "master" and _number(view) == number:
            yield index, view


def _master_of(view: FdView, scope: CaptureScope) -> tuple[Index, FdView] | None:
    """The master of a slave or /dev/tty descriptor, if it is in the tree."""
    for index, master in _masters(scope, _number(view)):
        if _role(view) == "slave":
            if _instance(master) == _instance(view):
                return index, master
        elif terminal.session(master.local) == procfs.stat(view.pid).session:
            return index, master
    return None


def _slaves(master: FdView, scope: CaptureScope) -> list[FdView]:
    """Every slave (or /dev/tty) of `master` that is open in the tree."""
    return [
        view
        for _, view in scope.files()
        if _is_terminal(view)
        and _role(view) in ("slave", "tty")
        and _number(view) == _number(master)
        and (found := _master_of(view, scope)) is not None
        and found[1] is master
    ]


def _is_terminal(view: FdView) -> bool:
    if not stat.S_ISCHR(view.stat.st_mode) or view.flags & os.O_PATH:
        return False
    major, minor = os.major(view.stat.st_rdev), os.minor(view.stat.st_rdev)
    return major in (_TTY_MAJOR, terminal.PTS_MAJOR) or (major == _AUX_MAJOR and minor <= _DEV_PTMX)


def _owner_outside(number: int, scope: CaptureScope) -> str:
    """Who outside the tree has the master of terminal `number`."""
    for link in (b"/dev/ptmx", b"/dev/pts/ptmx"):
        for pid, fd in outside.of_link(link, scope):
            with suppress(OSError):
                if procfs.fdinfo(pid, fd).get("tty-index") == [str(number)]:
                    return outside.name_of(pid)
    return "a process that cannot be seen"


def check_controlling_terminal(pid: HostPid, scope: CaptureScope) -> Iterator[Blocker]:
    """The controlling terminal of process `pid`, which needs no descriptor, must be a pty of the tree."""
    found = procfs.stat(pid)
    if not found.tty_nr:
        return
    major, number = terminal.decode(found.tty_nr)
    if major != terminal.PTS_MAJOR:
        yield Blocker(f"pid {pid}", f"its controlling terminal is device {major}:{number}", _REMEDY)
        return
    for _, master in _masters(scope, number):
        if terminal.session(master.local) == found.session:
            return
    owner = _owner_outside(number, scope)
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
        "pseudo-terminals with both sides in the tree: settings, size, number, session and foreground group",
        "hung-up terminals, /dev/tty",
    )
    refused: Sequence[str] = (
        "a terminal with a side outside the tree, a console or serial line",
        "unread bytes on either side of a terminal",
    )

    def matches(self, view: FdView) -> bool:
        """Every terminal device; those that are no pseudo-terminal are refused here."""
        return _is_terminal(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Both sides in the tree, nothing unread."""
        role = _role(view)
        if role is None:
            number = f"{os.major(view.stat.st_rdev)}:{os.minor(view.stat.st_rdev)}"
            yield Blocker(view.subject, f"terminal device {number} is no pseudo-terminal", _REMEDY)
            return
        if role == "hung-up":
            return
        if role == "master":
            yield from _check_master(view, scope)
            return
        if _master_of(view, scope) is None:
            yield Blocker(
                view.subject,
                f"the terminal belongs to {_owner_outside(_number(view), scope)} outside the tree",
                _REMEDY,
            )
        elif terminal.unread(view.local):
            yield Blocker(
                view.subject, "typed input waits to be read", "wait until it is read", transient=True
            )
        if role == "slave":
            holders = outside.same_link(view, scope)
            yield from outside.blockers(view, holders, "the terminal is also open in")

    def capture(self, view: FdView, scope: CaptureScope) -> PtyState:
        """Which pair; the master's record holds the state of both sides."""
        role = _role(view)
        assert role is not None, "check refuses it"
        if role == "hung-up":
            directory = os.path.dirname(view.link)
            if filesystem(view.local) == _DEVPTS_MAGIC:
                directory = os.path.dirname(directory)
            ptmx = scope.path(view.pid, os.path.join(directory, b"ptmx"))
            return PtyState(role=role, number=_number(view), ptmx=ptmx)
        if role == "master":
            index = scope.file_at(view.pid, view.fd)
            ptmx = scope.path(view.pid, view.link)
            state = _terminal(view, scope)
            return PtyState(role=role, number=_number(view), ptmx=ptmx, master=index, terminal=state)
        found = _master_of(view, scope)
        assert found is not None, "check refuses a slave without master"
        index, master = found
        return PtyState(
            role=role,
            number=_number(view),
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
        """Settings, size, owner of the node, the half-typed line."""
        state = record.terminal
        if state is None:
            return
        master = scope.file(file.index)
        terminal.set_settings(master, terminal.Settings.unpack(state.settings))
        terminal.set_window(master, state.window)
        if state.node is not None:
            _own_node(state.node, record.number, scope)
        if state.left or state.unfinished:
            slave = terminal.open_slave(master)
            try:
                if state.unfinished:
                    terminal.type_again(master, slave, state.unfinished)
            finally:
                os.close(slave)

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
            terminal.set_packet_mode(master)
        if state.exclusive:
            terminal.set_exclusive(master)
        if state.locked:
            terminal.set_locked(master, True)


def _check_master(view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
    name = f"/dev/pts/{_number(view)}"
    holders = outside.same_file(view, scope)
    yield from outside.blockers(view, holders, "the terminal's master is also held by")
    if not _slaves(view, scope):
        instance = _instance(view)
        for pid, fd in outside.of_link(name.encode(), scope):
            with suppress(OSError):
                if os.stat(f"/proc/{pid}/fd/{fd}").st_dev == instance:
                    yield Blocker(
                        view.subject,
                        f"its terminal {name} is used by {outside.name_of(pid)} outside the tree",
                        "include that process or end it",
                    )
    if terminal.discipline(view.local):
        yield Blocker(view.subject, "the terminal has a line discipline other than N_TTY", "reset it")
    leader = terminal.session(view.local)
    if leader and not scope.member(leader):
        yield Blocker(
            view.subject, f"the terminal controls the session of pid {leader} outside the tree", _REMEDY
        )
    if terminal.unread(view.local) or sockets.events(view.local, select.POLLPRI) & select.POLLPRI:
        yield Blocker(
            view.subject,
            f"output of {name} waits to be read",
            "wait until it is read",
            transient=True,
        )


def _terminal(view: FdView, scope: CaptureScope) -> Terminal:
    """The state of the pair of a master."""
    master = view.local
    slaves = _slaves(view, scope)
    session = terminal.session(master)
    return Terminal(
        settings=terminal.settings(master).pack(),
        window=terminal.window(master),
        packet_mode=terminal.packet_mode(master),
        locked=terminal.locked(master),
        exclusive=terminal.exclusive(master),
        slave_exclusive=any(terminal.exclusive(slave.local) for slave in slaves),
        left=bool(sockets.events(master, 0) & select.POLLHUP),
        session=scope.member(session) if session else 0,
        foreground=_foreground(master, HostPid(session)) if session else 0,
        unfinished=terminal.unfinished_line(master, slaves[0].local) if slaves else b"",
        node=_node(view, scope),
    )


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
    path = os.path.join(_slave_directory(view), str(_number(view)).encode())
    try:
        found = os.stat(f"/proc/{view.pid}/root".encode() + path)
    except OSError:
        return None  # its devpts is not mounted where the process could see it
    if found.st_dev != _instance(view):
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
