"""A file that a tree goes on writing to while its draft is sent: what is excused, and compared in the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.ids import LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import MappedFile, PathRef
from pipeline.policy import RestorePolicy
from pipeline.resources.identity import identity
from pipeline.stages.files_here import Written

SECOND = 1_000_000_000


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[LocalFd]:
    (tmp_path / "table").write_bytes(b"rows")
    fd = LocalFd(os.open(tmp_path / "table", os.O_RDWR))
    yield fd
    os.close(fd)


def mapped(fd: LocalFd) -> MappedFile:
    """As it is now."""
    return MappedFile(index=3, path=PathRef(0, b"/table"), identity=identity(fd), writable=True)


def age(fd: LocalFd, seconds: int) -> None:
    """Modified so much later than it was."""
    then = os.fstat(fd).st_mtime_ns + seconds * SECOND
    os.utime(fd, ns=(then, then))


def left(written: Written, file: MappedFile, fd: LocalFd) -> list[str]:
    image = Image()
    image.mapped_files[file.index] = file
    return [
        str(one) for one in written.check(image, lambda _path, _flags: LocalFd(os.dup(fd)), RestorePolicy())
    ]


def test_what_is_newer_than_a_draft_says_is_compared_in_the_end(opened: LocalFd) -> None:
    draft, written = mapped(opened), Written(live=True)
    age(opened, 1)
    os.pwrite(opened, b"more rows", 0)
    age(opened, 1)
    assert written.refusal(draft, "same", opened) is None
    assert not left(written, mapped(opened), opened)
    (why,) = left(written, draft, opened)
    assert "mapped file /table: is not what it was: it has 9 bytes, and had 4" in why


def test_nothing_is_excused_of_a_tree_that_stands_still(opened: LocalFd) -> None:
    file = mapped(opened)
    age(opened, 1)
    assert "modified" in str(Written(live=False).refusal(file, "same", opened))


def test_what_is_older_or_is_a_program_is_not_excused(opened: LocalFd) -> None:
    written = Written(live=True)
    file = mapped(opened)
    library = replace(file, identity=replace(file.identity, build_id=b"1234"))
    age(opened, 1)
    assert "build id" in str(written.refusal(library, "same", opened))
    age(opened, -2)
    assert "modified" in str(written.refusal(file, "same", opened))
    assert not left(written, file, opened)
