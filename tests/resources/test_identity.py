"""What identifies a file: a build id that was read before is only used for the same file."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from pipeline.resources import identity as subject

_OLD_S = 1_000_000_000


def _identity(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        return subject.identity(fd).build_id
    finally:
        os.close(fd)


def test_build_id_of_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size and its time of modification stay."""
    monkeypatch.setattr(subject, "_SETTLED_NS", -1)
    path = tmp_path / "file"
    shutil.copy("/bin/true", path)
    os.utime(path, (_OLD_S, _OLD_S))
    before = _identity(path)
    assert before
    with path.open("r+b") as file:
        at = path.read_bytes().index(before)
        file.seek(at)
        file.write(bytes(len(before)))
    os.utime(path, (_OLD_S, _OLD_S))
    assert _identity(path) == bytes(len(before))


def test_build_id_is_read_once_where_nothing_changes() -> None:
    path = Path(os.path.realpath("/bin/true"))
    found = _identity(path)
    result = path.stat()
    key = (result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns, result.st_ctime_ns)
    assert subject._READ[key] == found
    assert _identity(path) == found


def test_leases_read_ahead_are_good_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDONLY)
    leased = os.open(path, os.O_RDONLY)
    try:
        assert not subject.is_leased(fd)
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        assert subject.is_leased(fd)
        monkeypatch.setattr(subject, "_AHEAD_S", 3600)
        subject.read_leases_ahead()
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        assert subject.is_leased(fd)
        monkeypatch.setattr(subject, "_AHEAD_S", 0)
        subject.read_leases_ahead()
        assert not subject.is_leased(fd)
    finally:
        os.close(leased)
        os.close(fd)


def test_no_file_is_opened_for_a_build_id_that_nobody_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    fd = os.open(path, os.O_PATH)
    try:
        found = subject.identity(fd)
        assert not found.build_id
        monkeypatch.setattr(subject, "is_leased", lambda _: pytest.fail("it is about to be opened"))
        monkeypatch.setattr(subject, "_READ", {})
        assert subject.difference(fd, found) is None
        path.write_bytes(b"other text")
        assert "has 10 bytes" in (subject.difference(fd, found) or "")
    finally:
        os.close(fd)
