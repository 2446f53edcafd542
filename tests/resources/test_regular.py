"""Files by name and files without one, their positions, flags and locks."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from functools import partial
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.image.schema import FileAttributes, FileIdentity, Id
from pipeline.policy import RestorePolicy
from pipeline.resources import attributes, identity, unnamed
from tests.resources.fdharness import Capture, Rebuilt, kind_of, subject

F_OFD_GETLK, F_OFD_SETLK = 36, 37


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    return file


def flock_bytes(kind: int, start: int, length: int) -> bytes:
    return struct.pack("<hh4xqqi4x", kind, os.SEEK_SET, start, length, 0)


def test_position_flags_and_access_mode_are_kept(path: Path) -> None:
    flags = {
        "read": os.O_RDONLY,
        "append": os.O_WRONLY | os.O_APPEND,
        "sync": os.O_RDWR | os.O_SYNC,
        "dsync": os.O_RDWR | os.O_DSYNC,
        "noatime": os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK,
    }

    def setup() -> dict[str, int]:
        fds = {name: os.open(path, value) for name, value in flags.items()}
        os.lseek(fds["read"], 4, os.SEEK_SET)
        return fds

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture, finish=False) as new:
        for fd in child.result.values():
            assert fcntl.fcntl(new.fd(fd), fcntl.F_GETFL) == capture.view(fd).flags
            assert capture.kind(fd).name == "regular"
        assert os.read(new.fd(child.result["read"]), 3) == b"456"
        assert child.call(partial(os.read, child.result["read"], 3)) == b"456", "the source did not move"


def test_one_description_stays_one_after_dup_and_fork(path: Path) -> None:
    def setup() -> tuple[int, int, int]:
        first = os.open(path, os.O_RDONLY)
        second = os.dup(first)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return first, second, pid

    with subject(setup) as child:
        first, second, grandchild = child.result
        with Capture(child.pid, grandchild) as capture, Rebuilt(capture, finish=False) as new:
            assert capture.file_at(child.pid, first) == capture.file_at(grandchild, second)
            assert len(capture.records()) == 2  # and /dev/null
            assert new.fd(second, grandchild) == new.fd(first)


def test_o_direct_is_kept(path: Path) -> None:
    path.write_bytes(bytes(4096))
    with (
        subject(lambda: os.open(path, os.O_RDONLY | os.O_DIRECT)) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture, finish=False) as new,
    ):
        assert fcntl.fcntl(new.fd(child.result), fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.write_bytes(b"012345678"), "it has 9 bytes, and had 10"),
        (lambda p: os.utime(p, ns=(1, 1)), "it was modified at 0.000000001"),
        (lambda p: (p.unlink(), p.mkdir()), "it is a directory"),
        (lambda p: p.unlink(), "No such file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "it is a FIFO, and was a regular file"),
    ],
)
def test_a_file_that_differs_is_an_error_that_names_it(path: Path, change: object, words: str) -> None:
    with subject(lambda: os.open(path, os.O_RDONLY)) as child, Capture(child.pid) as capture:
        files = capture.records()
        assert callable(change)
        change(path)
        with pytest.raises(RebuildError, match=words) as caught, Rebuilt(capture, files, finish=False):
            pass
        assert str(path) in str(caught.value)


def test_elf_files_are_known_by_build_id_not_by_time() -> None:
    with open("/bin/sh", "rb") as file:
        found = identity.identity(file.fileno())
        assert len(found.build_id) == 20
        older = FileIdentity(found.size_bytes, 5, found.mode, found.build_id)
        assert identity.difference(file.fileno(), older) is None
        other = FileIdentity(found.size_bytes, found.mtime_ns, found.mode, b"\1" * 20)
        assert "build id" in str(identity.difference(file.fileno(), other))


def test_a_damaged_elf_header_is_no_build_id(tmp_path: Path) -> None:
    header = bytearray(Path("/bin/sh").read_bytes()[:64])
    for offset, content in ((32, b"\xff" * 8), (54, b"\xff" * 4)):
        header[offset : offset + len(content)] = content
        (tmp_path / "elf").write_bytes(header)
        with open(tmp_path / "elf", "rb") as file:
            assert identity.build_id(file.fileno()) == b""


def test_another_hard_link_is_found_in_the_same_directory_or_beside_other_open_files(path: Path) -> None:
    def setup() -> tuple[int, int]:
        near, far = os.open(path, os.O_RDWR), os.open(path.with_name("far"), os.O_RDWR | os.O_CREAT)
        os.link(path, path.with_name("other"))
        path.unlink()
        path.write_bytes(b"new")
        elsewhere = path.parent / "elsewhere"
        elsewhere.mkdir()
        os.link(path.with_name("far"), elsewhere / "far")
        path.with_name("far").unlink()
        os.open(elsewhere / "neighbour", os.O_RDWR | os.O_CREAT)
        return near, far

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        near, far = child.result
        for fd in child.result:
            assert capture.kind(fd).name == "regular"
            assert os.path.samestat(os.fstat(new.fd(fd)), capture.view(fd).stat)
        # the old name of one is another file's, that of the other one is free
        assert os.readlink(f"/proc/self/fd/{new.fd(near)}") == str(path.with_name("other"))
        assert os.readlink(f"/proc/self/fd/{new.fd(far)}") == str(path.with_name("far")) + " (deleted)"
        assert path.read_bytes() == b"new"
        assert not path.with_name("far").exists()


def test_a_file_whose_other_hard_link_is_not_found_is_refused(path: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()

    def setup() -> int:
        fd = os.open(path, os.O_RDONLY)
        os.link(path, away / "other")
        path.unlink()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "its name was removed, and other hard links of it are not found" in capture.reasons(
            child.result
        )


def test_a_file_whose_name_ends_in_deleted_is_not_taken_for_deleted(tmp_path: Path) -> None:
    path = tmp_path / "file (deleted)"
    path.write_bytes(b"here")
    with (
        subject(lambda: os.open(path, os.O_RDONLY)) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture, finish=False) as new,
    ):
        assert capture.kind(child.result).name == "regular"
        assert os.read(new.fd(child.result), 9) == b"here"


def test_a_removed_file_whose_name_with_deleted_behind_it_is_another_file(path: Path) -> None:
    def setup() -> int:
        fd = os.open(path, os.O_RDONLY)
        os.link(path, path.with_name("other"))
        path.unlink()
        path.with_name("file (deleted)").touch()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert os.read(new.fd(child.result), 20) == b"0123456789"


def test_leases_are_taken_again_by_the_process(path: Path) -> None:
    def setup() -> tuple[int, int]:
        fd = os.open(path, os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        alone = os.open(path.with_name("alone"), os.O_RDWR | os.O_CREAT)
        fcntl.fcntl(alone, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return fd, alone

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
    with (
        path.open("r+b"),
        pytest.raises(RebuildError, match=r"its lease cannot .*another process has the file"),
    ):
        Rebuilt(capture, files).__enter__()
    with Rebuilt(capture, files) as new:
        kinds = [fcntl.fcntl(new.fd(fd), fcntl.F_GETLEASE) for fd in child.result]
        assert kinds == [fcntl.F_RDLCK, fcntl.F_WRLCK]


def test_a_lease_that_is_being_broken_is_waited_for(path: Path) -> None:
    def setup() -> int:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open(path, os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return fd

    with subject(setup) as child:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        with Capture(child.pid) as capture:
            (blocker,) = capture.blockers(child.result)
            assert blocker.transient
            assert "being broken" in str(blocker)


def test_a_lease_on_a_deleted_file_is_refused_and_not_broken(path: Path) -> None:
    def setup() -> int:
        fd = os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        path.unlink()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "lease on the deleted file" in capture.reasons(child.result)
        with Capture(child.pid) as again:
            assert "BREAK" not in "".join(again.view(child.result).info["lock"])


def test_a_leased_file_for_writing_only_is_not_opened_for_its_build_id(path: Path) -> None:
    def setup() -> int:
        fd = os.open(path, os.O_WRONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert len(capture.records()) == 2
        with Capture(child.pid) as again:
            assert "BREAK" not in "".join(again.view(child.result).info["lock"])


def test_a_leased_file_is_not_opened_for_its_build_id_from_elsewhere(path: Path) -> None:
    """Such as one that is mapped, too; or at the destination, by whomever."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    place = os.open(path, os.O_PATH)
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            assert identity.identity(place).size_bytes == 10
            assert fcntl.fcntl(file, fcntl.F_GETLEASE) == fcntl.F_WRLCK
            assert "BREAK" not in Path(f"/proc/self/fdinfo/{file.fileno()}").read_text()
    finally:
        os.close(place)
        signal.signal(signal.SIGIO, before)


def test_what_is_written_only_may_have_grown_and_nothing_else(path: Path) -> None:
    def setup() -> tuple[int, int]:
        return os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY)

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        (log,) = [file for file in files if file.index == capture.file_at(child.pid, child.result[0])]
        (read,) = [file for file in files if file.index == capture.file_at(child.pid, child.result[1])]
        path.write_bytes(b"0123456789, and more")
        with Rebuilt(capture, [log], finish=False):
            pass
        with pytest.raises(RebuildError, match="it has 20 bytes, and had 10"), Rebuilt(capture, [read]):
            pass
        with Rebuilt(capture, [read], finish=False, policy=RestorePolicy(files="any")):
            pass
        path.write_bytes(b"cut")
        with pytest.raises(RebuildError, match="it has 3 bytes, and had 10"), Rebuilt(capture, [log]):
            pass
        path.unlink()
        path.mkdir()
        with (
            pytest.raises(RebuildError, match="it is a directory"),
            Rebuilt(capture, [read], policy=RestorePolicy(files="any")),
        ):
            pass


# -- locks ----------------------------------------------------------------------------


def test_flock_and_ofd_locks_are_taken_again(path: Path) -> None:
    def setup() -> tuple[int, int]:
        whole, ranges = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
        fcntl.flock(whole, fcntl.LOCK_EX)
        fcntl.fcntl(ranges, F_OFD_SETLK, flock_bytes(fcntl.F_WRLCK, 2, 5))
        fcntl.fcntl(ranges, F_OFD_SETLK, flock_bytes(fcntl.F_RDLCK, 100, 0))
        return whole, ranges

    with subject(setup) as child:
        with Capture(child.pid) as capture:
            files = capture.records()
            with pytest.raises(RebuildError, match="another process holds a lock"), Rebuilt(capture, files):
                pass
    with Rebuilt(capture, files), open(path, "r+b") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        kind, _, start, length, _ = struct.unpack(
            "<hh4xqqi4x", fcntl.fcntl(other, F_OFD_GETLK, flock_bytes(fcntl.F_WRLCK, 0, 50))
        )
        assert (kind, start, length) == (fcntl.F_WRLCK, 2, 5)
        kind, _, start, length, _ = struct.unpack(
            "<hh4xqqi4x", fcntl.fcntl(other, F_OFD_GETLK, flock_bytes(fcntl.F_WRLCK, 50, 1000))
        )
        assert (kind, start, length) == (fcntl.F_RDLCK, 100, 0)
    with open(path, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_shared_with_somebody_outside_is_refused(path: Path) -> None:
    def setup() -> tuple[int, int, int]:
        fd, own = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
        fcntl.fcntl(fd, F_OFD_SETLK, flock_bytes(fcntl.F_WRLCK, 2, 5))
        fcntl.lockf(own, fcntl.LOCK_EX, 100, 100)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return fd, own, pid

    with subject(setup) as child:
        fd, own, grandchild = child.result
        with Capture(child.pid) as capture:
            assert f"its lock is shared with pid {grandchild}" in capture.reasons(fd)
            assert not capture.blockers(own), "a POSIX lock is not inherited"
        with Capture(child.pid, grandchild) as capture:
            assert not capture.blockers(fd)


def test_posix_locks_belong_to_each_process_again(path: Path) -> None:
    def setup() -> tuple[int, int]:
        fd = os.open(path, os.O_RDWR)
        fcntl.lockf(fd, fcntl.LOCK_EX, 3, 1)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            fcntl.lockf(fd, fcntl.LOCK_SH, 4, 50)
            os.close(reader)
            os.close(writer)
            signal.pause()
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        return fd, pid

    with subject(setup) as child:
        fd, grandchild = child.result
        with Capture(child.pid, grandchild) as capture:
            files = capture.records()
    with Rebuilt(capture, files) as new:
        for pid, wanted in ((child.pid, "WRITE"), (grandchild, "READ")):
            (line,) = new.info(fd, pid)["lock"]
            assert line.split()[1:4] == ["POSIX", "ADVISORY", wanted]
        assert new.info(fd, child.pid)["lock"][0].split()[-2:] == ["1", "3"]
        assert new.info(fd, grandchild)["lock"][0].split()[-2:] == ["50", "53"]


# -- without a name ---------------------------------------------------------------------


def test_a_deleted_file_is_carried_and_stays_shared(path: Path) -> None:
    def setup() -> tuple[int, int, int]:
        os.chmod(path, 0o640)
        if not os.getuid():
            os.chown(path, 12, 34)
        writer, reader = os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY)
        path.unlink()
        path.write_bytes(b"another file took the name")
        os.lseek(writer, 0, os.SEEK_END)
        hidden = os.open(path.parent, os.O_TMPFILE | os.O_RDWR)
        os.pwrite(hidden, b"tmpfile", 3)
        return writer, reader, hidden

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        writer, reader, hidden = child.result
        assert {capture.kind(fd).name for fd in child.result} == {"unnamed"}
        os.write(new.fd(writer), b"ABC")
        assert os.read(new.fd(reader), 20) == b"0123456789ABC"
        assert os.pread(new.fd(hidden), 20, 0) == b"\0\0\0tmpfile"
        before, after = capture.view(reader).stat, os.fstat(new.fd(reader))
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(new.fd(writer), 1)
        assert child.call(partial(os.read, reader, 20)) == b"0123456789", "the source has bytes of its own"


def test_modification_time_of_a_deleted_file_is_kept(path: Path) -> None:
    def setup() -> int:
        fd = os.open(path, os.O_RDWR)
        path.unlink()
        os.utime(fd, ns=(5, 1_234_567_890_123_456_789))
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert os.fstat(new.fd(child.result)).st_mtime_ns == 1_234_567_890_123_456_789


def test_attributes_and_access_control_list_of_a_deleted_file_are_kept(path: Path) -> None:
    entries = ((1, 6, -1), (2, 4, 12), (4, 4, -1), (8, 2, 34), (16, 6, -1), (32, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)

    def setup() -> int:
        fd = os.open(path, os.O_RDWR)
        os.setxattr(fd, "user.note", b"x")
        os.setxattr(fd, "system.posix_acl_access", acl)
        path.unlink()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        (file,) = [one for one in files if one.kind == "unnamed"]
        found = msgspec.convert(file.state, unnamed.UnnamedState).attributes
        assert found.user == [(b"user.note", b"x")]
        assert [(one.tag, one.uid, one.gid) for one in found.acl if one.uid or one.gid] == [
            (2, Id(0, 12), None),
            (8, None, Id(0, 34)),
        ]
        path.touch()
        with path.open("r+b") as other:
            attributes.give(other.fileno(), found, lambda one: one.id + 1, lambda one: one.id)
        assert os.getxattr(path, "user.note") == b"x"
        assert struct.pack("<I", 13) in os.getxattr(path, "system.posix_acl_access")


def test_attributes_that_only_the_system_gives_are_not_taken_from_an_image(path: Path) -> None:
    for name in (b"security.capability", b"user.\0x", b"trusted.x"):
        hostile = FileAttributes(user=[(name, b"x" * 20)])
        with open(path, "r+b") as file, pytest.raises(PermissionError, match="no attribute of users"):
            attributes.give(file.fileno(), hostile, lambda one: one.id, lambda one: one.id)


# -- memfd ------------------------------------------------------------------------------


def test_memfd_comes_back_with_name_bytes_and_seals() -> None:
    def setup() -> tuple[int, int]:
        fd = os.memfd_create("shared thing", os.MFD_ALLOW_SEALING)
        os.write(fd, b"hello world")
        os.lseek(fd, 6, os.SEEK_SET)
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return fd, reader

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        fd, reader = child.result
        assert os.readlink(f"/proc/self/fd/{new.fd(fd)}") == "/memfd:shared thing (deleted)"
        assert os.read(new.fd(fd), 5) == b"world"
        os.pwrite(new.fd(fd), b"HELLO", 0)
        assert os.read(new.fd(reader), 5) == b"HELLO"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(new.fd(reader), b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(new.fd(fd), 100)


def test_a_memfd_held_outside_the_tree_is_refused() -> None:
    def setup() -> tuple[int, int]:
        fd = os.memfd_create("shared")
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return fd, pid

    with subject(setup) as child:
        fd, grandchild = child.result
        with Capture(child.pid) as capture:
            assert f"pid {grandchild}" in capture.reasons(fd)
        with Capture(child.pid, grandchild) as capture:
            assert not capture.blockers(fd)


def test_a_deleted_file_called_like_a_memfd_is_a_deleted_file(path: Path) -> None:
    with (
        subject(lambda: (os.open(path, os.O_RDONLY), path.unlink())[0]) as child,
        Capture(child.pid) as capture,
    ):
        view = capture.view(child.result)
        disguised = type(view)(
            view.pid,
            view.fd,
            view.local,
            b"/memfd:file (deleted)",
            view.stat,
            view.info,
            view.flags,
            view.position,
        )
        assert kind_of(disguised).name == "unnamed"


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_file_whose_name_goes_away_while_it_is_looked_at_is_looked_at_again(path: Path, what: str) -> None:
    """Journals of databases do that; what stays so is refused all the same, a moment later."""
    with subject(lambda: os.open(path, os.O_RDWR)) as child, Capture(child.pid) as capture:
        assert capture.view(child.result).link == os.fsencode(path)
        path.rename(path.with_name("moved"))
        if what == "replaced":
            path.write_bytes(b"another")
        (blocker,) = capture.blockers(child.result)
        assert "cannot be opened again by name" in str(blocker)
        assert blocker.transient
