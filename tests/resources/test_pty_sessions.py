"""Controlling terminals: sessions, foreground groups, who has laid theirs off, /dev/tty."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.puppet import Puppet
from pipeline.resources import terminal
from pipeline.resources.pty_session import ControllingTerminals, check_controlling_terminal
from tests.resources.fdharness import Capture, Rebuilt, subject
from tests.resources.ptyharness import number, output, own_terminals  # noqa: F401 - a fixture
from tests.resources.sockharness import polled

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_terminals")]  # each test has a devpts of its own

TIOCGSID = 0x5429


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
        deadline = time.monotonic() + 60
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
