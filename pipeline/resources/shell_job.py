"""Trees that are a job of an interactive shell: in its session, on its terminal, both of which stay behind.

The kernel lets nobody join a session but by birth. So a dump (``--shell-job``) records that the session is led from
outside, what the terminal is set to, and which process group is in the foreground; and a restore (``--shell-job``)
has the tree born into its own session, which has to have a terminal, and takes the part of a shell for it:

* the tree's group comes to the foreground, if it was there and the restorer is; the terminal gets the settings
  that the tree had made, and SIGWINCH tells the tree to draw itself anew;
* when the root stops (^Z, reading in the background), terminal and foreground go back, and the restorer stops, so
  that its shell goes on; continued, it continues the tree, in the foreground if the shell says so;
* when the tree ends, or the restorer fails, they go back for good;
* when the shell has taken the terminal itself, because SIGSTOP was sent to the restorer alone, nothing goes back: it
  is the shell's. The tree runs on in the background then, and what it waits to read already takes one more key.

A guard, a child that no signal of the terminal reaches, puts the settings back when the restorer is killed while the
tree has the terminal.

Not carried: the window's size, which is a fact of the terminal that is there (it is set only where that one has
none); speeds and the form of bytes on the line (c_cflag); what a job in the background had set the terminal to, which
only its shell knows, and one that has the terminal nowhere open. Refused: a session leader in the tree whose terminal
is outside, because a terminal controls one session only.

Source: credentials(7), tcsetpgrp(3), tty_ioctl(4), signal(7); drivers/tty/tty_jobctrl.c.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from msgspec.structs import replace

from pipeline.errors import Blocker, ImageError, Refused, UsageError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import ShellJob
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import syscall
from pipeline.ledger import LEDGER
from pipeline.resources import pty_sides, terminal
from pipeline.resources.kinds import CaptureScope
from pipeline.resources.terminal import Settings

_NO_WINDOW = bytes(8)
_OF_JOBS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT)
_GROUPS = struct.Struct("<2i")
#: what a guard is told: settings and groups, or that there is nothing to put back
_WORD_BYTES = Settings.BYTES + _GROUPS.size
_NOTHING = bytes(_WORD_BYTES)


def capture(
    pids: Iterable[HostPid], scope: CaptureScope, group_number: Callable[[int], int]
) -> ShellJob | None:
    """The terminal of the session that the tree is in and does not lead; None if there is none.

    Args:
        pids: the living processes of the tree.
        group_number: the level-0 number of a process group, 0 if it is led from outside.
    """
    if not scope.policy.shell_job:
        return None
    groups = {}
    on_terminal = []
    for pid in pids:
        found = procfs.stat(pid)
        groups[pid] = found.pgrp
        if found.tty_nr and not scope.member(found.session):
            on_terminal.append(found)
    if not on_terminal:
        return None
    first = on_terminal[0]
    device = terminal.decode(first.tty_nr)
    foreground = group_number(first.tpgid) if first.tpgid in groups.values() else None
    settings = window = b""
    for _, view in scope.files() if foreground is not None else ():
        if pty_sides.is_terminal(view) and terminal.device(view.local) == device:
            settings, window = terminal.settings(view.local).pack(), terminal.window(view.local)
            break
    return ShellJob(settings=settings, window=window, foreground=foreground)


class JobTerminal:
    """The terminal of the restorer's session, lent to a tree. All methods run in the main thread.

    Raises:
        UsageError: this is another thread.
        Refused: there is none.
        ImageError: what the image says of it is damaged.

    Ownership: holds the terminal open until `close`, which puts back what was lent; idempotent.
    """

    def __init__(self, job: ShellJob) -> None:
        if len(job.settings) not in (0, Settings.BYTES) or len(job.window) not in (0, len(_NO_WINDOW)):
            raise ImageError("the terminal of a shell's job is damaged")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "shell_job: a terminal can be given by the main thread only, which gets the signals"
            )
        try:
            self._tty = LocalFd(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
        except OSError as error:
            why = f"this command has no controlling terminal to give ({error.strerror})"
            raise Refused([Blocker("--shell-job", why, "run it from an interactive shell")]) from None
        LEDGER.take("terminal of the shell", self._tty)
        self._wanted = job.foreground is not None
        self._settings = job.settings
        self._window = job.window
        self._root = 0
        self._group = 0
        #: the root is in our own group
        self._shared = False
        #: somebody has continued us, and had stopped us if it was not `_suspend`
        self._continued = False
        self._lent: tuple[Settings, bytes] | None = None
        self._guard: _Guard | None = None
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        # a tree in our own group shares what the terminal sends; we stop when it has stopped
        self._usual = {number: signal.signal(number, self._on_signal) for number in _OF_JOBS}

    @property
    def path(self) -> str:
        """Its name, such as /dev/pts/3."""
        device = terminal.device(self._tty)
        for fd in range(3):
            with suppress(OSError):
                if terminal.device(LocalFd(fd)) == device:
                    return os.ttyname(fd)
        return f"/dev/pts/{device[1]}" if device and device[0] == terminal.PTS_MAJOR else "/dev/tty"

    def lend(self, root: int, group: int) -> None:
        """Let the tree have it: `group` was in the foreground (0: that of the root, which may be ours)."""
        self._root = root
        self._group = group or os.getpgid(root)
        self._shared = self.reaches(root)
        self._guard = _Guard(self._tty)
        if self._wanted and self._is_ours():
            self._give()

    def reaches(self, pid: int) -> bool:
        """Whether what the terminal sends to our group is sent to `pid` as well."""
        return _group_of(pid) == os.getpgrp()

    def greet(self) -> None:
        """The tree runs: what it had drawn is not on this terminal."""
        if self._lent is not None:
            with suppress(OSError):
                os.killpg(terminal.foreground(self._tty), signal.SIGWINCH)

    def look(self) -> None:
        """Do what a shell would: follow a tree that has stopped, and one that shall be in the foreground."""
        try:
            stopped = self._is_stopped()
        except procfs.ProcessGone:
            return
        with suppress(OSError):  # the terminal is hung up
            self._see()
            if self._wanted and self._lent is None and self._is_ours():  # the shell has put it there
                self._resume(stopped)
            elif stopped:
                self._suspend()

    def close(self) -> None:
        """Put everything back, once; idempotent."""
        if self._tty < 0:
            return
        self._take_back()
        if self._guard is not None:
            self._guard.dismiss()
        os.close(self._tty)
        LEDGER.give_back("terminal of the shell", self._tty)
        self._tty = LocalFd(-1)
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _on_signal(self, number: int, frame: object) -> None:
        """`look` sees whether the tree has stopped, and then stops us."""
        self._continued |= number == signal.SIGCONT

    def _is_ours(self) -> bool:
        with suppress(OSError):
            return terminal.foreground(self._tty) == os.getpgrp()
        return False  # it is hung up

    def _give(self) -> None:
        assert self._guard is not None
        usual = terminal.settings(self._tty)
        window = terminal.window(self._tty)
        if not _has_members(self._group):
            self._group = _group_of(self._root)
        self._lent = usual, window
        self._guard.watch(usual, os.getpgrp(), self._group)
        try:
            os.tcsetpgrp(self._tty, self._group)
        except OSError:  # the tree has ended meanwhile
            self._lent = None
            self._guard.rest()
            return
        if self._settings:
            wanted = replace(
                Settings.unpack(self._settings),
                cflag=usual.cflag,
                line=usual.line,
                ispeed=usual.ispeed,
                ospeed=usual.ospeed,
            )
            terminal.set_settings(self._tty, wanted)
        if window[:4] == _NO_WINDOW[:4] and self._window:
            terminal.set_window(self._tty, self._window)
        self._settings, self._continued = terminal.settings(self._tty).pack(), False

    def _see(self) -> None:
        """Note what the tree has made of the terminal. If the shell has taken it meanwhile, nothing is lent any more.

        Raises:
            OSError: it is hung up.
        """
        if self._lent is None:
            return
        # in this order: a shell changes the settings when it has the foreground already
        settings, group = terminal.settings(self._tty).pack(), terminal.foreground(self._tty)
        continued, self._continued = self._continued, False
        if group == os.getpgrp():
            taken = continued and settings != self._settings if self._shared else True
        else:
            taken = group not in (0, self._group) and _is_of_our_shell(group)
        if taken:
            self._take_size_back(self._lent[1])
            self._lent = None
            self._tell_guard_of_nothing()
        else:
            self._settings, self._group = settings, group or self._group

    def _tell_guard_of_nothing(self) -> None:
        if self._guard is not None:
            self._guard.rest()

    def _take_back(self) -> None:
        with suppress(OSError):  # it is hung up
            self._see()
        if self._lent is None:
            return
        usual, window = self._lent
        self._lent = None
        with suppress(OSError):  # it is hung up
            self._take_size_back(window)
            terminal.set_settings(self._tty, usual)
            os.tcsetpgrp(self._tty, os.getpgrp())
        self._tell_guard_of_nothing()

    def _take_size_back(self, window: bytes) -> None:
        if window[:4] == _NO_WINDOW[:4]:
            self._window = terminal.window(self._tty)
            terminal.set_window(self._tty, window)

    def _suspend(self) -> None:
        """Stop as the tree has stopped; returns when the shell lets both go on."""
        self._take_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            # where no shell would continue us, the kernel ignores this
            os.killpg(os.getpgrp(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, self._on_signal)
        self._wanted = True
        with suppress(procfs.ProcessGone):
            self._resume(self._is_stopped())

    def _resume(self, stopped: bool) -> None:
        """Let the tree, `stopped` or not, have the terminal if the shell has put us in the foreground, and go on."""
        if self._is_ours():
            self._give()
        groups = {_group_of(self._root), self._group if self._lent is not None else 0} - {0}
        if self._shared and not stopped:
            # it was continued with us; once more could undo the next ^Z
            groups.discard(os.getpgrp())
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)

    def _is_stopped(self) -> bool:
        return procfs.stat(HostPid(self._root)).state == "T"


def _group_of(pid: int) -> int:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return 0


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_of_our_shell(group: int) -> bool:
    """Whether a process group is the shell's or another job of it: from its members up, its session comes before us."""
    us, leader = os.getpid(), os.getsid(0)
    for name in os.listdir("/proc"):
        if name.isdigit() and _group_of(int(name)) == group:
            pid = int(name)
            with suppress(procfs.ProcessGone):
                while pid not in (us, leader, 0):
                    pid = procfs.stat(HostPid(pid)).ppid
                return pid != us and pid == leader
    return False


class _Guard:
    """A child that puts a terminal back if its parent ends without a word."""

    def __init__(self, tty: LocalFd) -> None:
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = fork_deaf()
        except BaseException:
            os.close(self._writer)
            os.close(reader)
            raise
        if self._pid == 0:
            try:
                os.setpgid(0, 0)
                os.dup2(tty, 0)
                os.dup2(reader, 1)
                syscall(NR.close_range, 2, 0xFFFF_FFFF, 0)
                _keep_watch()
            finally:
                os._exit(0)
        os.close(reader)
        LEDGER.take("guard of the terminal", self._pid)

    def watch(self, usual: Settings, ours: int, theirs: int) -> None:
        """These settings are to be put back, and group `ours` in the foreground in the place of `theirs`."""
        self._say(usual.pack() + _GROUPS.pack(ours, theirs))

    def rest(self) -> None:
        """There is nothing to put back now."""
        self._say(_NOTHING)

    def _say(self, word: bytes) -> None:
        with suppress(BrokenPipeError):  # somebody has killed it
            os.write(self._writer, word)

    def dismiss(self) -> None:
        """Let it end; it puts back what it was told last."""
        os.close(self._writer)
        os.waitpid(self._pid, 0)
        LEDGER.give_back("guard of the terminal", self._pid)


def _keep_watch() -> None:
    """The guard: terminal at 0, what its parent says at 1."""
    tty, last = LocalFd(0), _NOTHING
    while word := os.read(1, _WORD_BYTES):
        last = word
    if last == _NOTHING:
        return
    with suppress(OSError):  # it is hung up
        ours, theirs = _GROUPS.unpack(last[Settings.BYTES :])
        now = terminal.foreground(tty)
        if now not in (ours, theirs) and _is_of_our_shell(now):
            return
        terminal.set_settings(tty, Settings.unpack(last[: Settings.BYTES]))
        with suppress(OSError):  # nobody is in it: the shell sees to that
            os.tcsetpgrp(tty, ours)
