"""Pseudo-terminals: both sides, settings, numbers, sessions, what is typed; and every refusal."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError, Refused
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, mount, setns, unshare
from pipeline.remote.puppet import Puppet
from pipeline.resources import terminal, terminal_bytes
from pipeline.resources.pty_session import ControllingTerminals, check_controlling_terminal
from tests.harness.tree import children_of
from tests.resources.fdharness import Capture, Rebuilt, Subject, subject
from tests.resources.sockharness import polled

pytestmark = pytest.mark.root  # each test has a devpts of its own

_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
TIOCGPTPEER, TIOCSPTLCK, TIOCGPKT, TIOCGSID = 0x5441, 0x40045431, 0x80045438, 0x5429


@pytest.fixture(autouse=True)
def _own_terminals() -> Iterator[None]:
    """A devpts of our own in a mount namespace of our own, so that numbers are free when they should be."""
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    here = os.getcwd()
    unshare(CLONE.NEWNS)
    try:
        mount(None, b"/", None, _MS_REC | _MS_PRIVATE)
        mount(b"devpts", b"/dev/pts", b"devpts", 0, b"newinstance,ptmxmode=0666")
        yield
    finally:
        setns(home, CLONE.NEWNS)
        os.close(home)
        os.chdir(here)


def output(master: int, wanted: bytes) -> bytes:
    """As much as is wanted of what comes out of a terminal; it comes in pieces."""
    found = os.read(master, len(wanted))
    while len(found) < len(wanted):
        found += os.read(master, len(wanted) - len(found))
    return found


def number(fd: int, request: int) -> int:
    (value,) = struct.unpack("<i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


@contextmanager
def gone(child: Subject) -> Iterator[Capture]:
    """The capture of a subject that has closed everything, as if it had ended."""
    with Capture(child.pid) as capture:
        records = capture.records()
    child.call(partial(os.closerange, 3, 200))
    with Rebuilt(capture, records) as new:
        yield new  # type: ignore[misc]


def test_a_pair_keeps_number_settings_size_owner_and_works() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] &= ~termios.ECHO
        settings[6][termios.VINTR] = b"\x07"
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("<4H", 33, 111, 5, 6))
        os.fchown(slave, 7, 8)
        os.fchmod(slave, 0o600)
        os.set_blocking(master, False)
        return master, slave

    with subject(setup) as child:
        master, slave = child.result
        wanted = os.readlink(f"/proc/{child.pid}/fd/{slave}")
        with gone(child) as new:
            m, s = new.fd(master), new.fd(slave)
            assert os.readlink(f"/proc/self/fd/{s}") == wanted
            assert os.ttyname(s) == wanted
            settings = termios.tcgetattr(s)
            assert not settings[3] & termios.ECHO
            assert settings[6][termios.VINTR] == b"\x07"
            assert fcntl.ioctl(s, termios.TIOCGWINSZ, bytes(8)) == struct.pack("<4H", 33, 111, 5, 6)
            found = os.fstat(s)
            assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (7, 8, 0o600)
            assert not os.get_blocking(m)
            os.write(s, b"out\n")
            assert output(m, b"out\r\n") == b"out\r\n"
            os.write(m, b"in\n")
            assert os.read(s, 100) == b"in\n"


def test_packet_mode_lock_and_exclusive_mode_of_each_end() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        fcntl.ioctl(master, termios.TIOCPKT, struct.pack("<i", 1))
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("<i", 1))
        fcntl.ioctl(slave, termios.TIOCEXCL)
        return master, slave

    with subject(setup) as child:
        master, slave = child.result
        with gone(child) as new:
            m, s = new.fd(master), new.fd(slave)
            assert number(m, TIOCGPKT) == 1
            assert terminal.locked(m)
            assert terminal.exclusive(s)
            assert not terminal.exclusive(m)
            os.write(s, b"x")
            assert os.read(m, 10) == b"\0x"
            with pytest.raises(OSError, match="Input/output error"):
                fcntl.ioctl(m, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)


@pytest.mark.parametrize("opened", [False, True])
def test_a_master_whose_slave_was_never_opened_or_was_closed(opened: bool) -> None:
    def setup() -> int:
        if opened:
            master, slave = os.openpty()
            os.close(slave)
            return master
        return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)

    with subject(setup) as child:
        with gone(child) as new:
            m = new.fd(child.result)
            terminal.set_locked(m, False)
            assert bool(polled(m) & select.POLLHUP) == opened
            slave = fcntl.ioctl(m, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
            os.write(slave, b"x")
            assert os.read(m, 10) == b"x"
            os.close(slave)


def test_a_line_that_is_half_typed_is_kept_on_both_sides_of_the_copy() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        os.write(master, b"done\nhalf a \x16\x03 line")
        assert os.read(slave, 100) == b"done\n"
        return master, slave

    with subject(setup) as child, Capture(child.pid) as capture:
        master, slave = child.result
        before = termios.tcgetattr(capture.view(slave).local)
        records = capture.records()
        assert termios.tcgetattr(capture.view(slave).local) == before
        m, s = capture.view(master).local, capture.view(slave).local
        assert not polled(s) & select.POLLIN
        os.write(m, b"\x7f\x7f\x7f\x7fend\n")
        assert os.read(s, 100) == b"half a \x03 end\n"
        child.call(partial(os.closerange, 3, 200))
        capture._stack.close()
        with Rebuilt(capture, records) as new:
            m, s = new.fd(master), new.fd(slave)
            assert termios.tcgetattr(s) == before
            assert not polled(s) & select.POLLIN
            os.write(m, b"\x7f\x7f\x7f\x7fend\n")
            assert os.read(s, 100) == b"half a \x03 end\n"


def test_a_line_that_is_half_typed_is_not_echoed_again() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        os.write(master, b"half")
        assert output(master, b"half") == b"half"
        return master, slave

    with subject(setup) as child, Capture(child.pid) as capture:
        master, slave = (capture.view(fd).local for fd in child.result)
        state = capture.kind(child.result[0]).capture(capture.view(child.result[0]), capture)
        assert state.terminal.under_way.rest == b"half"
        assert not terminal.unread(master)
        os.write(master, b"\n")
        assert os.read(slave, 100) == b"half\n"


def _session() -> tuple[int, ...]:
    """A session with its terminal, a foreground group of another process, and a third that laid it off.

    /dev/tty is open.
    """
    os.setsid()
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    member = os.fork()
    if not member:
        os.setpgid(0, 0)
        select.select([], [], [])
    while os.getpgid(member) != member:
        time.sleep(0.001)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(slave, member)
    tty = os.open("/dev/tty", os.O_RDWR)
    without = os.fork()
    if not without:
        fcntl.ioctl(tty, termios.TIOCNOTTY)
        select.select([], [], [])
    while procfs.stat(HostPid(without)).tty_nr:
        time.sleep(0.001)
    return master, slave, tty, member, without


def _session_subject() -> tuple[int, ...]:
    """`_session` in a child, since the subject itself leads a process group already."""
    reader, writer = os.pipe()
    leader = os.fork()
    if not leader:
        found = _session()
        os.write(writer, struct.pack("<5i", *found))
        select.select([], [], [])
    master, slave, tty, member, without = struct.unpack("<5i", os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return leader, member, without, master, slave, tty


@contextmanager
def session() -> Iterator[tuple[int, ...]]:
    """(leader, member, one without terminal, master, slave, /dev/tty)."""
    with subject(_session_subject) as child:
        try:
            yield child.result
        finally:
            for pid in child.result[:3]:
                os.kill(pid, signal.SIGKILL)


class _InSession(Rebuilt):
    """A leader that takes its terminal before its child is born, as the tree's processes do."""

    def __enter__(self) -> Rebuilt:
        self._terminals = ControllingTerminals(self.files, self.open)
        self._stack.callback(self._terminals.close)
        self._terminals.open()
        self._once.update(self._terminals.made)
        return super().__enter__()

    def _spawn(self) -> Puppet:
        if not self._puppets and not hasattr(self, "_leader"):
            self._leader = super()._spawn()
            self._born: list[Puppet] = []
            self._leader.syscall(NR.setsid)
            self._terminals.session_founded(self._pids[0], self._leader)
            return self._leader
        member = self._leader.clone()
        self._stack.callback(member.kill_and_reap)
        self._born.append(member)
        member.syscall(NR.setpgid, 0, 0)
        for file in self.files if len(self._born) == 1 else ():
            if file.state.get("terminal"):
                file.state["terminal"]["foreground"] = member.pid
        return member


def test_the_controlling_terminal_of_a_session_and_dev_tty() -> None:
    with session() as (leader, member, without, master, slave, tty):
        with Capture(leader, member, without) as capture:
            for pid in capture.pids:
                assert not list(check_controlling_terminal(pid, capture))
            records = capture.records()
        state = next(f.state["terminal"] for f in records if f.kind == "pty" and f.state["terminal"])
        assert (state["session"], state["foreground"], state["without"]) == (leader, member, [without])
        for pid in (leader, member, without):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(procfs.stat(HostPid(pid)).state != "Z" for pid in (leader, member, without)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with _InSession(capture, records) as new:
            puppet, other = new.host_pid(leader), new.host_pid(member)
            device = 136, os.minor(os.fstat(new.fd(slave, leader)).st_rdev)
            for pid in (puppet, other):
                assert terminal.decode(procfs.stat(pid).tty_nr) == device
                assert procfs.stat(pid).tpgid == other
            assert not procfs.stat(new.host_pid(without)).tty_nr
            assert number(new.fd(master, leader), TIOCGSID) == puppet
            assert os.readlink(f"/proc/self/fd/{new.fd(tty, leader)}") == "/dev/tty"
            os.write(new.fd(tty, leader), b"said\n")
            assert output(new.fd(master, leader), b"said\r\n") == b"said\r\n"
            assert sorted(os.listdir(f"/proc/{puppet}/fd"), key=int)[-2:] == ["1000", "1001"]


def test_a_terminal_that_is_hung_up() -> None:
    def setup() -> int:
        master, slave = os.openpty()
        os.close(master)
        return slave

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        fd = new.fd(child.result)
        assert polled(fd) == polled(capture.view(child.result).local)
        assert os.read(fd, 10) == b""
        with pytest.raises(OSError, match="Input/output error"):
            os.write(fd, b"x")


def test_a_terminal_whose_session_leader_has_ended() -> None:
    """Nobody's terminal any more: it is not hung up, and somebody else may take it."""

    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        leader = os.fork()
        if not leader:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            os._exit(0)
        os.waitpid(leader, 0)
        return master, slave

    def state(master: int, slave: int) -> tuple[object, ...]:
        os.write(slave, b"works")
        assert output(master, b"works") == b"works"
        return polled(master), polled(slave), terminal.session(master), terminal.foreground(master)  # type: ignore[arg-type]

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
            before = state(*(capture.view(fd).local for fd in child.result))
            assert before[2:] == (0, 0)
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            assert state(*(new.fd(fd) for fd in child.result)) == before


def test_a_number_that_is_taken_is_named() -> None:
    with subject(os.openpty) as child, Capture(child.pid) as capture:
        with pytest.raises(RebuildError, match=r"terminal number \d+ \(/dev/pts/\d+\) is in use"):
            Rebuilt(capture).__enter__()


def _mode(slave: int, off: int) -> None:
    settings = termios.tcgetattr(slave)
    settings[3] &= ~off
    termios.tcsetattr(slave, termios.TCSANOW, settings)


@pytest.mark.parametrize("packets", [False, True])
def test_bytes_under_way_in_raw_mode_stay_on_both_copies(packets: bool) -> None:
    content = bytes(range(256)) * 7

    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        _mode(slave, termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
        settings = termios.tcgetattr(slave)
        settings[0] = settings[1] = 0
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        if packets:
            fcntl.ioctl(master, termios.TIOCPKT, struct.pack("<i", 1))
        os.write(master, content)
        os.write(slave, content[::-1] * 2)
        return master, slave

    def drained(master: int, slave: int) -> None:
        assert terminal.unread(slave) == len(content)  # type: ignore[arg-type]
        assert os.read(slave, 9000) == content
        found = b""
        while terminal.unread(master):  # type: ignore[arg-type]
            piece = os.read(master, 9000)
            found += piece[1:] if packets else piece
        assert found == content[::-1] * 2

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
            before = [termios.tcgetattr(capture.view(fd).local) for fd in child.result]
            drained(*(capture.view(fd).local for fd in child.result))
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            assert [termios.tcgetattr(new.fd(fd)) for fd in child.result] == before
            assert number(new.fd(child.result[0]), TIOCGPKT) == packets
            drained(*(new.fd(fd) for fd in child.result))


def test_finished_lines_keep_their_ends() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        _mode(slave, termios.ECHO)
        os.write(master, b"one\ntwo\x04\x04\n\x16\x04three\nfo")
        return master, slave

    def read(master: int, slave: int) -> list[bytes]:
        found = []
        while polled(slave) & select.POLLIN:
            found.append(os.read(slave, 100))
        os.write(master, b"ur\n")
        return [*found, os.read(slave, 100)]

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
            expected = [b"one\n", b"two", b"", b"\n", b"\x04three\n", b"four\n"]
            assert read(*(capture.view(fd).local for fd in child.result)) == expected
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            assert read(*(new.fd(fd) for fd in child.result)) == expected


def test_last_words_before_the_slave_was_closed() -> None:
    def setup() -> int:
        master, slave = os.openpty()
        os.write(slave, b"bye\n")
        os.close(slave)
        return master

    def last(master: int) -> None:
        assert output(master, b"bye\r\n") == b"bye\r\n"
        with pytest.raises(OSError, match="Input/output error"):
            os.read(master, 100)

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
            last(capture.view(child.result).local)
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            last(new.fd(child.result))


def test_full_lines_and_stopped_input_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        lines, lines_slave = os.openpty()
        _mode(lines_slave, termios.ECHO)
        os.write(lines, b"a line that is finished\n" * 150)
        stopped, stopped_slave = os.openpty()
        os.write(stopped, b"typed\n")
        termios.tcflow(stopped, termios.TCOOFF)
        return lines, lines_slave, stopped, stopped_slave

    with subject(setup) as child, Capture(child.pid) as capture:
        lines, lines_slave, stopped, stopped_slave = child.result
        for fd in (lines, stopped):
            assert not capture.blockers(fd)
            with pytest.raises(Refused, match="its input is stopped") as refused:
                capture.kind(fd).capture(capture.view(fd), capture)
            assert all(blocker.transient for blocker in refused.value.blockers)
        assert os.read(capture.view(lines_slave).local, 100) == b"a line that is finished\n"
        assert os.read(capture.view(stopped_slave).local, 100) == b"typed\n"


def _flow(slave: int, on: bool) -> None:
    settings = termios.tcgetattr(slave)
    settings[0] = settings[0] | termios.IXON if on else settings[0] & ~termios.IXON
    termios.tcsetattr(slave, termios.TCSANOW, settings)


def _process_outside(slave: int) -> None:
    settings = termios.tcgetattr(slave)
    settings[3] ^= 0o200000  # EXTPROC
    termios.tcsetattr(slave, termios.TCSANOW, settings)


@pytest.mark.parametrize(
    "acts",
    [
        {"flush output": lambda slave: termios.tcflush(slave, termios.TCOFLUSH)},
        {"stop": lambda slave: termios.tcflow(slave, termios.TCOOFF)},
        {
            "stop": lambda slave: termios.tcflow(slave, termios.TCOOFF),
            "start": lambda slave: termios.tcflow(slave, termios.TCOON),
        },
        {"no flow control": lambda slave: _flow(slave, False)},
        {"flow off": lambda slave: _flow(slave, False), "flow on": lambda slave: _flow(slave, True)},
        {
            "twice": _process_outside,
            "and back": _process_outside,
            "flush": lambda slave: termios.tcflush(slave, termios.TCIOFLUSH),
        },
    ],
    ids=", ".join,
)
def test_what_packet_mode_has_to_report_is_not_lost(acts: dict[str, Callable[[int], None]]) -> None:
    def setup() -> tuple[int, int, int]:
        master, slave = os.openpty()
        _mode(slave, termios.ECHO)
        fcntl.ioctl(master, termios.TIOCPKT, struct.pack("<i", 1))
        for act in acts.values():
            act(slave)
        poll = select.poll()
        poll.register(master, select.POLLPRI)
        assert poll.poll(0)
        if "stop" not in acts or "start" in acts:
            os.write(slave, b"said")
        os.write(master, b"typed\n")
        os.set_blocking(master, False)
        time.sleep(0.02)
        return master, slave, acts.keys() == {"stop"}

    def reported(master: int, slave: int, silent: bool) -> list[bytes]:
        time.sleep(0.02)
        found = [os.read(master, 100)]
        found += [] if silent else [os.read(master, 100)]
        with pytest.raises(BlockingIOError):
            os.read(master, 100)
        assert os.read(slave, 100) == b"typed\n"
        return found

    with subject(setup) as child:
        *fds, silent = child.result
        with Capture(child.pid) as capture:
            records = capture.records()
            before = reported(*(capture.view(fd).local for fd in fds), silent)
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            after = reported(*(new.fd(fd) for fd in fds), silent)
    expected = {
        ("flush output",): 2, ("stop",): 4, ("stop", "start"): 8, ("no flow control",): 16,
        ("flow off", "flow on"): 32,
    }  # fmt: skip
    wanted = expected.get(tuple(acts), 1 | 2 | 64)
    # where input had to be typed behind a flush, it is said once more that output runs, and what ^S means
    again = 8 | 32 if wanted & 1 else 0
    for found in (before, after):
        told = found[0][0]
        assert told & wanted == wanted
        assert not told & ~wanted & ~again
        assert found[1:] == ([] if silent else [b"\0said"])


def _start_by_key(master: int, slave: int) -> None:
    os.write(master, b"\x11")
    terminal.unread(slave)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["key", "call"])
@pytest.mark.parametrize("canonical", [False, True])
def test_output_that_is_stopped_stays_so_until_it_is_started_the_same_way(how: str, canonical: bool) -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        _mode(slave, termios.ECHO | (0 if canonical else termios.ICANON))
        os.write(slave, b"before")
        if how == "key":
            os.write(master, b"typed\nrest\x13")
            while polled(slave) & select.POLLOUT:
                time.sleep(0.001)
        else:
            os.write(master, b"typed\nrest")
            termios.tcflow(slave, termios.TCOOFF)
        os.set_blocking(slave, False)
        return master, slave

    def stopped(master: int, slave: int) -> None:
        assert output(master, b"before") == b"before"
        with pytest.raises(BlockingIOError):
            os.write(slave, b"after")
        assert os.read(slave, 100) == (b"typed\n" if canonical else b"typed\nrest")
        _start_by_key(master, slave)
        assert bool(polled(slave) & select.POLLOUT) == (how == "key")
        termios.tcflow(slave, termios.TCOON)
        os.write(slave, b"after")
        assert output(master, b"after") == b"after"

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
            before = [termios.tcgetattr(capture.view(fd).local) for fd in child.result]
            stopped(*(capture.view(fd).local for fd in child.result))
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            assert [termios.tcgetattr(new.fd(fd)) for fd in child.result] == before
            stopped(*(new.fd(fd) for fd in child.result))


def test_buffers_that_are_full_in_both_directions() -> None:
    typed, said = bytes(range(256)) * 40, b"".join(b"%07d\n" % number for number in range(1 << 15))

    def setup() -> tuple[int, int, int]:
        master, slave = os.openpty()
        settings = termios.tcgetattr(slave)
        settings[0] = settings[1] = settings[3] = 0
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        os.write(master, typed)
        os.set_blocking(slave, False)
        written = idle = 0
        while idle < 5:
            idle += 1
            time.sleep(0.002)
            with suppress(BlockingIOError):
                while True:
                    written += os.write(slave, said[written : written + 700])
                    idle = 0
        return master, slave, written

    def drained(master: int, slave: int, written: int) -> None:
        found = bytearray()
        while len(found) < written:
            found += os.read(master, written)
        assert len(found) == written
        assert bytes(found) == said[:written]
        found.clear()
        while terminal.unread(slave):  # type: ignore[arg-type]
            found += os.read(slave, 9000)
        assert bytes(found) == typed
        assert not terminal.unread(master)  # type: ignore[arg-type]

    with subject(setup) as child:
        *fds, written = child.result
        assert written > 8192
        with Capture(child.pid) as capture:
            records = capture.records()
            drained(*(capture.view(fd).local for fd in fds), written)
        child.call(partial(os.closerange, 3, 200))
        with Rebuilt(capture, records) as new:
            drained(*(new.fd(fd) for fd in fds), written)


def test_a_pipeline_that_is_killed_while_it_looks_leaves_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        _mode(slave, termios.ECHO)
        os.write(master, b"half")
        return master, slave

    def slowly(*arguments: object) -> None:
        time.sleep(0.3)
        write(*arguments)

    write = terminal_bytes._write
    monkeypatch.setattr(terminal_bytes, "_write", slowly)
    before = children_of(os.getpid())
    with subject(setup) as child, Capture(child.pid) as capture:
        master, slave = (capture.view(fd).local for fd in child.result)
        pipeline = os.fork()
        if not pipeline:
            terminal_bytes.capture(master)
            os._exit(0)
        time.sleep(0.15)
        os.kill(pipeline, signal.SIGKILL)
        os.waitpid(pipeline, 0)
        deadline = time.monotonic() + 5
        while left := set(children_of(os.getpid())) - {child.pid, *before}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            for pid in left:  # orphans that became ours
                os.waitpid(pid, os.WNOHANG)
        os.write(master, b"\n")
        assert os.read(slave, 100) == b"half\n"


def test_a_terminal_from_outside_is_refused_and_its_owner_named() -> None:
    master, slave = os.openpty()
    name = os.ttyname(slave)

    def setup() -> tuple[int, int, int]:
        forked_master, forked_slave = os.openpty()
        child = os.fork()
        if not child:
            os.setsid()
            fcntl.ioctl(forked_slave, termios.TIOCSCTTY, 0)
            os.close(forked_master)
            select.select([], [], [])
        os.close(forked_slave)
        return child, forked_master, os.open(name, os.O_RDWR | os.O_NOCTTY)

    with subject(setup) as child:
        forked, forked_master, opened = child.result
        deadline = time.monotonic() + 5
        while not procfs.stat(forked).tty_nr and time.monotonic() < deadline:
            time.sleep(0.001)
        with Capture(child.pid) as capture:
            reasons = capture.reasons(opened)
            assert "outside the tree" in reasons
            assert "run tmux inside the tree" in reasons
            reasons = capture.reasons(forked_master)
            assert f"used by pid {forked} " in reasons
            assert f"controls the session of pid {forked} outside the tree" in reasons
        with Capture(forked) as capture:
            (blocker,) = check_controlling_terminal(capture.pids[0], capture)
            assert f"belongs to pid {child.pid} " in blocker.reason
    os.close(master)
    os.close(slave)


def test_a_console_is_refused(tmp_path: Path) -> None:
    node = tmp_path / "console"
    try:
        os.mknod(node, 0o600 | 0o020000, os.makedev(5, 1))
        os.close(os.open(node, os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        pytest.skip(f"no console here: {error}")
    with subject(partial(os.open, node, os.O_RDWR | os.O_NOCTTY)) as child, Capture(child.pid) as capture:
        assert "terminal device 5:1 is no pseudo-terminal" in capture.reasons(child.result)
