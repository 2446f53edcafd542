"""Directories, O_PATH descriptors, devices without state, and files of the kernel's own filesystems."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.tasks import directories
from tests.resources.fdharness import Capture, Rebuilt, subject

libc = ctypes.CDLL(None)
#: who starts the subjects, and is not one of them
PARENT = os.getpid()


def entries(fd: int) -> bytes:
    """One getdents64."""
    buffer = ctypes.create_string_buffer(100)
    size = syscall(NR.getdents64, fd, buffer, 100)
    return buffer.raw[:size]


# -- directories --------------------------------------------------------------------------


def test_reading_a_directory_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"entry{number}").touch()

    def setup() -> int:
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        entries(fd)
        return fd

    with (
        subject(setup) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture, finish=False) as new,
        Rebuilt(capture, finish=False) as again,
    ):
        assert capture.view(child.result).position != 0
        fd = new.fd(child.result)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == capture.view(child.result).flags
        rest = []
        while found := entries(fd):
            rest.append(found)
        beginning = os.open(tmp_path, os.O_RDONLY)
        skipped = entries(beginning)
        whole = []
        while found := entries(beginning):
            whole.append(found)
        os.close(beginning)
        assert rest == whole
        assert skipped not in rest
        assert entries(again.fd(child.result)) == whole[0]


def test_a_directory_that_was_read_must_be_the_same_one(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for number in range(30):
        (place / f"entry{number}").touch()

    def setup() -> tuple[int, int]:
        fd = os.open(place, os.O_RDONLY)
        entries(fd)
        return fd, os.open(place, os.O_RDONLY)

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        place.rename(tmp_path / "old")
        place.mkdir()
        read_from = capture.file_at(child.pid, child.result[0])
        with pytest.raises(RebuildError, match="another directory has its name"), Rebuilt(capture, files):
            pass
        with Rebuilt(capture, [file for file in files if file.index != read_from], finish=False):
            pass


def test_a_removed_directory_is_made_once_more_and_removed(tmp_path: Path) -> None:
    place = tmp_path / "above" / "place"
    place.mkdir(parents=True)
    place.chmod(0o751)

    def setup() -> tuple[int, int]:
        fds = os.open(place, os.O_RDONLY | os.O_DIRECTORY), os.open(place, os.O_RDONLY)
        place.rmdir()
        place.parent.rmdir()
        return fds

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
    for name_is_free in (True, False):
        if not name_is_free:
            place.mkdir(parents=True)
        with Rebuilt(capture, files) as new:
            one, other = (os.fstat(new.fd(fd)) for fd in child.result)
            assert os.path.samestat(one, other)
            assert (one.st_nlink, stat.S_IMODE(one.st_mode)) == (0, 0o751)
            above = os.readlink(f"/proc/self/fd/{new.fd(child.result[0])}")
            assert above.startswith(str(place) if name_is_free else f"{place.parent}/.place.")
            with pytest.raises(FileNotFoundError):
                os.mkdir("new", dir_fd=new.fd(child.result[0]))
        assert os.listdir(tmp_path) == ([] if name_is_free else ["above"])
    assert os.listdir(place.parent) == ["place"]


def test_a_removed_directory_in_which_somebody_makes_something_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "above" / "place"
    place.mkdir(parents=True)

    def setup() -> int:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        place.rmdir()
        place.parent.rmdir()
        return fd

    def occupied(name: bytes, dir_fd: int) -> None:
        if name == b"place":
            os.close(os.open(b"place/new", os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))
        rmdir(name, dir_fd=dir_fd)

    rmdir = os.rmdir
    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patched:
            patched.setattr(os, "rmdir", occupied)
            with pytest.raises(RebuildError, match="cannot be made again: Directory not empty"):
                Rebuilt(capture, files, finish=False).__enter__()
        assert os.listdir("/proc/self/fd") == before


def test_dnotify_is_refused(tmp_path: Path) -> None:
    def setup() -> int:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open(tmp_path, os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_MULTISHOT | fcntl.DN_CREATE)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "it tells of changes by signals (F_NOTIFY)" in capture.reasons(child.result)


def test_a_directory_lock_is_kept(tmp_path: Path) -> None:
    def setup() -> int:
        fd = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        files = capture.records()
    with Rebuilt(capture, files):
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


def _own_mounts() -> None:
    assert libc.unshare(0x20000) == 0
    assert libc.mount(None, b"/", None, 0x44000, None) == 0


def _mount_tmpfs(place: Path) -> None:
    assert libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, None) == 0


@pytest.mark.root
def test_what_is_on_a_mount_that_is_gone_is_refused(tmp_path: Path) -> None:
    def setup() -> tuple[int, int]:
        _own_mounts()
        _mount_tmpfs(tmp_path)
        (tmp_path / "below").mkdir()
        fds = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), os.open(tmp_path / "below", os.O_RDONLY)
        os.chdir(tmp_path / "below")
        assert libc.umount2(os.fsencode(tmp_path), 2) == 0
        return fds

    with subject(setup) as child, Capture(child.pid) as capture:
        for fd in child.result:
            assert "its mount was taken away (umount -l)" in capture.reasons(fd)
        (blocker,) = directories.check(child.pid)
        assert "its working directory /below cannot be found again" in str(blocker)


@pytest.mark.root
def test_a_mount_of_ours_is_not_gone_where_another_namespace_has_a_file_of_it(tmp_path: Path) -> None:
    def setup() -> int:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        _own_mounts()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        (tmp_path / "file").unlink()  # behind the look at the descriptor
        reasons = capture.reasons(child.result)
    assert "its name does not lead to it any more" in reasons
    assert "umount -l" not in reasons


@pytest.mark.root
def test_what_a_mount_hides_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def setup() -> tuple[int, int]:
        _own_mounts()
        fds = os.open(tmp_path / "file", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)
        os.chdir(tmp_path)
        _mount_tmpfs(tmp_path)
        return fds

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "its name does not lead to it any more" in capture.reasons(child.result[0])
        assert "leads to another file now (covered by a mount" in capture.reasons(child.result[1])
        (blocker,) = directories.check(child.pid)
        assert "leads to another file now" in str(blocker)


# -- O_PATH ---------------------------------------------------------------------------------


def test_o_path_descriptors_lead_to_the_same_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")

    def setup() -> tuple[int, int, int]:
        return (
            os.open(tmp_path, os.O_PATH | os.O_DIRECTORY),
            os.open(tmp_path / "file", os.O_PATH),
            os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW),
        )

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        for fd in child.result:
            assert capture.kind(fd).name == "path"
            assert os.path.samestat(os.fstat(new.fd(fd)), capture.view(fd).stat)
            assert fcntl.fcntl(new.fd(fd), fcntl.F_GETFL) == capture.view(fd).flags
        assert os.readlink("", dir_fd=new.fd(child.result[2])) == "file"


def test_o_path_of_a_removed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with (
        subject(lambda: (os.open(path, os.O_PATH), path.unlink())[0]) as child,
        Capture(child.pid) as capture,
    ):
        assert "its name was removed" in capture.reasons(child.result)


def test_o_path_to_another_type_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "place"
    path.mkdir()
    with subject(lambda: os.open(path, os.O_PATH)) as child, Capture(child.pid) as capture:
        files = capture.records()
        path.rmdir()
        path.touch()
        with (
            pytest.raises(RebuildError, match="it is a regular file, and was a directory"),
            Rebuilt(capture, files),
        ):
            pass


# -- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
def test_devices_without_state(name: str) -> None:
    with (
        subject(lambda: os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK)) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture, finish=False) as new,
    ):
        fd = child.result
        assert os.fstat(new.fd(fd)).st_rdev == os.stat(f"/dev/{name}").st_rdev
        assert fcntl.fcntl(new.fd(fd), fcntl.F_GETFL) == capture.view(fd).flags


@pytest.mark.root
def test_a_device_whose_node_is_gone_is_opened_from_the_host(tmp_path: Path) -> None:
    node = tmp_path / "nothing"
    os.mknod(node, 0o666 | 0o020000, os.makedev(1, 3))
    with subject(lambda: os.open(node, os.O_WRONLY)) as child, Capture(child.pid) as capture:
        files = capture.records()
        node.unlink()
        with Rebuilt(capture, files, finish=False) as new:
            assert os.readlink(f"/proc/self/fd/{new.fd(child.result)}") == "/dev/null"
        node.write_bytes(b"a file now")
        with Rebuilt(capture, files, finish=False) as new:
            assert os.readlink(f"/proc/self/fd/{new.fd(child.result)}") == "/dev/null"


@pytest.mark.root
def test_other_devices_are_refused() -> None:
    with subject(lambda: os.open("/dev/kmsg", os.O_RDONLY)) as child, Capture(child.pid) as capture:
        assert "character device 1:11 has a state of its own" in capture.reasons(child.result)


@pytest.mark.root
def test_kmsg_for_writing_has_no_state() -> None:
    with subject(lambda: os.open("/dev/kmsg", os.O_WRONLY)) as child, Capture(child.pid) as capture:
        assert capture.kind(child.result).name == "device"
        with Rebuilt(capture, finish=False) as new:
            assert os.fstat(new.fd(child.result)).st_rdev == os.makedev(1, 11)
        records = [
            msgspec.structs.replace(file, flags=os.O_RDONLY) if file.state.get("minor") == 11 else file
            for file in capture.records()
        ]
        with pytest.raises(RebuildError, match="1:11 is not one without state"), Rebuilt(capture, records):
            pass


# -- /proc and /sys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/proc/cpuinfo", "/proc/sys/kernel/ostype", "/sys/kernel/mm/transparent_hugepage/enabled"]
)
def test_files_about_the_system_are_opened_again(path: str) -> None:
    def setup() -> int:
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 3)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert capture.kind(child.result).name == "kernel-file"
        assert os.read(new.fd(child.result), 4) == Path(path).read_bytes()[3:7]


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        (lambda: os.open(f"/proc/{PARENT}/status", os.O_RDONLY), "which is not part of the tree"),
        (lambda: os.open(f"/proc/{PARENT}/task", os.O_RDONLY), "which is not part of the tree"),
        (lambda: os.open(f"/proc/{PARENT}", os.O_PATH), "which is not part of the tree"),
        pytest.param(
            lambda: os.open("/proc/pressure/cpu", os.O_RDWR),
            "is remembered for the open file",
            marks=pytest.mark.root,
        ),
        pytest.param(
            lambda: os.open("/proc/irq/default_smp_affinity", os.O_WRONLY),
            "open for writing",
            marks=pytest.mark.root,
        ),
        pytest.param(
            lambda: os.open("/proc/kmsg", os.O_RDONLY), "what was read of this", marks=pytest.mark.root
        ),
    ],
)
def test_other_files_of_the_kernel_are_refused(opening: Callable[[], int], words: str) -> None:
    with subject(opening) as child, Capture(child.pid) as capture:
        assert words in capture.reasons(child.result)


@pytest.mark.root
def test_files_of_the_kernel_are_opened_for_writing_where_that_has_no_effect() -> None:
    def setup() -> list[int]:
        names = ("/proc/sys/kernel/hostname", "/proc/self/oom_score_adj", "/sys/kernel/mm/ksm/run")
        return [os.open(name, os.O_WRONLY) for name in names]

    with subject(setup) as child, Capture(child.pid) as capture:
        assert not [reason for fd in child.result for reason in capture.blockers(fd)]
        with Rebuilt(capture) as new:
            for fd in child.result:
                assert os.fsencode(os.readlink(f"/proc/self/fd/{new.fd(fd)}")) == capture.view(fd).link


def test_a_file_about_a_process_that_has_ended_is_refused() -> None:
    def setup() -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "cannot be opened again by name" in capture.reasons(child.result)


def test_the_proc_directory_itself_is_carried() -> None:
    with (
        subject(lambda: (fd := os.open("/proc", os.O_RDONLY), entries(fd))[0]) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture, finish=False) as new,
    ):
        assert entries(new.fd(child.result))
