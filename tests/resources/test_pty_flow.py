"""Output of a pseudo-terminal that is stopped, and what packet mode has to report of it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Callable
from functools import partial

import pytest

from pipeline.errors import Refused
from pipeline.resources import terminal
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.ptyharness import output, own_terminals, without_modes  # noqa: F401 - a fixture
from tests.resources.sockharness import polled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_terminals")]  # each test has a devpts of its own


def test_full_lines_and_stopped_input_are_refused() -> None:
    def setup() -> tuple[int, ...]:
        lines, lines_slave = os.openpty()
        without_modes(lines_slave, termios.ECHO)
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
        without_modes(slave, termios.ECHO)
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
        without_modes(slave, termios.ECHO | (0 if canonical else termios.ICANON))
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
