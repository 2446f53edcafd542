"""Pseudo-terminals whose two sides are in the tree, and the controlling terminals of its sessions.

The kernel holds a pair: a master (one open file) and a slave that is opened by number.
Kept: the number (programs know it as /dev/pts/N), settings, window size, packet mode with unread events,
lock, exclusive mode, whether output is stopped, owner and mode of the node, bytes under way on both sides and lines
half typed (`pipeline.resources.terminal_bytes`), whether the slave was ever closed, the session
that it controls with its foreground group, slaves that are hung up, descriptors of /dev/tty.

A side outside the tree (a shell's own terminal) and other kinds of terminals are refused by name, unless the person
who dumps says that they are external (`pipeline.resources.external_end`, `pipeline.resources.shell_job`).

Refused by name: other line disciplines, locked settings (TIOCSLCKTRMIOS), a terminal whose input is stopped or full
of unread lines, much that waits behind an unread event of packet mode.

Not preserved: a foreground group without a process
becomes the session leader's; a hung-up slave may have another number; input typed before
the slave was ever opened.

Source: pts(4), ioctl_tty(2), credentials(7); drivers/tty/{tty_io,tty_jobctrl,pty}.c.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pipeline.errors import Blocker, RebuildError, Refused
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import OpenFile
from pipeline.kernel import procfs
from pipeline.kernel.statfs import filesystem
from pipeline.resources import outside, pty_session, pty_sides, sockets, terminal, terminal_bytes
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import O_LARGEFILE, open_inside
from pipeline.resources.pty_session import REMEDY
from pipeline.resources.pty_state import KIND_NAME, Node, PtyState, Terminal
from pipeline.resources.terminal_bytes import UnderWay


class Pty:
    """See the module."""

    name = KIND_NAME
    record: type[PtyState] = PtyState
    carried: Sequence[str] = (
        "pseudo-terminals with both sides in the tree: settings, number, unread bytes, session, foreground group",
        "terminals that are stopped (^S or tcflow), and full ones; packet mode with unread events",
        "hung-up terminals, /dev/tty",
    )
    refused: Sequence[str] = (
        "a terminal with a side outside the tree, a console or serial line, unless the dump is told so",
        "a terminal whose input is stopped, or full of unread lines, or whose settings are locked",
    )
    shown_by: Sequence[str] = (
        "programs/terminal.py",
        "resources/test_pty.py",
        "resources/test_pty_bytes.py",
        "resources/test_pty_flow.py",
        "resources/test_pty_sessions.py",
    )

    def matches(self, view: FdView) -> bool:
        """Every terminal device; those that are no pseudo-terminal are refused here."""
        return pty_sides.is_terminal(view)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Both sides in the tree."""
        role = pty_sides.role(view)
        if role is None:
            number = f"{os.major(view.stat.st_rdev)}:{os.minor(view.stat.st_rdev)}"
            yield Blocker(view.subject, f"terminal device {number} is no pseudo-terminal", REMEDY)
            return
        if role == "hung-up":
            return
        if role == "master":
            yield from _check_master(view, scope)
            return
        if pty_sides.master_of(view, scope) is None and not scope.unseen:
            yield Blocker(
                view.subject,
                f"the terminal belongs to {pty_sides.owner_outside(pty_sides.number(view), scope)} outside the tree",
                REMEDY,
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
            if view.filesystem == pty_sides.DEVPTS_MAGIC:
                directory = os.path.dirname(directory)
            ptmx = scope.path(view.pid, os.path.join(directory, b"ptmx"))
            return PtyState(role=role, number=pty_sides.number(view), ptmx=ptmx)
        if role == "master":
            index = scope.file_at(view.pid, view.fd)
            ptmx = scope.path(view.namer, view.link)
            state = _terminal(view, scope)
            return PtyState(role=role, number=pty_sides.number(view), ptmx=ptmx, master=index, terminal=state)
        found = pty_sides.master_of(view, scope)
        assert found is not None, "check refuses a slave without master"
        index, master = found
        return PtyState(
            role=role,
            number=pty_sides.number(view),
            ptmx=scope.path(master.namer, master.link),
            master=index,
            path=scope.path(view.namer, view.link) if role == "tty" else None,
            leader=scope.member(procfs.stat(view.pid).session) if role == "tty" else 0,
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
            pty_session.pair_key(record.master),
            lambda: scope.own(pty_session.open_master(record.ptmx, record.number, scope.open)),
        )
        if record.role == "master":
            return LocalFd(os.dup(master))
        if record.role == "slave" or record.path is None:
            return terminal.open_slave(master, access)
        return open_inside(record.leader, scope, record.path, file.flags & os.O_ACCMODE | os.O_NOCTTY)

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
        if state.under_way.events and not state.packet_mode:
            raise RebuildError(f"terminal {record.number}: events of packet mode without that")
        if state.left or state.under_way != UnderWay():
            terminal_bytes.put(master, state.under_way)

    def finish(self, file: OpenFile, record: PtyState, scope: CreateScope) -> None:
        """The foreground group of the session, and what would have forbidden anything before.

        Raises:
            RebuildError: the leader cannot name the group.
        """
        state = record.terminal
        if state is None:
            return
        master = scope.file(file.index)
        if state.session or state.slave_exclusive:
            slave = terminal.open_slave(master)
            try:
                if state.session:
                    pty_session.settle_session(state, record.number, slave, scope)
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
    if terminal.any_setting_is_held(view.local):
        yield Blocker(
            view.subject, "some settings of the terminal are locked (TIOCSLCKTRMIOS)", "unlock them"
        )
    if terminal.discipline(view.local):
        yield Blocker(view.subject, "the terminal has a line discipline other than N_TTY", "reset it")
    leader = terminal.session(view.local)
    if leader and not scope.member(leader):
        yield Blocker(
            view.subject, f"the terminal controls the session of pid {leader} outside the tree", REMEDY
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
        foreground=pty_session.foreground(master, HostPid(session)) if session else 0,
        without=pty_session.without(session, scope) if session else [],
        under_way=_bytes(view, scope) if slaves or left else UnderWay(),
        node=_node(view, scope),
    )


def _bytes(view: FdView, scope: CaptureScope) -> UnderWay:
    try:
        return terminal_bytes.capture(view.local, scope.shield)
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        raise Refused(
            [
                Blocker(
                    view.subject,
                    "its input is stopped (tcflow) or full of lines, or much waits behind an event of packet mode",
                    "wait until they are read",
                    transient=True,
                )
            ]
        ) from None


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
        device = stat.S_ISCHR(found.st_mode), os.major(found.st_rdev), os.minor(found.st_rdev)
        if device != (True, terminal.PTS_MAJOR, number) or filesystem(fd) != pty_sides.DEVPTS_MAGIC:
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


def _open_hung_up(record: PtyState, access: int, scope: CreateScope) -> LocalFd:
    """A slave whose master is closed; with its number if that is free."""
    try:
        master = pty_session.open_master(record.ptmx, record.number, scope.open)
    except RebuildError:
        master = scope.open(record.ptmx, os.O_RDWR | os.O_NOCTTY)
        terminal.set_locked(master, False)
    try:
        return terminal.open_slave(master, access)
    finally:
        os.close(master)


KIND = Pty()
