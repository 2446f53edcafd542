"""Whether a name leads to the open file: in other mount namespaces, below chroot, under other mounts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.errors import RebuildError
from pipeline.image.schema import PathRef
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, mount, unshare
from pipeline.resources.paths import look_up, misnamed, open_inside, taken_over
from tests.resources.fdharness import Capture, subject

_PRIVATE = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC


def own_mounts(place: Path) -> None:
    """A mount namespace of its own, with a tmpfs at `place`."""
    unshare(CLONE.NEWNS)
    mount(None, b"/", None, _PRIVATE)
    mount(b"none", os.fsencode(place), b"tmpfs", 0)


@pytest.mark.root
def test_a_file_that_only_the_process_can_see_is_found_in_its_mount_namespace(tmp_path: Path) -> None:
    def setup() -> int:
        own_mounts(tmp_path)
        (tmp_path / "inside").write_bytes(b"x")
        return os.open(tmp_path / "inside", os.O_RDONLY)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert not (tmp_path / "inside").exists()
        assert capture.kind(child.result).name == "regular"
        assert not capture.blockers(child.result)


@pytest.mark.root
def test_a_file_below_a_later_mount_is_refused(tmp_path: Path) -> None:
    for name in ("covered", "gone"):
        (tmp_path / name).write_bytes(b"below")

    def setup() -> tuple[int, int]:
        fds = os.open(tmp_path / "covered", os.O_RDONLY), os.open(tmp_path / "gone", os.O_RDONLY)
        own_mounts(tmp_path)
        (tmp_path / "covered").write_bytes(b"above")
        return fds

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "leads to another file now" in capture.reasons(child.result[0])
        assert "does not lead to it any more" in capture.reasons(child.result[1])


@pytest.mark.root
@pytest.mark.parametrize("private", [False, True])
def test_files_of_a_process_below_chroot(tmp_path: Path, private: bool) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "inside").write_bytes(b"x")
    (tmp_path / "outside").write_bytes(b"x")

    def setup() -> tuple[int, int]:
        if private:
            unshare(CLONE.NEWNS)
            mount(None, b"/", None, _PRIVATE)
        outside = os.open(tmp_path / "outside", os.O_RDONLY)
        os.chroot(root)
        return os.open("/inside", os.O_RDONLY), outside

    with subject(setup) as child, Capture(child.pid) as capture:
        inside, outside = child.result
        assert not capture.blockers(inside)
        if private:
            assert "outside the root directory" in capture.reasons(outside)
        else:
            assert not capture.blockers(outside)


@pytest.mark.root
def test_a_link_of_the_process_does_not_lead_out_of_its_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "way").symlink_to("/etc")

    def setup() -> None:
        unshare(CLONE.NEWNS)
        mount(None, b"/", None, _PRIVATE)
        os.chroot(root)

    with subject(setup) as child, pytest.raises(FileNotFoundError):
        look_up(child.pid, os.fsencode(root / "way" / "passwd"))


def test_who_has_the_name_now(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"

    def setup() -> tuple[int, int]:
        first.touch()
        second.touch()
        fds = os.open(first, os.O_RDONLY), os.open(second, os.O_RDONLY)
        first.unlink()
        second.unlink()
        second.touch()
        return fds

    with subject(setup) as child, Capture(child.pid) as capture:
        assert [misnamed(capture.view(fd)) for fd in child.result] == ["its name was removed"] * 2
        assert [taken_over(capture.view(fd)) for fd in child.result] == [False, True]


class _Opener:
    """This process, as one of a tree that opens something and dies."""

    def host_pid(self, _: int) -> int:
        return os.getpid()

    def inject(self, _: int, number: int, *args: Any) -> int:
        if number == NR.openat:
            return os.open(args[1].rstrip(b"\0"), args[2])
        os.close(args[0])
        raise RebuildError("it died")


def test_nothing_is_kept_of_what_a_process_opened_that_died_then(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RebuildError, match="it died"):
        open_inside(1, cast(Any, _Opener()), PathRef(0, os.fsencode(tmp_path / "file")), os.O_RDONLY)
    assert os.listdir("/proc/self/fd") == before
