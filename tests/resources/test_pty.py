"""Pseudo-terminals: both sides, settings, numbers, hung-up ones; and which are refused."""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
import termios
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.kernel import procfs
from pipeline.resources import terminal
from pipeline.resources.pty_session import check_controlling_terminal
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.ptyharness import gone, number, output, own_terminals  # noqa: F401 - a fixture
from tests.resources.sockharness import polled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_terminals")]  # each test has a devpts of its own

TIOCGPTPEER, TIOCSPTLCK, TIOCGPKT, TIOCSLCKTRMIOS = 0x5441, 0x40045431, 0x80045438, 0x5457


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


def test_a_number_that_is_taken_is_named() -> None:
    with subject(os.openpty) as child, Capture(child.pid) as capture:
        with pytest.raises(RebuildError, match=r"terminal number \d+ \(/dev/pts/\d+\) is in use"):
            Rebuilt(capture).__enter__()


@pytest.mark.parametrize("device", [None, (1, 0), (136, 0)])
def test_a_node_of_a_bad_image_is_left_alone(tmp_path: Path, device: tuple[int, int] | None) -> None:
    other = tmp_path / "0"
    if device is None:
        other.write_bytes(b"")
    else:
        os.mknod(other, stat.S_IFCHR, os.makedev(*device))
    other.chmod(0o600)
    with subject(os.openpty) as child:
        with Capture(child.pid) as capture:
            records = capture.records()
        child.call(partial(os.closerange, 3, 200))
        (found,) = [record.state["terminal"] for record in records if record.state.get("terminal")]
        found["node"] |= {"path": [0, os.fsencode(other)], "mode": 0o666}
        with pytest.raises(RebuildError, match="another device is there"):
            Rebuilt(capture, records).__enter__()
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


def test_settings_that_nobody_may_change_are_refused() -> None:
    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        fcntl.ioctl(slave, TIOCSLCKTRMIOS, struct.pack("<4I20x", 0, 0, 0, termios.ECHO))
        return master, slave

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "some settings of the terminal are locked" in capture.reasons(child.result[0])


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
        deadline = time.monotonic() + 60
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
