"""What `compare` lets pass of memory: pages that are zero may go, and nothing else."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.harness import snapshot

pytestmark = pytest.mark.root

PAGE = mmap.PAGESIZE
PAGES = 64
#: pages that were written and are zero
ZEROS = range(8, 24)
#: as much as a running program may take, and a bit
MORE = snapshot.ANONYMOUS_SLACK_KIB * 1024 + 64 * PAGE

Act = Callable[[str], list[str]]


@pytest.fixture
def act() -> Iterator[Act]:
    """Lets a process drop one page, or take more; what is then told of its pages."""
    mine, tell = os.pipe()
    hear, theirs = os.pipe()
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    spare = mmap.mmap(-1, MORE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pid = os.fork()
    if pid == 0:
        try:
            for page in range(PAGES):
                memory[page * PAGE : (page + 1) * PAGE] = bytes([page not in ZEROS]) * PAGE
            os.write(theirs, b".")
            for word in iter(lambda: os.read(mine, 64).decode(), "end"):
                if word == "more":
                    spare[:] = b"m" * MORE
                else:
                    memory.madvise(mmap.MADV_DONTNEED, int(word) * PAGE, PAGE)
                os.write(theirs, b".")
        finally:
            os._exit(0)

    def act(word: str) -> list[str]:
        before = snapshot.take([pid])
        os.write(tell, word.encode())
        assert os.read(hear, 1) == b"."
        lines = snapshot.compare(before, snapshot.take([pid]))
        return [line for line in lines if line.startswith(f"{pid} own pages")]

    try:
        assert os.read(hear, 1) == b"."
        yield act
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (mine, tell, hear, theirs):
            os.close(fd)


def test_a_zero_page_may_go(act: Act) -> None:
    assert act(str(ZEROS[3])) == []


def test_a_page_with_content_may_not_go(act: Act) -> None:
    for page in ZEROS:
        act(str(page))
    (line,) = act(str(ZEROS[0] - 1))
    assert ", 0 of it zero, " in line


def test_no_more_may_come_than_a_running_program_takes(act: Act) -> None:
    (line,) = act("more")
    assert "KiB have become" in line
