"""Who else has descriptors: what is read again at a second look, and what is not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import LocalFd
from pipeline.resources import outside
from pipeline.resources.outside import Outsiders
from pipeline.resources.shielded import Shield


@contextmanager
def outsider() -> Iterator[tuple[int, Callable[[str], int]]]:
    """A process with nothing but two pipes to us, and what lets it open ("o") and close ("c") a descriptor."""
    orders, to_it = os.pipe()
    from_it, answers = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(orders, 0)
        os.dup2(answers, 1)
        os.closerange(2, 1 << 16)
        opened: list[int] = []
        while order := os.read(0, 1):
            if order == b"o":
                opened.append(os.open("/dev/zero", os.O_RDONLY))
            elif order == b"c":
                os.close(opened.pop())
            else:  # another file in its place
                os.dup2(os.open("/dev/full", os.O_WRONLY), opened[-1])
                os.close(opened[-1] + 1)
            os.write(1, bytes([opened[-1] if opened else 0]))
        os._exit(0)
    os.close(orders)
    os.close(answers)

    def order(what: str) -> int:
        os.write(to_it, what.encode())
        return os.read(from_it, 1)[0]

    try:
        yield pid, order
    finally:
        os.close(to_it)
        os.close(from_it)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _held(outsiders: Outsiders, link: bytes, pid: int) -> list[int]:
    return [fd for holder, fd in outsiders.of(link) if holder == pid]


def _wait(_: list[LocalFd], fifo: str) -> bytes:
    return Path(fifo).read_bytes()


def test_the_child_that_looks_at_files_for_us_does_not_count(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    link = os.fsencode(tmp_path / "file")
    shield = Shield()
    shield.start()
    try:
        with (tmp_path / "file").open("wb") as file:
            assert shield.begin(_wait, [LocalFd(file.fileno())], str(tmp_path / "fifo"))
        with (tmp_path / "fifo").open("wb"):  # both are there
            for outsiders, held in [(Outsiders(), 1), (Outsiders(shield), 0)]:
                outsiders.look()
                assert len(list(outsiders.of(link))) == held
    finally:
        shield.close()


def test_descriptors_that_come_and_go_are_seen() -> None:
    outsiders = Outsiders()
    with outsider() as (pid, order):
        outsiders.look()
        assert not _held(outsiders, b"/dev/zero", pid)
        first, second = order("o"), order("o")
        assert not _held(outsiders, b"/dev/zero", pid)
        outsiders.look()
        assert _held(outsiders, b"/dev/zero", pid) == [first, second]
        order("c")
        outsiders.look()
        assert _held(outsiders, b"/dev/zero", pid) == [first]
    outsiders.look()
    assert not _held(outsiders, b"/dev/zero", pid)
    assert pid not in outsiders._seen


def test_a_process_that_is_new_is_read() -> None:
    outsiders = Outsiders()
    outsiders.look()
    with outsider() as (pid, order):
        fd = order("o")
        outsiders.look()
        assert _held(outsiders, b"/dev/zero", pid) == [fd]


def test_groups_and_sessions_of_others() -> None:
    outsiders = Outsiders()
    with outsider() as (pid, _):
        assert pid not in outsiders.in_group(os.getpgrp())
        outsiders.look()
        assert pid in outsiders.in_group(os.getpgrp())
        assert pid in outsiders.in_group(os.getsid(0))
        os.setpgid(pid, pid)
        outsiders.look_anew()
        assert pid in outsiders.in_group(os.getsid(0))
        assert list(outsiders.in_group(pid)) == [pid]
    outsiders.look()
    assert not list(outsiders.in_group(pid))


def test_who_has_ended_is_in_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the list of processes and the look at each, too; a zombie still is in its group."""
    outsiders = Outsiders()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        signal.pause()
    while os.getpgid(pid) != pid:
        pass
    outsiders.look()
    assert list(outsiders.in_group(pid)) == [pid]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    outsiders.look_anew()
    assert list(outsiders.in_group(pid)) == [pid]
    os.waitpid(pid, 0)
    listdir = os.listdir
    monkeypatch.setattr(
        os, "listdir", lambda path: [*listdir(path), str(pid)] if path == "/proc" else listdir(path)
    )
    outsiders.look()
    assert not list(outsiders.in_group(pid))


def test_our_own_are_none() -> None:
    outsiders = Outsiders()
    with open("/dev/zero", "rb"):
        outsiders.look()
        assert os.getpid() not in {pid for pid, _ in outsiders.of(b"/dev/zero")}


def test_only_what_has_changed_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if not outside._are_counted():
        pytest.skip("this kernel does not say how many descriptors a process has")
    read: list[str] = []
    readlink = os.readlink

    def counted(path: bytes) -> bytes:
        read.append(os.fsdecode(path).split("/")[2])
        return readlink(path)

    monkeypatch.setattr(os, "readlink", counted)
    outsiders = Outsiders()
    with outsider() as (pid, order):
        order("o")
        outsiders.look()
        assert read.count(str(pid)) == 3
        outsiders.look()
        assert read.count(str(pid)) == 3
        order("o")
        outsiders.look()
        assert read.count(str(pid)) == 3 + 4


def test_all_is_read_anew_before_a_tree_is_stopped() -> None:
    """One that has taken another's place is found then, and only if somebody has asked at all."""
    outsiders = Outsiders()
    outsiders.look_anew()
    assert not outsiders._seen
    with outsider() as (pid, order):
        fd = order("o")
        outsiders.look()
        order("r")
        assert _held(outsiders, b"/dev/zero", pid) == [fd]
        outsiders.look_anew()
        assert not _held(outsiders, b"/dev/zero", pid)
        assert _held(outsiders, b"/dev/full", pid) == [fd]


def test_where_they_are_not_counted_all_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_are_counted", lambda: False)
    outsiders = Outsiders()
    with outsider() as (pid, order):
        fd = order("o")
        outsiders.look()
        order("r")
        outsiders.look()
        assert _held(outsiders, b"/dev/full", pid) == [fd]
