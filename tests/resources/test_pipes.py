"""Pipes and FIFOs: bytes, packets, ends that are closed, ends that are elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs
from pipeline.ledger import LEDGER
from pipeline.policy import DumpPolicy
from pipeline.resources import external_end
from pipeline.resources.pump import Pump
from tests.resources.fdharness import Capture, Rebuilt, subject


def polled(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return sum(event for _, event in poll.poll(0))


def test_unread_bytes_are_copied_and_not_consumed() -> None:
    def setup() -> tuple[int, int]:
        reader, writer = os.pipe()
        if not os.getuid():
            os.fchown(reader, 7, 8)
        os.write(writer, b"some")
        os.write(writer, b" bytes")
        return reader, writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        reader, writer = child.result
        for fd in child.result:
            assert fcntl.fcntl(new.fd(fd), fcntl.F_GETFL) == capture.view(fd).flags
        os.write(new.fd(writer), b", and more")
        assert os.read(new.fd(reader), 100) == b"some bytes, and more"
        before, after = capture.view(reader).stat, os.fstat(new.fd(reader))
        assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
        assert child.call(partial(os.read, reader, 100)) == b"some bytes"


def test_a_full_pipe_of_a_megabyte_keeps_capacity_and_every_byte() -> None:
    content = os.urandom(1 << 20)

    def setup() -> tuple[int, int]:
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.set_blocking(writer, False)
        assert os.write(writer, content) == 1 << 20
        return reader, writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        reader, writer = (new.fd(fd) for fd in child.result)
        assert fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) == 1 << 20
        with pytest.raises(BlockingIOError):
            os.write(writer, b"x")
        assert os.read(reader, 1 << 20) == content


def test_a_pipe_full_of_single_bytes_in_many_slots() -> None:
    def setup() -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        for number in range(16):
            os.write(writer, bytes([number]) * (number + 1))
        with pytest.raises(BlockingIOError):
            os.write(writer, b"x")
        return reader, writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        reader, writer = (new.fd(fd) for fd in child.result)
        assert fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_DIRECT
        with pytest.raises(BlockingIOError):
            os.write(writer, b"x")
        for number in range(16):
            assert os.read(reader, 4096) == bytes([number]) * (number + 1)


def test_packets_stay_packets_when_the_mode_was_left() -> None:
    def setup() -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_DIRECT)
        os.write(writer, b"first")
        os.write(writer, b"second")
        fcntl.fcntl(writer, fcntl.F_SETFL, 0)
        return reader, writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        reader, writer = (new.fd(fd) for fd in child.result)
        os.write(writer, b"plain")
        assert [os.read(reader, 100) for _ in range(3)] == [b"first", b"second", b"plain"]


def test_a_pipe_without_writers_ends_after_its_bytes() -> None:
    def setup() -> int:
        reader, writer = os.pipe()
        os.write(writer, b"last words")
        os.close(writer)
        return reader

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        reader = new.fd(child.result)
        assert os.read(reader, 100) == b"last words"
        assert os.read(reader, 100) == b""


def test_a_pipe_without_readers_answers_epipe() -> None:
    def setup() -> int:
        reader, writer = os.pipe()
        os.write(writer, b"never read")
        os.close(reader)
        return writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        with pytest.raises(BrokenPipeError):
            os.write(new.fd(child.result), b"x")


def test_ends_opened_once_more_through_proc() -> None:
    def setup() -> tuple[int, int, int, int]:
        reader, writer = os.pipe()
        both = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)
        second = os.open(f"/proc/self/fd/{reader}", os.O_RDONLY | os.O_NONBLOCK)
        return reader, writer, both, second

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        for fd in child.result:
            assert fcntl.fcntl(new.fd(fd), fcntl.F_GETFL) == capture.view(fd).flags
        _, writer, both, second = (new.fd(fd) for fd in child.result)
        os.write(writer, b"a")
        os.write(both, b"b")
        assert os.read(second, 10) == b"ab"


def test_ends_in_two_processes() -> None:
    def setup() -> tuple[int, int, int]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.write(writer, b"up")
            signal.pause()
        os.close(writer)
        select.select([reader], [], [])
        return reader, writer, pid

    with subject(setup) as child:
        reader, writer, grandchild = child.result
        with Capture(child.pid, grandchild) as capture, Rebuilt(capture, finish=False) as new:
            assert os.read(new.fd(reader), 10) == b"up"
            os.write(new.fd(writer, grandchild), b"!")
            assert os.read(new.fd(reader), 10) == b"!"
        with Capture(child.pid) as capture:
            text = capture.reasons(reader)
            assert f"an end of the pipe is held by pid {grandchild}" in text


def test_an_end_that_only_the_dumper_has_is_refused() -> None:
    mine, theirs = os.pipe()
    try:
        with subject(lambda: os.open(f"/proc/{os.getppid()}/fd/{theirs}", os.O_WRONLY)) as child:
            with Capture(child.pid) as capture:
                assert "the reading end of the pipe is open outside the tree" in capture.reasons(child.result)
        with subject(lambda: os.open(f"/proc/{os.getppid()}/fd/{mine}", os.O_RDONLY)) as child:
            with Capture(child.pid) as capture:
                assert "the writing end of the pipe is open outside the tree" in capture.reasons(child.result)
    finally:
        os.close(mine)
        os.close(theirs)


# -- FIFOs ----------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def test_a_fifo_with_bytes_and_both_ends(fifo: Path) -> None:
    def setup() -> tuple[int, int]:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
        os.write(writer, b"through the fifo")
        return reader, writer

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            files = capture.records()
            flags = [capture.view(fd).flags for fd in child.result]
            with pytest.raises(RebuildError, match="in use"), Rebuilt(capture, files):
                pass
    with Rebuilt(capture, files, finish=False) as new:
        reader, writer = (new.fd(fd) for fd in child.result)
        assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (reader, writer)] == flags
        assert fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) == 8192
        assert os.read(reader, 100) == b"through the fifo"
        os.write(writer, b"x")
        assert os.read(reader, 100) == b"x"
        os.close(os.dup(writer))
        assert not polled(reader) & select.POLLHUP


def test_a_reader_that_still_waits_for_its_first_writer(fifo: Path) -> None:
    with subject(lambda: os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as child:
        with Capture(child.pid) as capture:
            assert polled(capture.view(child.result).local) == 0
            files = capture.records()
    with Rebuilt(capture, files, finish=False) as new:
        assert polled(new.fd(child.result)) == 0


def test_a_reader_whose_writer_went(fifo: Path) -> None:
    def setup() -> int:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"left")
        os.close(writer)
        return reader

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            files = capture.records()
    with Rebuilt(capture, files, finish=False) as new:
        reader = new.fd(child.result)
        assert polled(reader) == select.POLLIN | select.POLLHUP
        assert os.read(reader, 10) == b"left"
        assert polled(reader) == select.POLLHUP


def test_a_fifo_that_is_used_outside_is_refused(fifo: Path) -> None:
    def setup() -> tuple[int, int]:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        pid = os.fork()
        if pid == 0:
            os.closerange(0, 1000)
            os.write(os.open(fifo, os.O_WRONLY), b"x")
            signal.pause()
        select.select([reader], [], [])
        return reader, pid

    with subject(setup) as child:
        reader, grandchild = child.result
        with Capture(child.pid) as capture:
            assert f"an end of the pipe is held by pid {grandchild}" in capture.reasons(reader)
        fifo.rename(fifo.with_name("other"))
        fifo.write_text("another file")
        with Capture(child.pid, grandchild) as capture:
            assert not capture.reasons(reader)  # it goes by its new name


@pytest.mark.parametrize("taken", ["", "file", "directory"])
def test_a_fifo_whose_name_was_removed(fifo: Path, taken: str) -> None:
    """It comes back without a name, and what has the name by now stays as it is."""

    def setup() -> tuple[int, int]:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"without a name")
        os.fchmod(reader, 0o640)
        if not os.getuid():
            os.fchown(reader, 7, 8)
        fifo.unlink()
        return reader, writer

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            files = capture.records()
            before = capture.view(child.result[0])
    if taken == "file":
        fifo.write_text("another file")
    if taken == "directory":
        fifo.parent.rmdir()
    with Rebuilt(capture, files, finish=False) as new:
        reader, writer = (new.fd(fd) for fd in child.result)
        found = os.fstat(reader)
        assert (found.st_mode, found.st_uid, found.st_gid) == (
            before.stat.st_mode,
            before.stat.st_uid,
            before.stat.st_gid,
        )
        assert found.st_ino == os.fstat(writer).st_ino
        assert not found.st_nlink
        if not taken:
            assert os.readlink(f"/proc/self/fd/{reader}") == f"{fifo} (deleted)"
        assert os.read(reader, 100) == b"without a name"
        assert fcntl.fcntl(reader, fcntl.F_GETFL) == before.flags
    assert fifo.parent.exists() == (taken != "directory")
    if taken == "file":
        assert [path.name for path in fifo.parent.iterdir()] == [fifo.name]
        assert fifo.read_text() == "another file"


def test_a_removed_fifo_is_made_where_there_is_room(fifo: Path) -> None:
    """Nothing can be made in the directory that it was in."""

    def setup() -> int:
        fd = os.open(fifo, os.O_RDWR)
        os.write(fd, b"kept")
        fifo.unlink()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        records = capture.records()
        (state,) = (file.state for file in records if file.kind == "fifo")
        state["path"][1] = b"/proc/removed"
        with Rebuilt(capture, records, finish=False) as new:
            assert os.read(new.fd(child.result), 10) == b"kept"


@pytest.mark.parametrize("what", ["file", "hard link", "link"])
def test_what_takes_the_place_of_a_removed_fifo_is_left_alone(
    fifo: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Somebody who may write into the directory is quicker: what he put there does not get owner and mode."""

    def setup() -> int:
        fd = os.open(fifo, os.O_RDWR)
        os.fchmod(fd, 0o666)
        fifo.unlink()
        return fd

    other = fifo.with_name("other")
    os.mknod(other, 0o600 | (stat.S_IFREG if what == "file" else stat.S_IFIFO))
    fd = os.open(other, os.O_RDWR)
    if what == "link":
        other.unlink()

    def put(name: bytes, mode: int, *, dir_fd: int) -> None:
        if what == "link":
            os.symlink(f"/proc/self/fd/{fd}", name, dir_fd=dir_fd)
        elif what == "hard link":
            os.link(other, name, dst_dir_fd=dir_fd)
        else:
            os.rename(other, name, dst_dir_fd=dir_fd)

    try:
        with subject(setup) as child, Capture(child.pid) as capture:
            records = capture.records()
            monkeypatch.setattr(os, "mkfifo", put)
            with pytest.raises(RebuildError, match="cannot be made"), Rebuilt(capture, records, finish=False):
                pass
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    finally:
        os.close(fd)


def test_a_fifo_that_has_another_name_than_the_removed_one_is_refused(fifo: Path) -> None:
    def setup() -> int:
        fd = os.open(fifo, os.O_RDWR)
        os.link(fifo, fifo.with_name("other"))
        fifo.unlink()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "others that it has (hard links) are not known" in capture.reasons(child.result)


@pytest.mark.parametrize("is_held", [True, False])
def test_an_end_outside_of_a_fifo_whose_name_was_removed_has_to_be_given(
    fifo: Path, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    """No other file of that name is taken for it; and who holds it outside may end while that is looked at."""

    def setup() -> int:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        if os.fork() == 0:
            os.closerange(0, 1000)
            os.write(os.open(fifo, os.O_RDWR), b"unread")
            signal.pause()
        select.select([reader], [], [])
        fifo.unlink()
        return reader

    def gone(pid: HostPid, fd: int) -> dict[str, list[str]]:
        raise procfs.ProcessGone(pid)

    policy = DumpPolicy(external_fds=frozenset({"any"}))
    with subject(setup) as child, Capture(child.pid, policy=policy) as capture:
        view = capture.view(child.result)
        assert external_end.claims(view, capture)
        os.mkfifo(fifo.with_name("fifo (deleted)"))
        if not is_held:
            monkeypatch.setattr(procfs, "fdinfo", gone)
        state = external_end.KIND.capture(view, capture)
    assert state.path is None
    assert (state.buffer is None) == is_held


def test_a_fifo_that_waits_for_its_first_writer_is_not_opened_where_it_is_used(fifo: Path) -> None:
    with subject(lambda: os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as child, Capture(child.pid) as capture:
        files = capture.records()
    fd = os.open(fifo, os.O_RDWR)
    try:
        os.write(fd, b"not for it")
        with pytest.raises(RebuildError, match="is in use"), Rebuilt(capture, files, finish=False):
            pass
    finally:
        os.close(fd)


def test_a_removed_fifo_that_waits_for_its_first_writer(fifo: Path) -> None:
    def setup() -> int:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        fifo.unlink()
        return reader

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            files = capture.records()
    with Rebuilt(capture, files, finish=False) as new:
        assert polled(new.fd(child.result)) == 0


def test_pages_of_a_file_that_were_spliced_into_a_pipe(tmp_path: Path) -> None:
    """The pipe holds pages of the page cache: what they said when it was looked at travels."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)

    def setup() -> tuple[int, int]:
        reader, writer = os.pipe()
        file = os.open(path, os.O_RDONLY)
        assert os.splice(file, writer, 5000, offset_src=100) == 5000
        os.close(file)
        return reader, writer

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        assert os.read(new.fd(child.result[0]), 10000) == path.read_bytes()[100:5100]
        assert child.call(partial(os.read, child.result[0], 10000)) == path.read_bytes()[100:5100]


def test_a_pump_that_cannot_be_made_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here, fork = os.getpid(), os.fork

    def only_here() -> int:
        if os.getpid() != here:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", only_here)
    source, writer = os.pipe()
    pump = Pump(LocalFd(source))
    try:
        with pytest.raises(RebuildError, match="cannot be passed on: Resource temporarily unavailable"):
            pump.start()
    finally:
        pump.close()
        os.close(writer)
    assert "pump" not in {kind for kind, _ in LEDGER.held()}


def test_a_notification_pipe_is_refused() -> None:
    try:
        for fd in os.pipe2(os.O_EXCL):
            os.close(fd)
    except OSError as error:
        pytest.skip(f"this kernel has no notification pipes: {error}")
    with subject(partial(os.pipe2, os.O_EXCL)) as child, Capture(child.pid) as capture:
        assert "the kernel itself writes into it" in capture.reasons(child.result[0])
