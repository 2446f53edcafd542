"""smaps, pagemap, namespaces and mounts, as the kernel tells them."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import mountinfo, nsfs, pagemap, procfs, smaps

ME = HostPid(os.getpid())
PAGE = 4096
#: the number of an ioctl that no pagemap knows
NO_SCAN = 0xC06066FF


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


def test_smaps_and_maps_agree() -> None:
    by_smaps = {m.start: m for m in smaps.smaps(ME)}
    same = [m for m in smaps.maps(ME) if m.start in by_smaps and by_smaps[m.start].end == m.end]
    assert len(same) > 20
    for plain in same:
        full = by_smaps[plain.start]
        assert full[:7] == plain[:7]
        assert not plain.flags
        assert bool(full.prot & 1) == ("rd" in full.flags)
        assert bool(full.prot & 2) == ("wr" in full.flags)
        assert full.shared == ("ms" in full.flags)


def test_a_name_may_look_like_anything(folder: str) -> None:
    name = os.fsencode(folder) + b"/ a\r\x0b\nVmFlags: zz\n\\012 (deleted)"
    fd = os.open(name, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * PAGE)
    with mmap.mmap(fd, PAGE) as area:
        os.close(fd)
        inode = os.stat(name).st_ino
        (found,) = [m for m in smaps.smaps(ME) if m.inode == inode]
        (plain,) = [m for m in smaps.maps(ME) if m.inode == inode]
        assert smaps.exact_name(ME, found) == smaps.exact_name(ME, plain) == name
        assert found.device == os.stat(name).st_dev
        assert "zz" not in found.flags
        area[0] = 1


@pytest.fixture(params=["scan", "entries"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With PAGEMAP_SCAN, where the kernel has it; and as if it had none."""
    if request.param == "entries":
        monkeypatch.setattr(pagemap, "_PAGEMAP_SCAN", NO_SCAN)
    return str(request.param)


def test_populated_pages_with_scan_and_without(way: str) -> None:
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (0, 1, 2, 10, 63):
            area[page * PAGE] = 1
        assert area[20 * PAGE] == 0  # the zero page
        libc = ctypes.CDLL(None)
        guards = [(base + PAGE, base + 2 * PAGE)]
        if libc.madvise(ctypes.c_void_p(base + PAGE), ctypes.c_size_t(PAGE), 102):  # before 6.13
            area.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
            guards = []
        fd = pagemap.open_pagemap(ME)
        pages = [(base + a * PAGE, base + b * PAGE) for a, b in ((0, 1), (2, 3), (10, 11), (63, 64))]
        zeros = (base + 20 * PAGE, base + 21 * PAGE)
        some = [(base, base + 20 * PAGE), (base + 40 * PAGE, base + 64 * PAGE)]
        assert pagemap.populated(fd, some) == (pages, guards, [])
        is_hidden = way == "entries" and os.geteuid() != 0
        seen = sorted([*pages, zeros]) if is_hidden else pages
        assert pagemap.populated(fd, [(base, base + 64 * PAGE)]) == (seen, guards, [])
        assert pagemap.present(fd, [(base + 2 * PAGE, base + 63 * PAGE)]) == [*pages[1:3], zeros]
        os.close(fd)


@pytest.mark.root
def test_pages_that_a_child_shares_are_not_taken_for_that_of_zeros(way: str) -> None:
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        huge = -(-base // (2 << 20)) * (2 << 20) - base
        area.madvise(mmap.MADV_HUGEPAGE)
        assert area[huge] == 0  # the huge page of zeros, or a small one
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(huge + (2 << 20), huge + (4 << 20), PAGE):
            area[at] = 1
        tell, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(told)
            os.read(tell, 1)
            os._exit(0)
        os.close(tell)
        fd = pagemap.open_pagemap(ME)
        found = pagemap.populated(fd, [(base, base + (8 << 20))]).pages
        os.close(fd)
        os.close(told)
        os.waitpid(child, 0)
        assert found == [(base + huge + (2 << 20), base + huge + (4 << 20))], way


@pytest.mark.root
def test_huge_pages_of_zeros_are_none_wherever_they_lie(way: str) -> None:
    size = 1100 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area.madvise(mmap.MADV_HUGEPAGE)
        area[PAGE] = 1  # an end that is no huge page
        assert not any(area[2 << 20 :: PAGE])
        fd = pagemap.open_pagemap(ME)
        found = pagemap.populated(fd, [(base, base + size)]).pages
        os.close(fd)
        assert pagemap.total_bytes(found) <= 2 << 20, way


def test_large_anonymous_memory_is_looked_at_by_itself(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    pages = 600
    with (
        (tmp_path / "file").open("r+b") as file,
        mmap.mmap(file.fileno(), 4 * PAGE, flags=mmap.MAP_PRIVATE) as mapped,
        mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area,
    ):
        area.madvise(mmap.MADV_NOHUGEPAGE)
        starts = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (mapped, area)]
        assert mapped[0] == 0  # a page of the file
        mapped[2 * PAGE] = 1
        area[5 * PAGE] = area[(pages - 1) * PAGE] = 1
        assert area[7 * PAGE] == 0  # the zero page
        fd = pagemap.open_pagemap(ME)
        ranges = sorted([(starts[0], starts[0] + 4 * PAGE), (starts[1], starts[1] + pages * PAGE)])
        found = pagemap.populated(fd, ranges, [(starts[1], starts[1] + pages * PAGE)])
        os.close(fd)
        written = [starts[0] + 2 * PAGE, starts[1] + 5 * PAGE, starts[1] + (pages - 1) * PAGE]
        if way == "entries" and os.geteuid() != 0:
            written.append(starts[1] + 7 * PAGE)
        assert found == ([(at, at + PAGE) for at in sorted(written)], [], [])


@pytest.mark.parametrize("pieces", [16, 3])
def test_large_memory_is_looked_at_in_pieces_from_its_end(
    monkeypatch: pytest.MonkeyPatch, way: str, pieces: int
) -> None:
    """Runs go on across the border of a piece; however large the memory is, there are not more of them than said."""
    monkeypatch.setattr(pagemap, "_PIECE_BYTES", 64 * PAGE)
    monkeypatch.setattr(pagemap, "_PIECES", pieces)
    scanned: list[tuple[int, int]] = []
    scan = pagemap._scan_populated

    def counted(fd: LocalFd, start: int, end: int, is_anonymous: bool) -> list[tuple[int, int, int]]:
        found = scan(fd, start, end, is_anonymous)
        scanned.append((start, end))
        return found

    monkeypatch.setattr(pagemap, "_scan_populated", counted)
    size = 600 * PAGE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area.madvise(mmap.MADV_NOHUGEPAGE)
        written = [(0, 1), (60, 70), (127, 129), (190, 260), (599, 600)]
        for page in (page for start, end in written for page in range(start, end)):
            area[page * PAGE] = 1
        fd = pagemap.open_pagemap(ME)
        found = pagemap.populated(fd, [(base, base + size)], [(base, base + size)]).pages
        os.close(fd)
    assert found == [(base + a * PAGE, base + b * PAGE) for a, b in written]
    # none where the kernel has no PAGEMAP_SCAN
    assert len(scanned) in ((0,) if way == "entries" else (0, 10) if pieces == 16 else (0, 3))
    assert scanned == sorted(scanned, reverse=True)


def test_pagemap_scan_goes_on_where_its_vector_was_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_REGIONS", 7)
    with mmap.mmap(-1, 100 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(0, 100, 2):
            area[page * PAGE] = 1
        fd = pagemap.open_pagemap(ME)
        pages = pagemap.populated(fd, [(base, base + 100 * PAGE)]).pages
        os.close(fd)
        assert pages == [(base + p * PAGE, base + (p + 1) * PAGE) for p in range(0, 100, 2)]


_sets = st.sets(st.integers(0, 60))


def _runs(pages: set[int]) -> list[pagemap.Range]:
    return pagemap.merged((p, p + 1) for p in sorted(pages))


@given(_sets, _sets)
def test_arithmetic_of_ranges(one: set[int], other: set[int]) -> None:
    assert pagemap.intersect(_runs(one), _runs(other)) == _runs(one & other)
    assert pagemap.subtract(_runs(one), _runs(other)) == _runs(one - other)
    assert pagemap.total_bytes(_runs(one)) == len(one)


def test_pagemap_scan_finds_every_run_once_however_many_parts_the_kernel_walks() -> None:
    pages = 3000  # every other one is a run; the kernel hands them over in parts of 512
    body = (
        "import mmap, sys\n"
        f"area = mmap.mmap(-1, {pages} * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area.madvise(mmap.MADV_NOHUGEPAGE)\n"
        f"for page in range(0, {pages}, 2): area[page * 4096] = 1\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        fd = pagemap.open_pagemap(HostPid(child.pid))
        ranges = [(m.start, m.end) for m in smaps.maps(HostPid(child.pid)) if m.name != b"[vsyscall]"]
        runs = pagemap.populated(fd, ranges).pages
        os.close(fd)
        child.kill()
    assert len(runs) > pages // 2
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))


def test_namespaces_of_a_child() -> None:
    body = "import ctypes, sys; assert not ctypes.CDLL(None).unshare(0x14000000); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        pid = HostPid(child.pid)
        ours, theirs = nsfs.keys(ME), nsfs.keys(pid)
        assert {kind for kind in theirs if theirs[kind] != ours[kind]} == {"user", "uts"}
        uts, user = nsfs.open_namespace(pid, "uts"), nsfs.open_namespace(pid, "user")
        held: list[LocalFd] = [uts, user, nsfs.owner(uts), nsfs.parent(user)]
        assert nsfs.key_of(held[2]) == theirs["user"]
        assert nsfs.key_of(held[3]) == ours["user"]
        assert nsfs.owner_uid(user) == os.geteuid()
        assert (nsfs.kind_of(user), nsfs.kind_of(uts)) == (0x10000000, 0x04000000)
        with pytest.raises(OSError) as caught:
            nsfs.owner_uid(uts)
        assert caught.value.errno == errno.EINVAL
        for fd in held:
            os.close(fd)
        child.kill()
    with pytest.raises(procfs.ProcessGone):
        nsfs.keys(pid)


def test_mountinfo_of_ourselves_and_of_odd_lines() -> None:
    mounts = mountinfo.mountinfo(ME)
    assert any(m.point == b"/proc" and m.kind == b"proc" for m in mounts)
    assert all(m.parent in {n.id for n in mounts} or m.point == b"/" for m in mounts)
    line = rb"36 35 98:0 /mnt1 /a\040b\134c rw,noatime shared:7 master:1 new:5 unbindable - fuse.x  rw,errors=continue"
    (mount,) = mountinfo.parse_mountinfo(line + b"\n")
    assert (mount.root, mount.point, mount.device) == (b"/mnt1", b"/a b\\c", os.makedev(98, 0))
    assert (mount.shared, mount.master, mount.propagate_from, mount.unbindable) == (7, 1, 0, True)
    assert (mount.kind, mount.source, mount.super_options) == (b"fuse.x", b"", (b"rw", b"errors=continue"))
