"""Who else has descriptors: what is read again at a second look, and what is not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid, LocalFd
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
        outsiders.look_anew([])
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
    outsiders.look_anew([])
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
    """One that has taken another's place is found then."""
    outsiders = Outsiders()
    with outsider() as (pid, order):
        fd = order("o")
        outsiders.look()
        order("r")
        assert _held(outsiders, b"/dev/zero", pid) == [fd]
        outsiders.look_anew([])
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


LINK = b"anon_inode:[eventfd]"
#: more than are compared one by one
SHARED = 2 * outside._MANY


@contextmanager
def sharer(fds: list[int]) -> Iterator[HostPid]:
    """A process that has these of ours under the same numbers, and nothing else."""
    pid = os.fork()
    if not pid:
        low = 0
        for fd in sorted(fds):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 1 << 16)
        signal.pause()
    while sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) != sorted(fds):
        pass
    try:
        yield HostPid(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0) for _ in range(SHARED)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def sharing(outsiders: Outsiders, pid: HostPid, fd: int) -> set[tuple[HostPid, int]]:
    """Who but `pid` has its descriptor, too."""
    return set(outsiders.of_file(LINK, (pid, fd), lambda other: other != pid))


_ranked = pytest.mark.skipif(
    not outside._are_counted(), reason="this kernel does not say how many descriptors a process has"
)


@_ranked
def test_of_many_open_files_the_one_that_is_shared_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    outsiders = Outsiders()
    with eventfds() as shared, eventfds() as own, sharer(own + shared) as pid, sharer(shared) as other:
        outsiders.look_anew([pid])
        outsiders.look()
        compared: list[object] = []
        compare = outside._compare
        monkeypatch.setattr(outside, "_compare", lambda *two: compared.append(two) or compare(*two))
        for fd in shared:
            assert sharing(outsiders, pid, fd) == {(other, fd)}
        for fd in own:
            assert not sharing(outsiders, pid, fd)
        one_by_one = 2 * SHARED * len(list(outsiders.of(LINK)))
        assert len(compared) < one_by_one / 4


def test_who_shares_it_with_others_is_found_with_them() -> None:
    outsiders = Outsiders()
    with eventfds() as fds, sharer(fds) as pid, sharer(fds) as one, sharer(fds) as other:
        outsiders.look_anew([pid])
        for fd in fds:
            assert sharing(outsiders, pid, fd) == {(one, fd), (other, fd)}


def test_who_has_come_since_they_were_brought_in_order_is_found() -> None:
    outsiders = Outsiders()
    with eventfds() as fds, sharer(fds) as pid, sharer(fds) as first:
        outsiders.look_anew([pid])
        with sharer(fds[:3]) as late:
            outsiders.look()
            assert sharing(outsiders, pid, fds[0]) == {(first, fds[0]), (late, fds[0])}
        outsiders.look()
        assert sharing(outsiders, pid, fds[0]) == {(first, fds[0])}


def test_who_has_left_the_tree_since_is_found() -> None:
    outsiders = Outsiders()
    with eventfds() as fds, sharer(fds) as pid, sharer(fds) as first, sharer(fds) as left:
        outsiders.look_anew([pid, left])
        outsiders.look()
        assert sharing(outsiders, pid, fds[5]) == {(first, fds[5]), (left, fds[5])}


@_ranked
def test_where_they_are_not_in_order_any_more_they_are_compared_one_by_one() -> None:
    """As where others have taken their numbers meanwhile."""
    outsiders = Outsiders()
    with eventfds() as fds, sharer(fds) as pid, sharer(fds) as other:
        outsiders.look_anew([pid])
        outsiders._ranked[LINK]._order.reverse()
        for fd in fds:
            assert sharing(outsiders, pid, fd) == {(other, fd)}


def test_of_many_files_of_one_name_each_is_asked_once_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    stat = os.stat
    fds = [os.memfd_create("same") for _ in range(8)]
    try:
        with sharer(fds) as pid:
            outsiders = Outsiders()
            outsiders.look()
            monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(path) or stat(path, **more))
            for fd in fds:
                found = os.fstat(fd)
                inode = found.st_dev, found.st_ino
                assert list(outsiders.of_inode(b"/memfd:same (deleted)", inode)) == [(pid, fd)]
            assert len(asked) == len(set(asked)) >= len(fds)
    finally:
        for fd in fds:
            os.close(fd)
