"""Pages are written to where they belong, whatever is there already, and by whichever way."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.ids import HostPid
from pipeline.image.frames import PageRun
from pipeline.image.schema import AddressSpace, Vma
from pipeline.kernel import userfaultfd
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import Range, open_pagemap, present
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources.memory import fresh as fresh_memory
from pipeline.resources.memory.fresh import Fresh, fresh
from pipeline.stages.fill import write_run
from pipeline.stages.places import MemoryPlace
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump

PAGE = 4096
SCRATCH, AT = 0x7000_0000, 0x1_0000_0000
PAGES = 4096
PRIVATE_ANON, FIXED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10
#: a small mapping behind it
ASIDE = AT + (PAGES + 64) * PAGE
READ_ONLY, NO_ACCESS = (AT + 300 * PAGE, 20), (AT + 400 * PAGE, 20)


def vma(start: int, pages: int, prot: int = 3, advice: tuple[int, ...] = ()) -> Vma:
    return Vma(
        start=start, end=start + pages * PAGE, kind="anon", prot=prot, flags=PRIVATE_ANON, advice=list(advice)
    )


def space(*vmas: Vma, thp_disable: int = 0) -> AddressSpace:
    return AddressSpace(
        space=1, vmas=list(vmas), exe=0, layout=[0] * 11, auxv=b"", thp_disable=thp_disable,
        dumpable=1, coredump_filter=0, rings=[],
    )  # fmt: skip


@contextmanager
def puppet() -> Iterator[Puppet]:
    """One with `PAGES` pages at `AT`, of which some may not be written, or not be touched at all."""
    launcher = spawn_launcher(SCRATCH, 900)
    try:
        child = launcher.clone_task(CLONE.PARENT)
        try:
            child.syscall(NR.mmap, AT, PAGES * PAGE, 3, PRIVATE_ANON | FIXED, -1, 0)
            child.syscall(NR.mmap, ASIDE, 32 * PAGE, 3, PRIVATE_ANON | FIXED, -1, 0)
            for (start, count), prot in ((READ_ONLY, 1), (NO_ACCESS, 0)):
                child.syscall(NR.mprotect, start, count * PAGE, prot)
            yield child
        finally:
            child.kill_and_reap()
    finally:
        launcher.kill_and_reap()
        launcher.stage.channel.close()
    assert not LEDGER.held()


def mappings() -> AddressSpace:
    last = AT + PAGES * PAGE
    edges = [AT, READ_ONLY[0], READ_ONLY[0] + 20 * PAGE, NO_ACCESS[0], NO_ACCESS[0] + 20 * PAGE, last]
    return space(
        *(vma(a, (b - a) // PAGE, p) for a, b, p in zip(edges, edges[1:], (3, 1, 3, 0, 3), strict=False))
    )


def touchable(pid: HostPid) -> list[Range]:
    pagemap = open_pagemap(pid)
    try:
        return present(pagemap, [(AT, AT + PAGES * PAGE)])
    finally:
        os.close(pagemap)


def run_of(
    segments: list[tuple[int, int]], content: bytes, zeros: list[tuple[int, int]] | None = None
) -> PageRun:
    return PageRun(space=1, segments=segments, payload=memoryview(bytearray(content)), zeros=zeros or [])


@pytest.fixture(autouse=True)
def any_mapping_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_memory, "_LARGE_BYTES", PAGE)


@pytest.fixture(params=["fresh", "refused"])
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether pages can be put."""
    if request.param == "refused":

        def refused(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(userfaultfd, "make_inside", refused)
    return bool(request.param == "fresh")


@contextmanager
def opened_in(child: Puppet) -> Iterator[Fresh]:
    found = fresh(child, mappings())
    assert found is not None
    try:
        yield found
    finally:
        found.close()


@contextmanager
def place_in(child: Puppet, is_fresh: bool) -> Iterator[MemoryPlace]:
    found = fresh(child, mappings())
    assert (found is not None) == is_fresh
    try:
        yield MemoryPlace(child.pid, child.memory, found)
    finally:
        if found is not None:
            found.close()


@pytest.mark.parametrize("is_unpacked", [False, True])
def test_every_page_is_where_it_belongs(opened: bool, is_unpacked: bool) -> None:
    """Large and small segments, over pages that are there, may not be written, or not be touched."""
    chosen = random.Random(7)
    with puppet() as child, place_in(child, opened) as place:
        expected = bytearray(PAGES * PAGE)
        for turn in range(3):
            segments, content, at = [], b"", 0
            while at < PAGES - 200:
                at += chosen.randrange(1, 40)
                count = chosen.choice((1, 1, 2, 16, 64, 150))
                if at <= 420 and at + count > 280:
                    at, count = 290, 140  # all that is special, in one segment
                segments.append((AT + at * PAGE, count * PAGE))
                piece = chosen.randbytes(count * PAGE)
                expected[at * PAGE : (at + count) * PAGE] = piece
                content += piece
                at += count
            aside = chosen.randbytes(32 * PAGE)
            segments.append((ASIDE, len(aside)))
            content += aside
            run = run_of(segments, content)
            if is_unpacked:
                run = PageRun(space=1, segments=segments, payload=memoryview(content), zeros=[])
            write_run(place, run)
            assert os.pread(child.memory, len(aside), ASIDE) == aside, f"turn {turn}"
        for start, end in touchable(child.pid):
            found = os.pread(child.memory, end - start, start)
            assert found == expected[start - AT : end - AT]
            expected[start - AT : end - AT] = bytes(end - start)
        assert not any(expected), "a page was not written"


def test_a_page_of_zeros_takes_no_memory_where_none_is(opened: bool) -> None:
    with puppet() as child, place_in(child, opened) as place:
        write_run(place, run_of([(AT + PAGE, 2 * PAGE)], b"x" * 2 * PAGE))
        write_run(place, run_of([], b"", [(AT, 2 * PAGE), (AT + 8 * PAGE, 64 * PAGE)]))
        assert os.pread(child.memory, 2 * PAGE, AT + PAGE) == bytes(PAGE) + b"x" * PAGE
        there = sum(end - start for start, end in touchable(child.pid))
        # who looks whether it is zero maps the kernel's page of zeros, which is nobody's
        assert there == 2 * PAGE or not opened
        assert "Rss" in Path(f"/proc/{child.pid}/smaps_rollup").read_text()


def test_a_page_of_zeros_hides_what_a_file_has(opened: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"f" * 2 * PAGE)
    with puppet() as child, place_in(child, opened) as place:
        with (tmp_path / "file").open("rb") as file:
            (number,) = child.send_fds([file.fileno()])
        child.syscall(NR.mmap, ASIDE, 2 * PAGE, 3, mmap.MAP_PRIVATE | FIXED, number, 0)
        write_run(place, run_of([], b"", [(ASIDE, PAGE)]))
        assert os.pread(child.memory, 2 * PAGE, ASIDE) == bytes(PAGE) + b"f" * PAGE


def test_what_is_missing_behind_it_is_zeros_again() -> None:
    with puppet() as child:
        with opened_in(child) as found:
            assert found.put(AT, memoryview(bytearray(b"a" * 32 * PAGE))) == 32 * PAGE
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(child.memory, PAGE, AT + 32 * PAGE)
            found.close()
        assert os.pread(child.memory, 2 * PAGE, AT + 31 * PAGE) == b"a" * PAGE + bytes(PAGE)


def test_a_child_that_is_born_meanwhile_is_not_watched() -> None:
    with puppet() as child, opened_in(child) as found:
        found.put(AT, memoryview(bytearray(b"a" * 32 * PAGE)))
        other = child.clone_task(CLONE.PARENT)
        try:
            assert os.pread(other.memory, 2 * PAGE, AT + 31 * PAGE) == b"a" * PAGE + bytes(PAGE)
            assert os.pwrite(other.memory, b"b" * PAGE, AT) == PAGE
        finally:
            other.kill_and_reap()
        assert os.pread(child.memory, PAGE, AT) == b"a" * PAGE


def test_nothing_of_it_is_left_in_the_process() -> None:
    with puppet() as child:
        before = os.listdir(f"/proc/{child.pid}/fd")
        with opened_in(child):
            assert os.listdir(f"/proc/{child.pid}/fd") == before
            assert " um" in Path(f"/proc/{child.pid}/smaps").read_text()
        assert " um" not in Path(f"/proc/{child.pid}/smaps").read_text()


@pytest.mark.parametrize(
    ("chosen", "advice", "thp_disable", "is_put"),
    [
        ("always [madvise] never", (), 0, True),
        ("always [madvise] never", (14,), 0, False),
        ("always [madvise] never", (14,), 1, True),
        ("[always] madvise never", (), 0, False),
        ("[always] madvise never", (15,), 0, True),
        ("[always] madvise never", (), 1, True),
        ("always madvise [never]", (14,), 0, True),
        (None, (14,), 0, True),
    ],
)
def test_what_gets_huge_pages_by_itself_is_left_to_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    advice: tuple[int, ...],
    thp_disable: int,
    is_put: bool,
) -> None:
    if chosen is not None:
        (tmp_path / "enabled").write_text(chosen)
    monkeypatch.setattr(fresh_memory, "_HUGE_PAGES", tmp_path / "enabled")
    with puppet() as child:
        found = fresh(child, space(vma(AT, PAGES, advice=advice), thp_disable=thp_disable))
        assert (found is not None) == is_put
        if found is not None:
            found.close()


@pytest.mark.root
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda one: one.name)
def test_large_memory_is_put_below_every_number_of_user_namespaces(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, codec: str
) -> None:
    """There are slower ways, by which it would arrive as well."""
    put_bytes = 0
    put = Fresh.put

    def counted(found: Fresh, at: int, content: memoryview) -> int:
        nonlocal put_bytes
        done = put(found, at, content)
        put_bytes += done
        return done

    monkeypatch.setattr(Fresh, "put", counted)
    tree = start("large", setting, ("0", "20", "64", "64"))
    dump(tree, tmp_path / "image", "--compress", codec)

    async def restored() -> None:
        (await pipeline.restore(str(tmp_path / "image"), detach=True)).close()

    trio.run(restored)
    assert not LEDGER.held()
    tree.check()
    assert put_bytes >= 64 << 20
