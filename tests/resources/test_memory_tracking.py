"""Writes of a process are told while it runs; what cannot be told is said; nothing is left in it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import smaps
from pipeline.kernel.pagemap import (
    PAGE_BYTES,
    Range,
    intersect,
    open_pagemap,
    populated,
    total_bytes,
    written,
)
from pipeline.resources.memory.classify import MAP_DROPPABLE
from pipeline.resources.memory.tracking import Tracking, TrackingLost
from pipeline.stages import freeze
from pipeline.stages.asking import inside

pytestmark = pytest.mark.root

PAGES = 64
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


class Subject:
    """A child that does what it is told with a mapping of `PAGES` pages, of which the first half was written."""

    def __init__(self, acts: dict[str, Callable[[mmap.mmap], object]]) -> None:
        self._ask, theirs = os.pipe()
        mine, self._tell = os.pipe()
        memory = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[: PAGES // 2 * PAGE_BYTES] = b"w" * (PAGES // 2 * PAGE_BYTES)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.pid = HostPid(os.fork())
        if self.pid == 0:
            try:
                for name in iter(lambda: os.read(mine, 64).decode(), "end"):
                    acts[name](memory)
                    os.write(theirs, b"d")
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(mine)

    def do(self, name: str) -> None:
        os.write(self._tell, name.encode())
        assert os.read(self._ask, 1) == b"d"

    def pages(self, runs: list[Range]) -> list[int]:
        """Numbers of those pages of the mapping that are in `runs`."""
        whole = [(self.start, self.start + PAGES * PAGE_BYTES)]
        return [
            (at - self.start) // PAGE_BYTES
            for start, end in intersect(runs, whole)
            for at in range(start, end, PAGE_BYTES)
        ]

    def watched(self) -> bool:
        return any("uw" in mapping.flags for mapping in smaps.smaps(self.pid))

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._ask)


def write(*pages: int) -> Callable[[mmap.mmap], object]:
    def act(memory: mmap.mmap) -> None:
        for page in pages:
            memory[page * PAGE_BYTES] = 1

    return act


def read_file(memory: mmap.mmap) -> None:
    with open("/proc/self/exe", "rb", buffering=0) as file:
        file.readinto(memoryview(memory)[5 * PAGE_BYTES : 6 * PAGE_BYTES])  # type: ignore[attr-defined]


@contextmanager
def tracked(**acts: Callable[[mmap.mmap], object]) -> Iterator[tuple[Subject, Tracking]]:
    subject = Subject(acts)
    try:
        tree = freeze.freeze(subject.pid, suspend_seccomp=True)
        try:
            with inside(subject.pid, [subject.pid]) as task:
                tracking = Tracking(subject.pid, task.syscall)
            found = tracking.collect()
        finally:
            freeze.release(tree)
        try:
            assert subject.pages(found.runs) == list(range(PAGES // 2)), (
                "the first time, all that has content"
            )
            assert not found.unwatched
            yield subject, tracking
        finally:
            tracking.close()
        assert not subject.watched()
        assert "userfaultfd" not in str(
            [os.readlink(one) for one in Path(f"/proc/{subject.pid}/fd").iterdir()]
        )
    finally:
        subject.close()


def test_pages_that_were_written_are_told_once() -> None:
    with tracked(few=write(1, 7, 40), more=write(2)) as (subject, tracking):
        assert subject.watched()
        subject.do("few")
        assert subject.pages(tracking.collect().runs) == [1, 7, 40]
        subject.do("more")
        assert subject.pages(tracking.collect().runs) == [2]
        assert subject.pages(tracking.collect().runs) == []


def test_pages_that_were_not_written_are_known_by_a_look_that_changes_nothing() -> None:
    with tracked(few=write(1, 7, 40)) as (subject, tracking):
        subject.do("few")
        fd = open_pagemap(subject.pid)
        whole = [(subject.start, subject.start + PAGES * PAGE_BYTES)]
        for anonymous in ([], whole):
            found = populated(fd, whole, anonymous)
            assert subject.pages(found.pages) == [*range(PAGES // 2), 40]
            assert subject.pages(found.untouched) == [p for p in range(PAGES // 2) if p not in (1, 7)]
        assert subject.pages(tracking.collect().runs) == [1, 7, 40]
        assert subject.pages(populated(fd, whole).untouched) == [*range(PAGES // 2), 40]
        os.close(fd)
        tracking.check()


def test_what_the_kernel_writes_is_told() -> None:
    with tracked(read=read_file) as (subject, tracking):
        subject.do("read")
        assert subject.pages(tracking.collect().runs) == [5]


def test_what_is_mapped_anew_is_told_whole() -> None:
    made: list[mmap.mmap] = []

    def map_more(memory: mmap.mmap) -> None:
        made.append(mmap.mmap(-1, 33 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        made[0][: 3 << 20] = b"n" * (3 << 20)

    with tracked(map=map_more, none=write()) as (subject, tracking):
        subject.do("map")
        found = tracking.collect()
        assert 3 << 20 <= total_bytes(found.runs) < 33 << 20
        assert not found.unwatched
        subject.do("none")
        assert total_bytes(tracking.collect().runs) < 3 << 20


def test_what_is_moved_is_told_whole_where_it_is_then() -> None:
    to = 0x2000_0000_0000
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def move(memory: mmap.mmap) -> None:
        start, size = ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGES * PAGE_BYTES
        assert libc.mremap(start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to

    with tracked(move=move) as (subject, tracking):
        subject.do("move")
        subject.start = to
        assert subject.pages(tracking.collect().runs) == list(range(PAGES // 2))
        assert subject.pages(tracking.collect().runs) == []


def test_what_is_to_be_told_whole_is_told_although_it_is_protected() -> None:
    with tracked(few=write(1, 7, 40)) as (subject, _):
        subject.do("few")
        pagemap = open_pagemap(subject.pid)
        try:
            whole = subject.start, subject.start + PAGES * PAGE_BYTES
            assert subject.pages(written(pagemap, *whole, whole=True, anonymous=True) or []) == [
                *range(PAGES // 2),
                40,
            ]
            assert written(pagemap, *whole, whole=False, anonymous=True) == [], (
                "what was told is protected again"
            )
        finally:
            os.close(pagemap)


def test_what_the_kernel_does_not_let_be_watched_is_said() -> None:
    kept: list[mmap.mmap] = []

    def map_droppable(memory: mmap.mmap) -> None:
        kept.append(mmap.mmap(-1, PAGES * PAGE_BYTES, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS))
        kept[0][:] = b"d" * (PAGES * PAGE_BYTES)

    with tracked(map=map_droppable) as (subject, tracking):
        subject.do("map")
        for _ in range(2):
            found = tracking.collect()
            assert total_bytes(found.unwatched) == PAGES * PAGE_BYTES
            assert not intersect(found.runs, found.unwatched)


def test_dropped_pages_are_not_told() -> None:
    with tracked(drop=lambda memory: memory.madvise(mmap.MADV_DONTNEED)) as (subject, tracking):
        subject.do("drop")
        assert subject.pages(tracking.collect().runs) == []


def test_another_program_is_no_longer_the_one_that_was_tracked() -> None:
    def execute(memory: mmap.mmap) -> None:
        os.execv("/bin/sleep", ["sleep", "100"])

    with tracked(execute=execute) as (subject, tracking):
        os.write(subject._tell, b"execute")
        while Path(f"/proc/{subject.pid}/comm").read_text() != "sleep\n":
            pass
        with pytest.raises(TrackingLost, match="has executed another program"):
            tracking.collect()
        with pytest.raises(TrackingLost, match="has executed another program"):
            tracking.check()


def test_who_has_ended_is_no_longer_tracked() -> None:
    with tracked() as (subject, tracking):
        os.kill(subject.pid, signal.SIGKILL)
        os.waitid(os.P_PID, subject.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TrackingLost):
            tracking.collect()
