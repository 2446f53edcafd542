"""What is under way in a pseudo-terminal: lines half typed and finished, unread output, full buffers."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
from contextlib import suppress
from functools import partial

import pytest

from pipeline.resources import terminal, terminal_bytes
from pipeline.resources.shielded import Shield
from tests.harness.tree import children_of
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.ptyharness import number, output, own_terminals, without_modes  # noqa: F401 - a fixture
from tests.resources.sockharness import polled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_terminals")]  # each test has a devpts of its own

TIOCGPKT = 0x80045438


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


@pytest.mark.parametrize("packets", [False, True])
def test_bytes_under_way_in_raw_mode_stay_on_both_copies(packets: bool) -> None:
    content = bytes(range(256)) * 7

    def setup() -> tuple[int, int]:
        master, slave = os.openpty()
        without_modes(slave, termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
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
        without_modes(slave, termios.ECHO)
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
        without_modes(slave, termios.ECHO)
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
            terminal_bytes.capture(master, Shield())
            os._exit(0)
        time.sleep(0.15)
        os.kill(pipeline, signal.SIGKILL)
        os.waitpid(pipeline, 0)
        deadline = time.monotonic() + 60
        while left := set(children_of(os.getpid())) - {child.pid, *before}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            for pid in left:  # orphans that became ours
                os.waitpid(pid, os.WNOHANG)
        os.write(master, b"\n")
        assert os.read(slave, 100) == b"half\n"
