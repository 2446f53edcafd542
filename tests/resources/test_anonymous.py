"""eventfd, timerfd, signalfd, pidfd, epoll, and what is refused."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import epoll
from pipeline.resources.eventfd import is_semaphore
from tests.harness.tree import children_of
from tests.resources.fdharness import Capture, Rebuilt, subject

CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM = 8, 9
ABSTIME = 1
SECOND = 1_000_000_000


# -- eventfd --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 0xFFFF_FFFF_FFFF_FFFE])
@pytest.mark.parametrize("flags", [0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK])
def test_eventfd_count_and_mode(count: int, flags: int) -> None:
    def setup() -> int:
        fd = os.eventfd(0, flags)
        if count:
            os.eventfd_write(fd, count)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        fd = new.fd(child.result)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == capture.view(child.result).flags
        os.set_blocking(fd, False)
        if count:
            assert os.eventfd_read(fd) == (1 if flags else count)
            assert child.call(partial(os.eventfd_read, child.result)) == (1 if flags else count)
        else:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 0xFFFF_FFFF_FFFF_FFFD, 0xFFFF_FFFF_FFFF_FFFE])
@pytest.mark.parametrize("flags", [0, os.EFD_SEMAPHORE])
def test_whether_an_eventfd_is_a_semaphore_shows_by_reading(count: int, flags: int) -> None:
    fd = os.eventfd(count % (1 << 32), flags)
    if count >> 32:
        os.eventfd_write(fd, count - count % (1 << 32))
    assert is_semaphore(LocalFd(fd), count) == bool(flags)
    assert f"eventfd-count: {count:16x}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(fd)


def test_an_eventfd_held_outside_is_refused() -> None:
    def setup() -> tuple[int, int, int]:
        fd, own = os.eventfd(0), os.eventfd(0)
        pid = os.fork()
        if pid == 0:
            os.close(own)
            signal.pause()
        while len(os.listdir(f"/proc/{pid}/fd")) == len(os.listdir("/proc/self/fd")):
            pass
        return fd, own, pid

    with subject(setup) as child, Capture(child.pid) as capture:
        fd, _, grandchild = child.result
        assert f"the eventfd is held by pid {grandchild}" in capture.reasons(fd)


# -- timerfd --------------------------------------------------------------------------------


def timer(clock: int, flags: int, value_ns: int, interval_ns: int = 0) -> int:
    fd = syscall(NR.timerfd_create, clock, os.O_NONBLOCK)
    spec = struct.pack("<4q", *divmod(interval_ns, SECOND), *divmod(value_ns, SECOND))
    syscall(NR.timerfd_settime, fd, flags, spec, None)
    return fd


def left(fd: int) -> tuple[int, int]:
    """(value, interval) in ns."""
    buffer = ctypes.create_string_buffer(32)
    syscall(NR.timerfd_gettime, fd, buffer)
    interval_s, interval_ns, value_s, value_ns = struct.unpack("<4q", buffer.raw)
    return value_s * SECOND + value_ns, interval_s * SECOND + interval_ns


def test_a_relative_timer_keeps_the_time_that_was_left() -> None:
    def setup() -> tuple[int, int, int]:
        return (
            timer(time.CLOCK_MONOTONIC, 0, 1000 * SECOND, 7),
            timer(time.CLOCK_BOOTTIME, ABSTIME, time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 500 * SECOND),
            timer(time.CLOCK_MONOTONIC, 0, 0, 5),
        )

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        kept = {file.index: file.state["value_ns"] for file in files if file.kind == "timerfd"}
        with Rebuilt(capture, files) as new:
            for fd, most, interval in zip(child.result, (1000, 500, 0), (7, 0, 5), strict=True):
                value, found = left(new.fd(fd))
                index = capture.file_at(child.pid, fd)
                assert index is not None
                assert found == interval
                assert value <= kept[index] <= most * SECOND
                assert value >= kept[index] - 60 * SECOND
                for key in ("clockid", "settime"):
                    assert new.info(fd)[key] == capture.view(fd).info[key]


def test_an_absolute_wall_clock_timer_keeps_its_hour() -> None:
    due = time.time_ns() + 5000 * SECOND

    with subject(lambda: timer(time.CLOCK_REALTIME, ABSTIME, due)) as child, Capture(child.pid) as capture:
        files = capture.records()
        (state,) = (file.state for file in files if file.kind == "timerfd")
        assert abs(state["due_ns"] - due) < SECOND // 100
        past = [
            file
            if file.kind != "timerfd"
            else type(file)(index=file.index, kind=file.kind, flags=file.flags, state={**state, "due_ns": 1})
            for file in files
        ]
        with Rebuilt(capture, past) as new:
            select.select([new.fd(child.result)], [], [])  # the kernel finds it out by an interrupt
            assert os.read(new.fd(child.result), 8) == (1).to_bytes(8, "little")


def test_expirations_not_read_yet_are_kept() -> None:
    def setup() -> tuple[int, int]:
        periodic, once = timer(time.CLOCK_MONOTONIC, 0, 1, 1000 * SECOND), timer(time.CLOCK_MONOTONIC, 0, 1)
        for fd in (periodic, once):
            select.select([fd], [], [])
        return periodic, once

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        periodic, once = child.result
        for fd in (periodic, once):
            assert os.read(new.fd(fd), 8) == (1).to_bytes(8, "little")
            with pytest.raises(BlockingIOError):
                os.read(new.fd(fd), 8)
            assert child.call(partial(os.read, fd, 8)) == (1).to_bytes(8, "little")
        assert left(new.fd(once)) == (0, 0)
        value, interval = left(new.fd(periodic))
        assert interval == 1000 * SECOND
        assert 0 < value <= interval


@pytest.mark.root  # alarms that wake the machine
def test_alarm_clocks_and_a_timer_that_only_waits_for_the_clock_to_be_set() -> None:
    """As systemd has one: it never expires, but tells when somebody sets the clock."""
    cancel_on_set, for_ever = 2, 0x7FFF_FFFF_FFFF_FFFF // SECOND * SECOND

    def setup() -> tuple[int, ...]:
        return (
            timer(CLOCK_REALTIME_ALARM, ABSTIME, time.time_ns() + 900 * SECOND),
            timer(CLOCK_BOOTTIME_ALARM, 0, 800 * SECOND, 3),
            timer(time.CLOCK_REALTIME, ABSTIME | cancel_on_set, for_ever),
        )

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for fd in child.result:
            for key in ("clockid", "settime"):
                assert new.info(fd)[key] == capture.view(fd).info[key]
        wall, boot, never = (left(new.fd(fd)) for fd in child.result)
        assert 890 * SECOND < wall[0] <= 900 * SECOND
        assert 790 * SECOND < boot[0] <= 800 * SECOND
        assert boot[1] == 3
        assert never[0] > 1 << 62


def test_many_expirations_of_a_periodic_timer_are_counted() -> None:
    def setup() -> int:
        fd = timer(time.CLOCK_MONOTONIC, 0, 1000, 1000)
        time.sleep(0.01)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        (state,) = (file.state for file in files if file.kind == "timerfd")
        assert state["ticks"] >= 1000
        with Rebuilt(capture, files) as new:
            assert int.from_bytes(os.read(new.fd(child.result), 8), "little") >= state["ticks"]


# -- signalfd and pidfd ---------------------------------------------------------------------


def test_signalfd_mask() -> None:
    def setup() -> int:
        mask = (1 << (signal.SIGUSR1 - 1)) | (1 << (signal.SIGRTMAX - 1))
        return syscall(NR.signalfd4, -1, mask.to_bytes(8, "little"), 8, os.O_NONBLOCK)

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert new.info(child.result)["sigmask"] == capture.view(child.result).info["sigmask"]
        assert fcntl.fcntl(new.fd(child.result), fcntl.F_GETFL) == capture.view(child.result).flags


def test_a_pidfd_of_the_tree_names_the_same_process_again() -> None:
    def setup() -> tuple[int, int, int, int]:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        fd = os.pidfd_open(pid)
        os.set_inheritable(fd, True)
        own = os.pidfd_open(
            os.getpid(), os.PIDFD_NONBLOCK if hasattr(os, "PIDFD_NONBLOCK") else os.O_NONBLOCK
        )
        return fd, os.dup(fd), own, pid

    with subject(setup) as child:
        fd, second, own, grandchild = child.result
        with Capture(child.pid, grandchild) as capture, Rebuilt(capture) as new:
            assert int(new.info(fd)["Pid"][0]) == new.host_pid(grandchild)
            assert int(new.info(second)["Pid"][0]) == new.host_pid(grandchild)
            assert int(new.info(own)["Pid"][0]) == new.host_pid(child.pid)
            assert fcntl.fcntl(new.in_puppet(own), fcntl.F_GETFL) == capture.view(own).flags
        with Capture(child.pid) as capture:
            assert f"the pidfd is of pid {grandchild} (python), outside the tree" in capture.reasons(fd)


@pytest.mark.root
def test_a_pidfd_of_a_zombie() -> None:
    def setup() -> tuple[int, int]:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return os.pidfd_open(pid), pid

    with subject(setup) as child:
        zombie, pid = child.result
        with Capture(child.pid, pid) as capture:
            assert not capture.blockers(zombie)


def exit_code(fd: int) -> int:
    """As PIDFD_GET_INFO tells it."""
    answer = fcntl.ioctl(fd, 0xC040FF0B, struct.pack("<Q56x", 8))
    return int(struct.unpack_from("<i", answer, 60)[0])


def tells_exit_codes() -> bool:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT, since 6.15."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        exit_code(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.skipif(not tells_exit_codes(), reason="this kernel does not tell how a process has ended")
@pytest.mark.parametrize(
    ("ends", "code"), [(lambda: os._exit(7), 0x700), (lambda: os.kill(os.getpid(), 9), 9)]
)
def test_pidfds_of_a_process_that_is_gone(ends: Callable[[], None], code: int) -> None:
    def setup() -> tuple[int, int, int]:
        pid = os.fork()
        if pid == 0:
            ends()
        fd, second = os.pidfd_open(pid), syscall(NR.pidfd_open, pid, os.O_EXCL | os.O_NONBLOCK)
        other = os.fork()
        if other == 0:
            os._exit(0)
        third = os.pidfd_open(other)
        os.waitpid(pid, 0)
        os.waitpid(other, 0)
        return fd, second, third

    before = children_of(os.getpid())
    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        first, second, third = (new.in_puppet(fd) for fd in child.result)
        assert [exit_code(fd) for fd in (first, second, third)] == [code, code, 0]
        assert os.fstat(first).st_ino == os.fstat(second).st_ino != os.fstat(third).st_ino
        for fd in child.result:
            assert new.info(fd)["Pid"] == ["-1"]
            assert fcntl.fcntl(new.in_puppet(fd), fcntl.F_GETFL) == capture.view(fd).flags
        assert select.select([first], [], [], 0)[0] == [first]
    assert children_of(os.getpid()) == before


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP, signal.SIGCHLD, 100])
def test_a_bad_image_says_that_a_process_has_ended_as_none_does(number: int) -> None:
    def setup() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        fd = os.pidfd_open(pid)
        os.waitpid(pid, 0)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        records = capture.records()
        for record in records:
            if record.kind == "pidfd":
                record.state["gone"][1] = int(number)
        with pytest.raises(RebuildError, match=f"no process ends by signal {int(number)}"):
            Rebuilt(capture, records).__enter__()


# -- epoll ----------------------------------------------------------------------------------


def watched(info: dict[str, list[str]]) -> set[tuple[str, ...]]:
    """(number, events, data) of each item."""
    return {(w[0], w[2], w[4]) for w in (line.split() for line in info.get("tfd", []))}


def test_epoll_watches_the_same_files_with_the_same_events_and_data() -> None:
    def setup() -> tuple[int, int, int, int]:
        reader, writer = os.pipe()
        count = os.eventfd(1)
        inner = select.epoll()
        inner.register(reader, select.EPOLLIN | select.EPOLLET)
        outer = select.epoll()
        outer.register(inner, select.EPOLLIN)
        outer.register(count, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        outer.register(writer, select.EPOLLOUT | select.EPOLLONESHOT)
        return os.dup(inner.fileno()), os.dup(outer.fileno()), writer, count

    def keep() -> tuple[int, ...]:
        made = setup()
        kept.append(made)
        return made

    kept: list[tuple[int, ...]] = []
    with subject(keep) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        inner, outer, writer, count = child.result
        for fd in (inner, outer):
            assert watched(new.info(fd)) == watched(capture.view(fd).info)
            assert len(watched(new.info(fd))) in (1, 3)
        with select.epoll.fromfd(os.dup(new.in_puppet(outer))) as poll:
            assert {fd for fd, _ in poll.poll(0)} == {writer, count}
            os.write(new.fd(writer), b"x")
            assert {events for _, events in poll.poll(0)} == {select.EPOLLIN}


def test_an_item_whose_number_was_closed_or_reused_is_found_by_kcmp() -> None:
    def setup() -> tuple[int, int, int, int]:
        poll = syscall(NR.epoll_create1, 0)
        instance = select.epoll.fromfd(os.dup(poll))
        first, second = os.eventfd(1), os.eventfd(0)
        instance.register(first, select.EPOLLIN)
        instance.register(second, select.EPOLLIN)
        kept_first, kept_second = os.dup(first), os.dup(second)
        os.close(first)
        os.dup2(0, second)  # the number names /dev/null now
        instance.close()
        return poll, kept_first, kept_second, second

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        poll, kept_first, kept_second, second = child.result
        assert watched(new.info(poll)) == watched(capture.view(poll).info)
        with select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
            assert len(instance.poll(0)) == 1
            os.eventfd_write(new.fd(kept_second), 1)
            assert len(instance.poll(0)) == 2
            os.eventfd_read(new.fd(kept_first))
            assert [fd for fd, _ in instance.poll(0)] == [second]
        assert os.readlink(f"/proc/{new.host_pid(child.pid)}/fd/{second}") == "/dev/null"
        before, after = capture.view(poll).info["tfd"], new.info(poll)["tfd"]
        assert len(before) == len(after) == 2
        puppet_numbers = {int(n) for n in os.listdir(f"/proc/{new.host_pid(child.pid)}/fd")} - {1000, 1001}
        assert puppet_numbers == {fd for _, fd in capture._tables}


def test_a_reused_number_that_names_a_locked_file_is_refused(tmp_path: Path) -> None:
    def setup() -> int:
        poll = syscall(NR.epoll_create1, 0)
        instance = select.epoll.fromfd(os.dup(poll))
        first = os.eventfd(1)
        instance.register(first, select.EPOLLIN)
        instance.close()
        os.dup(first)
        file = os.open(tmp_path / "locked", os.O_RDWR | os.O_CREAT)
        os.dup2(file, first)
        os.close(file)
        fcntl.lockf(first, fcntl.LOCK_EX)
        return poll

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "a number that now names a file with POSIX locks" in capture.reasons(child.result)


def test_a_number_is_looked_at_in_every_process_that_has_the_instance(tmp_path: Path) -> None:
    """Of two, the number is free in the one and names a locked file in the other: it may be that one that registers."""

    def setup() -> tuple[int, int]:
        poll = syscall(NR.epoll_create1, 0)
        with select.epoll.fromfd(os.dup(poll)) as instance:
            first = os.eventfd(1)
            instance.register(first, select.EPOLLIN)
        os.dup(first)
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            file = os.open(tmp_path / "locked", os.O_RDWR | os.O_CREAT)
            os.dup2(file, first)
            os.close(file)
            fcntl.lockf(first, fcntl.LOCK_EX)
            os.write(done, b"x")
            signal.pause()
        os.read(ready, 1)
        os.close(first)
        return poll, pid

    with subject(setup) as child, Capture(child.pid, child.result[1]) as capture:
        assert "a number that now names a file with POSIX locks" in capture.reasons(child.result[0])


def test_two_items_of_one_number_are_told_apart() -> None:
    def setup() -> tuple[int, int, int]:
        poll = syscall(NR.epoll_create1, 0)
        instance = select.epoll.fromfd(os.dup(poll))
        kept = []
        for count in (0, 5):
            fd = os.eventfd(count)
            kept.append(os.dup(fd))
            os.dup2(fd, 500)
            os.close(fd)
            instance.register(500, select.EPOLLIN)
        instance.close()
        return poll, kept[0], kept[1]

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        poll, quiet, ready = child.result
        assert len(new.info(poll)["tfd"]) == 2
        with select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
            assert len(instance.poll(0)) == 1
            os.eventfd_read(new.fd(ready))
            assert not instance.poll(0)
            os.eventfd_write(new.fd(quiet), 1)
            assert len(instance.poll(0)) == 1


def test_a_one_shot_that_fired_stays_silent() -> None:
    def setup() -> tuple[int, int, int]:
        poll = syscall(NR.epoll_create1, 0)
        instance = select.epoll.fromfd(os.dup(poll))
        ready = os.eventfd(1)
        instance.register(ready, select.EPOLLIN | select.EPOLLONESHOT)
        fired = instance.poll(0)
        assert fired
        other = os.eventfd(1)
        instance.register(other, select.EPOLLIN)
        instance.close()
        return poll, ready, other

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        poll, ready, other = child.result
        assert watched(new.info(poll)) == watched(capture.view(poll).info)
        with select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
            assert [fd for fd, _ in instance.poll(0)] == [other]
            new.inject(child.pid, NR.epoll_ctl, poll, 3, ready, struct.pack("<IQ", select.EPOLLIN, ready))
            assert {fd for fd, _ in instance.poll(0)} == {ready, other}


def test_edges_are_reported_once() -> None:
    """Three pipes: one edge was reported, one comes after the capture, one is waiting in another instance."""

    def setup() -> tuple[int, int, int, int]:
        poll, pending = syscall(NR.epoll_create1, 0), syscall(NR.epoll_create1, 0)
        reader, writer = os.pipe()
        late, _ = os.pipe()
        instance = select.epoll.fromfd(os.dup(poll))
        os.write(writer, b"x")
        for fd in (reader, writer, late):
            instance.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        assert {fd for fd, _ in instance.poll(0)} == {reader, writer}
        instance.close()
        instance = select.epoll.fromfd(os.dup(pending))
        instance.register(reader, select.EPOLLIN | select.EPOLLET)
        instance.register(writer, select.EPOLLOUT)
        instance.close()
        return poll, pending, reader, writer

    with subject(setup) as child, Capture(child.pid) as capture:
        poll, pending, reader, writer = child.result
        records = capture.records()
        with Rebuilt(capture, records) as new:
            for number, expected in ((poll, set()), (pending, {reader, writer})):
                with select.epoll.fromfd(os.dup(new.in_puppet(number))) as instance:
                    assert {fd for fd, _ in instance.poll(0)} == expected
            with select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
                os.write(new.fd(writer), b"y")
                assert {fd for fd, _ in instance.poll(0)} == {reader}
        (state,) = (record.state for record in records if record.index == capture.file_at(child.pid, poll))
        changed = [item for item in state["items"] if item[0] == reader]
        changed[0][4] = 0x40  # as if something else had been reported
        with Rebuilt(capture, records) as new, select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
            assert {fd for fd, _ in instance.poll(0)} == {reader}
        with select.epoll.fromfd(os.dup(capture.view(pending).local)) as instance:
            assert {fd for fd, _ in instance.poll(0)} == {reader, writer}  # at the source nothing has changed


def test_an_edge_that_comes_while_it_is_asked_is_not_taken_for_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """From outside: the tree stands still, who writes to it need not."""

    def setup() -> tuple[int, int, int]:
        poll = syscall(NR.epoll_create1, 0)
        reader, writer = os.pipe()
        with select.epoll.fromfd(os.dup(poll)) as instance:
            instance.register(reader, select.EPOLLIN | select.EPOLLET)
        return poll, reader, writer

    with subject(setup) as child, Capture(child.pid) as capture:
        poll, reader, writer = child.result
        asked = []

        def ask(fd: int, events: int) -> int:
            answer = ready_for(LocalFd(fd), events)
            if not asked:
                os.write(capture.view(writer).local, b"x")
            asked.append(fd)
            return answer

        ready_for = epoll._ready_for
        monkeypatch.setattr(epoll, "_ready_for", ask)
        records = capture.records()
        assert len(asked) == 2
        monkeypatch.undo()
        with Rebuilt(capture, records) as new, select.epoll.fromfd(os.dup(new.in_puppet(poll))) as instance:
            assert instance.poll(0) == [(reader, select.EPOLLIN)]


def test_an_instance_that_watches_mounts_is_not_asked() -> None:
    def setup() -> tuple[int, int]:
        poll = syscall(NR.epoll_create1, 0)
        _, writer = os.pipe()
        mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
        with select.epoll.fromfd(os.dup(poll)) as instance:
            instance.register(writer, select.EPOLLOUT | select.EPOLLET)
            instance.register(mounts, select.EPOLLPRI | select.EPOLLET)
            assert instance.poll(0)
        return poll, mounts

    with subject(setup) as child, Capture(child.pid) as capture:
        view = capture.view(child.result[0])
        state = capture.kind(child.result[0]).capture(view, capture)
        assert [item.reported for item in state.items] == [0, 0]


def test_epoll_of_a_file_that_nobody_here_has_is_refused() -> None:
    def setup() -> tuple[int, int]:
        poll = syscall(NR.epoll_create1, 0)
        instance = select.epoll.fromfd(os.dup(poll))
        fd = os.eventfd(0)
        instance.register(fd, select.EPOLLIN)
        instance.close()
        pid = os.fork()
        if pid == 0:
            os.close(poll)
            signal.pause()
        os.close(fd)
        return poll, fd

    with subject(setup) as child, Capture(child.pid) as capture:
        poll, fd = child.result
        assert f"registered as fd {fd}, that no process of the tree has open" in capture.reasons(poll)


# -- refused --------------------------------------------------------------------------------


def file_of_hugetlbfs() -> int:
    """On a mount of its own."""
    new_mounts, private_and_below = 0x20000, 0x44000
    syscall(NR.unshare, new_mounts)
    syscall(NR.mount, 0, b"/", 0, private_and_below, 0)
    syscall(NR.mount, b"none", b"/mnt", b"hugetlbfs", 0, 0)
    return os.open("/mnt/file", os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        (
            lambda: syscall(NR.io_uring_setup, 2, bytes(120)),
            "(python) uses an io_uring: 2 requests (0 not taken",
        ),
        (lambda: syscall(NR.memfd_secret, 0), "secret memory"),
        (lambda: syscall(NR.landlock_create_ruleset, (1).to_bytes(8, "little"), 8, 0), "Landlock"),
        (file_of_hugetlbfs, "files of hugetlbfs"),
    ],
)
def test_what_is_refused_is_refused_by_name(opening: Callable[[], int], words: str) -> None:
    def setup() -> int | str:
        try:
            return opening()
        except OSError as error:
            return str(error)

    with subject(setup) as child:
        if isinstance(child.result, str):
            pytest.skip(f"this kernel does not make one: {child.result}")
        with Capture(child.pid) as capture:
            (blocker,) = capture.blockers(child.result)
            assert words in str(blocker)
            assert blocker.remedy
            assert f"pid {child.pid} fd {child.result}" in blocker.subject


@pytest.mark.root
def test_block_devices_are_refused() -> None:
    device = next((path for path in Path("/dev").iterdir() if path.is_block_device()), None)
    if device is None:
        pytest.skip("no block device here")
    with subject(lambda: os.open(device, os.O_RDONLY)) as child, Capture(child.pid) as capture:
        assert "block device" in capture.reasons(child.result)
