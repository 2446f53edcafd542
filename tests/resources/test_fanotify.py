"""fanotify groups: flags and marks, privileged and not, and what is refused."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources import fanotify
from tests.resources.fdharness import Capture, Rebuilt, subject

pytestmark = pytest.mark.root

CREATE, OPEN, MODIFY, ON_CHILD, ON_DIR = 0x100, 0x20, 0x2, 0x0800_0000, 0x4000_0000
ADD, IGNORED, SURVIVES, MOUNT, FILESYSTEM, EVICTABLE = 1, 0x20, 0x40, 0x10, 0x100, 0x200
IGNORE, CLONE_NEWNS, CLONE_NEWUSER = 0x400, 0x20000, 0x10000000
CLASS_CONTENT, REPORT_FID, REPORT_DFID_NAME, UNLIMITED_QUEUE = 0x4, 0x200, 0xC00, 0x10
NAMES = REPORT_FID | REPORT_DFID_NAME

#: type and flags, mask, path
Marks = list[tuple[int, int, str]]


def group(flags: int, event_flags: int, marks: Marks) -> int:
    fd = syscall(NR.fanotify_init, flags, event_flags)
    for how, mask, path in marks:
        syscall(NR.fanotify_mark, fd, ADD | how, mask, -100, os.fsencode(path) + b"\0")
    return fd


def lines(info: dict[str, list[str]]) -> list[str]:
    return sorted(" ".join(line.split()[:7]) for line in info["fanotify"])


def events(fd: int) -> list[int]:
    """Masks of the events in the queue; the descriptors that come with them are closed."""
    found = []
    os.set_blocking(fd, False)
    content = os.read(fd, 65536)
    while content:
        size, _, _, mask, opened = struct.unpack_from("<IBxHQi", content)
        found.append(mask)
        if opened >= 0:
            os.close(opened)
        content = content[size:]
    return found


def test_marks_of_every_kind_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    here = str(tmp_path)
    marks = [
        (0, CREATE | ON_DIR | ON_CHILD, here),
        (IGNORED | SURVIVES, OPEN, here),
        (EVICTABLE, MODIFY, f"{here}/file"),
        (IGNORE | SURVIVES, OPEN | ON_CHILD, f"{here}/other"),
        (FILESYSTEM, CREATE, "/dev/shm"),
    ]
    with subject(partial(group, NAMES | UNLIMITED_QUEUE, 0, marks)) as child, Capture(child.pid) as capture:
        with Rebuilt(capture) as new:
            assert lines(new.info(child.result)) == lines(capture.view(child.result).info)
            assert len(lines(new.info(child.result))) == 5
            (tmp_path / "new").mkdir()
            fd = new.in_puppet(child.result)
            assert events(fd) == [CREATE | ON_DIR]
            with pytest.raises(BlockingIOError):  # what the rebuild did is not seen
                os.read(fd, 4096)


def test_a_mount_and_the_flags_of_descriptors(tmp_path: Path) -> None:
    flags = os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC
    with (
        subject(partial(group, 0, flags, [(MOUNT, OPEN, "/dev/shm")])) as child,
        Capture(child.pid) as capture,
        Rebuilt(capture) as new,
    ):
        assert lines(new.info(child.result)) == lines(capture.view(child.result).info)
        fd = new.in_puppet(child.result)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
        os.close(os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY))
        os.close(os.open("/dev/null", os.O_RDONLY))


def test_a_group_of_a_plain_user_stays_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/") and not parent.stat().st_mode & 1:
            parent.chmod(0o711)

    def setup() -> int:
        os.setresuid(1234, 1234, 1234)
        fd = group(REPORT_FID, 0, [(0, CREATE, str(tmp_path))])
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert lines(new.info(child.result)) == lines(capture.view(child.result).info)
        assert teller(new.in_puppet(child.result), tmp_path / "new") == 0

    with (
        subject(partial(group, REPORT_FID, 0, [(0, CREATE, str(tmp_path))])) as child,
        Capture(child.pid) as capture,
    ):
        with Rebuilt(capture) as new:
            assert teller(new.in_puppet(child.result), tmp_path / "newer") > 0


def test_a_group_outlives_the_privileges_it_was_made_with(tmp_path: Path) -> None:
    """As of a daemon that gives them up when it has begun: events come with descriptors, as before."""
    (tmp_path / "file").touch()

    def setup() -> int:
        fd = group(UNLIMITED_QUEUE, os.O_RDONLY, [(0, OPEN, str(tmp_path / "file"))])
        os.setresuid(1234, 1234, 1234)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert lines(new.info(child.result)) == lines(capture.view(child.result).info)
        (tmp_path / "file").read_bytes()
        assert events(new.in_puppet(child.result)) == [OPEN]


@pytest.mark.parametrize("how", [MOUNT, FILESYSTEM])
def test_a_mount_that_another_one_covers_is_not_taken_for_that(tmp_path: Path, how: int) -> None:
    def mount() -> None:
        if libc.mount(b"none", os.fsencode(tmp_path), b"tmpfs", 0, None):
            raise OSError(ctypes.get_errno(), "mount")

    def setup(covered: bool) -> int:
        assert not libc.unshare(CLONE_NEWNS)
        libc.mount(None, b"/", None, 0x44000, None)  # private, and all below
        mount()
        fd = group(0, 0, [(how, OPEN, str(tmp_path))])
        if covered:
            mount()
        return fd

    libc = ctypes.CDLL(None, use_errno=True)
    with subject(partial(setup, False)) as child, Capture(child.pid) as capture:
        assert capture.reasons(child.result) == ""
    with subject(partial(setup, True)) as child, Capture(child.pid) as capture:
        assert "or covers with another" in capture.reasons(child.result)


def teller(fd: int, path: Path) -> int:
    """Who the group says has made a file, which is another process: nobody, if the group is not privileged."""
    child = os.fork()
    if child == 0:
        path.touch()
        os._exit(0)
    os.waitpid(child, 0)
    os.set_blocking(fd, False)
    return int(struct.unpack_from("<i", os.read(fd, 4096), 20)[0])


def test_an_open_file_without_a_name_is_watched_again(tmp_path: Path) -> None:
    path = str(tmp_path / "gone")

    def setup() -> tuple[int, int]:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        fd = group(REPORT_FID, 0, [(0, MODIFY, path)])
        os.unlink(path)
        return fd, file

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        fd, file = child.result
        os.write(new.fd(file), b"x")
        assert events(new.in_puppet(fd)) == [MODIFY]


def unread(where: Path) -> int:
    fd = group(NAMES, 0, [(0, CREATE, str(where))])
    (where / "new").touch()
    return fd


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (lambda _: group(CLASS_CONTENT, 0, []), "is asked for permission"),
        (unread, "has not read"),
        (
            lambda where: (group(REPORT_FID, 0, [(0, MODIFY, str(where))]), where.rmdir())[0],
            "no name is found",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, setup: Callable[[Path], int], says: str) -> None:
    place = tmp_path / "watched"
    place.mkdir()
    keep = os.open(place, os.O_RDONLY)
    try:
        with subject(partial(setup, place)) as child, Capture(child.pid) as capture:
            assert says in capture.reasons(child.result)
    finally:
        os.close(keep)


def test_what_is_gone_at_the_destination_is_named(tmp_path: Path) -> None:
    place = tmp_path / "watched"
    place.mkdir()
    with (
        subject(partial(group, REPORT_FID, 0, [(0, CREATE, str(place))])) as child,
        Capture(child.pid) as capture,
    ):
        records = capture.records()
        place.rmdir()
        with (
            pytest.raises(RebuildError, match=r"a mark cannot be set: .*No such file"),
            Rebuilt(capture, records),
        ):
            pass
        place.touch()
        with pytest.raises(RebuildError, match="another type"), Rebuilt(capture, records):
            pass


@pytest.mark.parametrize("of", ["mount", "filesystem"])
def test_an_image_gives_nobody_more_than_he_may_have(tmp_path: Path, of: str) -> None:
    with (
        subject(partial(group, REPORT_FID, 0, [(0, CREATE, str(tmp_path))])) as child,
        Capture(child.pid) as capture,
    ):
        records = capture.records()
        (state,) = (record.state for record in records if record.kind == "fanotify")
        state["privileged"] = False
        state["marks"][0][0] = of
        with pytest.raises(RebuildError, match="who is not privileged"), Rebuilt(capture, records):
            pass


def test_a_group_of_an_admin_in_a_user_namespace_is_refused(tmp_path: Path) -> None:
    def setup() -> int:
        fd = group(0, 0, [(0, OPEN, str(tmp_path))])
        assert not ctypes.CDLL(None).unshare(CLONE_NEWUSER)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "of an admin is open in a user namespace" in capture.reasons(child.result)


def test_a_privileged_group_of_another_user_namespace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        subject(partial(group, REPORT_FID, 0, [(0, CREATE, str(tmp_path))])) as child,
        Capture(child.pid) as capture,
    ):
        records = capture.records()
        monkeypatch.setattr(fanotify, "_INITIAL_USER_NAMESPACE", 1)
        with pytest.raises(RebuildError, match="user namespace of its own"), Rebuilt(capture, records):
            pass
