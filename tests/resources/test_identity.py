"""What identifies a file: a build id that was read before is only used for the same file."""

from __future__ import annotations

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
