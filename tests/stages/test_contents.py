"""Memory that processes share, where the kernel does not make it."""

from __future__ import annotations

import errno
import os
from typing import Any, Literal

import pytest

from pipeline.errors import ImageError, RebuildError
from pipeline.image.codec import Image
from pipeline.image.schema import Content, SharedMemory
from pipeline.ledger import LEDGER
from pipeline.stages.contents import Contents

#: no kernel has pages of this size
SIZE = 1 << 13


class Launcher:
    pid = 0

    def syscall(self, *_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def make(contents: Contents, shared: SharedMemory) -> None:
    image = Image()
    image.shared_memory[shared.space] = shared
    launcher: Any = Launcher()
    contents.make(image, launcher, lambda _: 0, lambda _: 0)


@pytest.mark.parametrize(("kind", "words"), [("anon", "shared memory"), ("memfd", "a memfd")])
def test_huge_pages_of_a_size_that_is_not_here_are_said(kind: Literal["anon", "memfd"], words: str) -> None:
    contents = Contents()
    shared = SharedMemory(space=1, kind=kind, size_bytes=4 * SIZE, hugetlb=SIZE)
    with pytest.raises(
        RebuildError, match=f"{words} of huge pages of 8 kB, of {4 * SIZE} bytes, cannot be made"
    ):
        make(contents, shared)
    assert not LEDGER.held()


def test_a_size_that_nothing_can_have_is_said() -> None:
    contents = Contents()
    image, launcher = Image(), Launcher()
    image.contents[1] = Content(space=1, size_bytes=0)
    there: Any = launcher
    contents.make(image, there, lambda _: 0, lambda _: 0)
    try:
        image.contents[1] = Content(space=1, size_bytes=1 << 62)
        with pytest.raises(RebuildError, match=r"a file without a name, of \d+ bytes, cannot be made"):
            contents.update(image, there, lambda _: 0, lambda _: 0)
    finally:
        contents.close()
    assert not LEDGER.held()


@pytest.mark.parametrize(("size", "pages"), [(4096, 4097), (2 << 20, 3 << 20), (4097, 2 << 20)])
def test_pages_that_do_not_fill_their_memory_are_damage(size: int, pages: int) -> None:
    from tests.cli import test_inspect

    image = test_inspect.image().image
    with pytest.raises(ImageError, match="bytes in pages of"):
        image.add(SharedMemory(space=99, kind="anon", size_bytes=size, hugetlb=pages))
