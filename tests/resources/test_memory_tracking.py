"""Writes of a process are told while it runs; what cannot be told is said; nothing is left in it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import Refused
from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.kernel import hugetlb, smaps, soft_dirty, uffdio
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import (
    PAGE_BYTES,
    Protected,
    Range,
    intersect,
    open_pagemap,
    populated,
    total_bytes,
    written,
)
from pipeline.kernel.syscalls import process_vm_writev, read_memory, syscall
from pipeline.kernel.uffdio import MODE
from pipeline.kernel.userfaultfd import Inside
from pipeline.resources.memory import tracking
from pipeline.resources.memory.classify import MAP_DROPPABLE
from pipeline.resources.memory.tracking import (
    SoftDirty,
    Tracking,
    TrackingLost,
    WriteProtected,
    Written,
)
from pipeline.stages import freeze, grace
from pipeline.stages.asking import inside
from tests.harness.huge_pages import skip_without_pages

pytestmark = pytest.mark.root

Tracked = Callable[..., AbstractContextManager[tuple["Subject", Tracking]]]

PAGES = 64
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PR_SET_PDEATHSIG = 1
MAP_FIXED = 0x10
#: nobody has anything mapped there
MOVED_TO = 0x2000_0000_0000


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
def stopped(pid: HostPid) -> Iterator[None]:
    tree = freeze.freeze(pid, suspend_seccomp=True)
    try:
        yield
    finally:
        freeze.release(tree)


def collect(subject: Subject, tracking: Tracking) -> Written:
    with stopped(subject.pid) if tracking.stands_still else nullcontext():
        return tracking.collect()


def by_write_protection(pid: HostPid, inside: Inside) -> Tracking:
    try:
        return WriteProtected(pid, inside)
    except OSError as error:
        pytest.skip(f"this kernel has no asynchronous write protection: {error}")


def by_soft_dirty_bits(pid: HostPid, inside: Inside) -> Tracking:
    del inside
    if not soft_dirty.is_known():
        pytest.skip("this kernel has no soft-dirty bits")
    return SoftDirty(pid)


@pytest.fixture(params=(by_write_protection, by_soft_dirty_bits))
def tracked(request: pytest.FixtureRequest) -> Tracked:
    return partial(_tracked, request.param)


@pytest.fixture
def write_protected() -> Tracked:
    return partial(_tracked, by_write_protection)


@pytest.fixture
def soft_dirtied() -> Tracked:
    return partial(_tracked, by_soft_dirty_bits)


@contextmanager
def _tracked(
    begin: Callable[[HostPid, Inside], Tracking], **acts: Callable[[mmap.mmap], object]
) -> Iterator[tuple[Subject, Tracking]]:
    subject = Subject(acts)
    try:
        if "first" in acts:
            subject.do("first")
        tracking.prepare([subject.pid])
        with stopped(subject.pid):
            with inside(subject.pid, [subject.pid]) as task:
                watch = begin(subject.pid, task.syscall)
            found = watch.collect()
        try:
            assert subject.pages(found.runs) == list(range(PAGES // 2)), (
                "the first time, all that has content"
            )
            assert not subject.pages(found.unwatched)
            yield subject, watch
        finally:
            watch.close()
        assert not subject.watched()
        assert "userfaultfd" not in str(
            [os.readlink(one) for one in Path(f"/proc/{subject.pid}/fd").iterdir()]
        )
    finally:
        subject.close()


def test_pages_that_were_written_are_told_once(tracked: Tracked) -> None:
    with tracked(few=write(1, 7, 40), more=write(2)) as (subject, tracking):
        assert subject.watched() != tracking.stands_still
        subject.do("few")
        assert subject.pages(collect(subject, tracking).runs) == [1, 7, 40]
        subject.do("more")
        assert subject.pages(collect(subject, tracking).runs) == [2]
        assert subject.pages(collect(subject, tracking).runs) == []


class Writer:
    """A child that writes a page into another process, and waits in that call for the page that it writes from."""

    def __init__(self, pid: HostPid, address: int) -> None:
        mine, theirs = socket.socketpair()
        self.pid = HostPid(os.fork())
        if self.pid == 0:
            try:
                content = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                start = ctypes.addressof(ctypes.c_char.from_buffer(content))
                fd = LocalFd(syscall(NR.userfaultfd, os.O_CLOEXEC))
                uffdio.begin(fd)
                uffdio.register(fd, start, start + PAGE_BYTES, MODE.MISSING)
                socket.send_fds(theirs, [struct.pack("<Q", start)], [fd])
                written = process_vm_writev(pid, [(address, 0, PAGE_BYTES)], memoryview(content))
                theirs.send(struct.pack("<Q", written))
            finally:
                os._exit(0)
        theirs.close()
        self._socket = mine
        message, (self._fd,), _, _ = socket.recv_fds(mine, 8, 1)
        (self._start,) = struct.unpack("<Q", message)
        os.read(self._fd, 32)  # it waits

    def bring_page(self, content: bytes) -> None:
        """Let the call go on: it writes this."""
        uffdio.copy(LocalFd(self._fd), self._start, memoryview(content))

    def written_bytes(self) -> int:
        """What the call returns."""
        return int.from_bytes(self._socket.recv(8), "little")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._fd)
        self._socket.close()


def test_a_write_that_is_under_way_is_there_after_a_grace_period_and_told_no_more(tracked: Tracked) -> None:
    """Told once more by soft-dirty bits: the kernel does not clear those of pinned pages."""
    content = b"n" * PAGE_BYTES
    with tracked() as (subject, tracking):
        address = RemoteAddress(subject.start + 3 * PAGE_BYTES)
        with closing(Writer(subject.pid, address)) as writer:
            assert subject.pages(collect(subject, tracking).runs) == [3]
            with ThreadPoolExecutor(1) as tracer:
                over = tracer.submit(grace.wait, writer.pid)
                with pytest.raises(TimeoutError):
                    over.result(0.02)
                assert read_memory(subject.pid, address, PAGE_BYTES) != content
                writer.bring_page(content)
                over.result()
            assert read_memory(subject.pid, address, PAGE_BYTES) == content
            assert writer.written_bytes() == PAGE_BYTES
            told = subject.pages(collect(subject, tracking).runs)
            assert told == ([3] if tracking.stands_still else []), "who had read it too early has missed it"


def test_a_write_that_nobody_lets_go_on_is_refused_and_goes_on_when_it_may(tracked: Tracked) -> None:
    with tracked() as (subject, _), closing(Writer(subject.pid, subject.start)) as writer:
        with ThreadPoolExecutor(1) as tracer, pytest.raises(Refused, match="in a system call for a page"):
            tracer.submit(grace.wait, writer.pid).result()
        writer.bring_page(b"n" * PAGE_BYTES)
        assert writer.written_bytes() == PAGE_BYTES


def test_pages_that_were_not_written_are_known_by_a_look_that_changes_nothing(tracked: Tracked) -> None:
    with tracked(few=write(1, 7, 40)) as (subject, tracking):
        subject.do("few")
        for _ in range(2):
            untouched = subject.pages(tracking.untouched())
            assert untouched == [page for page in range(PAGES // 2) if page not in (1, 7)]
        assert subject.pages(collect(subject, tracking).runs) == [1, 7, 40]
        assert subject.pages(tracking.untouched()) == [*range(PAGES // 2), 40]
        tracking.check()


def test_whoever_asks_what_has_content_is_told_what_is_untouched(write_protected: Tracked) -> None:
    with write_protected(few=write(1, 7, 40)) as (subject, _):
        subject.do("few")
        fd = open_pagemap(subject.pid)
        whole = [(subject.start, subject.start + PAGES * PAGE_BYTES)]
        for anonymous in ([], whole):
            found = populated(fd, whole, anonymous)
            assert subject.pages(found.pages) == [*range(PAGES // 2), 40]
            assert subject.pages(found.untouched) == [p for p in range(PAGES // 2) if p not in (1, 7)]
        os.close(fd)


def test_what_the_kernel_writes_is_told(tracked: Tracked) -> None:
    with tracked(read=read_file) as (subject, tracking):
        subject.do("read")
        assert subject.pages(collect(subject, tracking).runs) == [5]


def test_what_is_mapped_anew_is_told_whole(tracked: Tracked) -> None:
    made: list[mmap.mmap] = []

    def map_more(memory: mmap.mmap) -> None:
        made.append(mmap.mmap(-1, 33 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        made[0][: 3 << 20] = b"n" * (3 << 20)

    with tracked(map=map_more, none=write()) as (subject, tracking):
        subject.do("map")
        found = collect(subject, tracking)
        assert 3 << 20 <= total_bytes(found.runs) < 33 << 20
        assert not found.unwatched
        subject.do("none")
        assert total_bytes(collect(subject, tracking).runs) < 3 << 20


def move(memory: mmap.mmap, first: int, count: int) -> None:
    """Move some of its pages to where they are if `MOVED_TO` is its start."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    start, to = (
        at + first * PAGE_BYTES for at in (ctypes.addressof(ctypes.c_char.from_buffer(memory)), MOVED_TO)
    )
    size = count * PAGE_BYTES
    assert libc.mremap(start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to


def test_what_is_moved_is_told_whole_where_it_is_then(tracked: Tracked) -> None:
    with tracked(move=lambda memory: move(memory, 0, PAGES)) as (subject, tracking):
        subject.do("move")
        subject.start = MOVED_TO
        assert subject.pages(collect(subject, tracking).runs) == list(range(PAGES // 2))
        assert subject.pages(collect(subject, tracking).runs) == []


def test_a_mapping_that_grows_by_what_is_moved_next_to_it_is_watched_as_one(tracked: Tracked) -> None:
    """The kernel watches neither any longer then, and leaves those pages marked as protected that were so before."""
    with tracked(
        half=lambda memory: move(memory, 0, 16),
        rest=lambda memory: move(memory, 16, PAGES - 16),
        write=lambda _: ctypes.memset(MOVED_TO + 3 * PAGE_BYTES, 3, 1),
    ) as (subject, tracking):
        subject.do("half")
        subject.start = MOVED_TO
        assert subject.pages(collect(subject, tracking).runs) == list(range(16))
        subject.do("rest")
        subject.do("write")
        assert 3 not in subject.pages(tracking.untouched())
        assert 3 in subject.pages(collect(subject, tracking).runs)
        assert subject.pages(tracking.untouched()) == list(range(PAGES // 2))
        subject.do("write")
        assert 3 not in subject.pages(tracking.untouched())
        assert subject.pages(collect(subject, tracking).runs) == [3]


def test_what_is_to_be_told_whole_is_told_although_it_is_protected(write_protected: Tracked) -> None:
    with write_protected(few=write(1, 7, 40)) as (subject, _):
        subject.do("few")
        pagemap = open_pagemap(subject.pid)
        try:
            whole = subject.start, subject.start + PAGES * PAGE_BYTES
            found = written(pagemap, *whole, whole=True, anonymous=True)
            assert found is not None
            assert subject.pages(found.runs) == [*range(PAGES // 2), 40]
            assert subject.pages(found.before) == [page for page in range(PAGES // 2) if page not in (1, 7)]
            found = written(pagemap, *whole, whole=False, anonymous=True)
            assert found == Protected([], []), "what was told is protected again"
        finally:
            os.close(pagemap)


def test_what_the_kernel_does_not_let_be_watched_is_said(write_protected: Tracked) -> None:
    kept: list[mmap.mmap] = []

    def map_droppable(memory: mmap.mmap) -> None:
        kept.append(mmap.mmap(-1, PAGES * PAGE_BYTES, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS))
        kept[0][:] = b"d" * (PAGES * PAGE_BYTES)

    with write_protected(map=map_droppable) as (subject, tracking):
        subject.do("map")
        for _ in range(2):
            found = tracking.collect()
            assert total_bytes(found.unwatched) == PAGES * PAGE_BYTES
            assert not intersect(found.runs, found.unwatched)


def renew(memory: mmap.mmap) -> None:
    """Map other memory in the middle, behind the pages that were written."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 40 * PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    assert libc.mmap(at, 8 * PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == at


def test_what_was_protected_by_a_look_that_failed_is_told_by_the_next(
    write_protected: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails halfway where something is mapped anew meanwhile, twice; what lies before that is protected by then."""
    with write_protected(few=write(1, 7), renew=renew) as (subject, watch):
        subject.do("few")

        def disturbed(pagemap: LocalFd, start: int, end: int, **options: bool) -> Protected | None:
            if start <= subject.start < end:
                subject.do("renew")
            return written(pagemap, start, end, **options)

        with monkeypatch.context() as patched:
            patched.setattr(tracking, "written", disturbed)
            found = watch.collect()
        assert not subject.pages(found.runs)
        assert subject.pages(found.unwatched)[:8] == list(range(8))
        assert {1, 7} <= set(subject.pages(watch.collect().runs))
        assert not subject.pages(watch.collect().runs)


def test_dropped_pages_are_not_told(tracked: Tracked) -> None:
    with tracked(drop=lambda memory: memory.madvise(mmap.MADV_DONTNEED)) as (subject, tracking):
        subject.do("drop")
        assert subject.pages(collect(subject, tracking).runs) == []


def test_another_program_is_no_longer_the_one_that_was_tracked(tracked: Tracked) -> None:
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


def test_who_has_ended_is_no_longer_tracked(tracked: Tracked) -> None:
    with tracked() as (subject, tracking):
        os.kill(subject.pid, signal.SIGKILL)
        os.waitid(os.P_PID, subject.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TrackingLost):
            tracking.collect()


HUGE_BYTES = 2 << 20


def drop_and_read(pages: slice) -> Callable[[mmap.mmap], object]:
    def act(memory: mmap.mmap) -> None:
        start, stop, _ = pages.indices(PAGES)
        memory.madvise(mmap.MADV_DONTNEED, start * PAGE_BYTES, (stop - start) * PAGE_BYTES)
        for page in range(start, stop):
            assert memory[page * PAGE_BYTES] == 0

    return act


def test_pages_that_came_back_as_zeros_are_not_untouched(tracked: Tracked) -> None:
    with tracked(drop=drop_and_read(slice(3, 9)), forked=lambda _: fork_and_wait()) as (subject, tracking):
        subject.do("drop")
        there = [page for page in range(PAGES // 2) if not 3 <= page < 9]
        assert subject.pages(tracking.untouched()) == there
        assert subject.pages(collect(subject, tracking).runs) == []
        assert subject.pages(tracking.untouched()) == there
        # a child that shares them makes none of them look like that of zeros
        subject.do("forked")
        assert subject.pages(tracking.untouched()) == there


def fork_and_wait() -> None:
    """A child that is there until its parent ends."""
    ready, told = os.pipe()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(told, b"!")
        while True:
            signal.pause()
    assert os.read(ready, 1)


def test_a_huge_page_of_zeros_is_not_untouched(soft_dirtied: Tracked) -> None:
    made: list[mmap.mmap] = []

    def map_huge(memory: mmap.mmap) -> None:
        made.append(mmap.mmap(-1, 4 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        made[0].madvise(mmap.MADV_HUGEPAGE)
        made[0][:] = b"h" * len(made[0])

    def drop(memory: mmap.mmap) -> None:
        made[0].madvise(mmap.MADV_DONTNEED)
        assert made[0][::PAGE_BYTES] == bytes(len(made[0]) // PAGE_BYTES)

    with soft_dirtied(map=map_huge, drop=drop) as (subject, tracking):
        before = total_bytes(tracking.untouched())
        subject.do("map")
        assert total_bytes(collect(subject, tracking).runs) >= 4 * HUGE_BYTES
        assert total_bytes(tracking.untouched()) >= before + 4 * HUGE_BYTES - (1 << 20)
        subject.do("drop")
        assert total_bytes(tracking.untouched()) < before + (1 << 20)


def test_one_write_into_a_huge_page_is_one_page(tracked: Tracked) -> None:
    made: list[mmap.mmap] = []

    def map_huge(memory: mmap.mmap) -> None:
        made.append(mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        made[0].madvise(mmap.MADV_HUGEPAGE)
        made[0][:] = b"h" * len(made[0])

    def write_each(memory: mmap.mmap) -> None:
        for at in range(PAGE_BYTES, len(made[0]), HUGE_BYTES):
            made[0][at] = 1

    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this machine makes no huge pages")
    with tracked(first=map_huge, write=write_each) as (subject, tracking):
        subject.do("write")
        assert total_bytes(collect(subject, tracking).runs) < 1 << 20


def map_of_hugetlbfs(memory: mmap.mmap) -> list[mmap.mmap]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | hugetlb.mapping_flags(HUGE_BYTES)
    return [mmap.mmap(-1, 4 * HUGE_BYTES, flags=flags)]


def test_one_write_into_a_page_of_hugetlbfs_is_that_page(tracked: Tracked) -> None:
    """Or the mapping is said not to be watched."""
    skip_without_pages(8)
    made: list[mmap.mmap] = []

    def map_pages(memory: mmap.mmap) -> None:
        made.extend(map_of_hugetlbfs(memory))
        for at in range(0, 3 * HUGE_BYTES, HUGE_BYTES):
            made[0][at] = 1

    def write_one(memory: mmap.mmap) -> None:
        made[0][HUGE_BYTES + 5 * PAGE_BYTES] = 1

    def write_hole(memory: mmap.mmap) -> None:
        made[0][3 * HUGE_BYTES] = 1

    with tracked(first=map_pages, one=write_one, hole=write_hole) as (subject, tracking):
        (start, end) = next((m.start, m.end) for m in smaps.smaps(subject.pid) if "ht" in m.flags)
        for act, page in (("one", 1), ("hole", 3)):
            subject.do(act)
            runs, unwatched = collect(subject, tracking)
            at = start + page * HUGE_BYTES
            untouched = intersect(tracking.untouched(), [(start, end)])
            if isinstance(tracking, WriteProtected):
                assert intersect(runs, [(start, end)]) == [(at, at + HUGE_BYTES)]
                assert not unwatched
                assert total_bytes(untouched) == (3 if act == "one" else 4) * HUGE_BYTES
            else:
                assert unwatched == [(start, end)]
                assert not untouched


def test_pages_that_cannot_be_protected_are_said_not_to_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of hugetlbfs of more than 2 MiB: not every kernel protects them, and none says so."""
    skip_without_pages(4)
    monkeypatch.setattr(tracking, "_PROTECTABLE_BYTES", HUGE_BYTES // 2)
    made: list[mmap.mmap] = []

    def map_pages(memory: mmap.mmap) -> None:
        made.extend(map_of_hugetlbfs(memory))

    with _tracked(by_write_protection, first=map_pages) as (subject, watch):
        (start, end) = next((m.start, m.end) for m in smaps.smaps(subject.pid) if "ht" in m.flags)
        assert collect(subject, watch).unwatched == [(start, end)]


def test_who_looks_at_its_own_bits_is_left_alone() -> None:
    subject = Subject({"open": lambda _: os.open("/proc/self/clear_refs", os.O_WRONLY)})
    try:
        subject.do("open")
        with stopped(subject.pid), pytest.raises(TrackingLost, match="looks at its own writes"):
            SoftDirty(subject.pid)
    finally:
        subject.close()
