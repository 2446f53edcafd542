"""Reading pages of real programs, and what a child shares with its parent."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import AddressSpace
from pipeline.kernel.pagemap import Range, intersect, subtract, total_bytes
from pipeline.kernel.procfs import ProcessGone
from pipeline.resources.memory import sharing
from pipeline.resources.memory.capture import Captured, capture_address_space
from pipeline.resources.memory.objects import MemoryObjects
from pipeline.resources.memory.pages import (
    data_runs,
    differing_runs,
    nonzero_runs,
    pieces,
    read_file_runs,
    read_runs,
    read_shared,
)
from tests.resources.memorytarget import Program, Scope, program, rests_in

PAGE = 4096


def gathered(pid: HostPid, runs: list[Range], buffer_bytes: int) -> dict[int, bytes]:
    """Every page that `read_runs` brings, by address."""
    buffer = bytearray(buffer_bytes)
    found: dict[int, bytes] = {}
    for segments, count in read_runs(pid, runs, buffer):
        assert count == sum(length for _, length in segments) <= buffer_bytes
        at = 0
        for address, length in segments:
            for page in range(0, length, PAGE):
                assert address + page not in found
                found[address + page] = bytes(buffer[at + page : at + page + PAGE])
            at += length
    return found


def test_pieces_are_bounded_and_complete() -> None:
    runs = [(0, PAGE), (3 * PAGE, 10 * PAGE), *((p * PAGE, (p + 1) * PAGE) for p in range(20, 5000, 2))]
    cut = list(pieces(runs, 8 * PAGE))
    assert all(sum(length for _, length in piece) <= 8 * PAGE for piece in cut)
    assert max(len(piece) for piece in pieces(runs, 1 << 30)) == 1024
    again = [(a, a + n) for piece in cut for a, n in piece]
    assert subtract(runs, again) == subtract(again, runs) == []


@pytest.mark.parametrize("buffer_pages", [1, 7, 4096])
def test_scattered_pages_and_forbidden_ones(buffer_pages: int) -> None:
    body = """
address = mmap(4000)
madvise(address, 4000, 15)
for page in range(0, 4000, 3): write(address + page * P, b"page %d" % page)
for page in range(0, 4000, 300): mprotect(address + page * P, 2, 0)
ready(address=address)
"""
    with program(body) as target:
        base = target["address"]
        runs = [(base + p * PAGE, base + (p + 1) * PAGE) for p in range(0, 4000, 3)]
        found = gathered(target.pid, runs, buffer_pages * PAGE)
        assert len(found) == len(runs)
        for page in range(0, 4000, 3):
            assert found[base + page * PAGE] == (b"page %d" % page).ljust(PAGE, b"\0")


def test_what_cannot_be_read_is_an_error_that_says_where() -> None:
    with program("address = mmap(4); call(11, address + P, P)\nready(address=address)") as target:
        hole = target["address"] + PAGE
        with pytest.raises(OSError, match=f"page at {hole:#x}"):
            gathered(target.pid, [(target["address"], target["address"] + 4 * PAGE)], 1 << 16)
        pid = target.pid
    with pytest.raises(ProcessGone):
        gathered(pid, [(hole, hole + PAGE)], 1 << 16)


def test_memory_is_read_as_the_program_has_it() -> None:
    body = """
import random
random.seed(7)
address = mmap(2000); write(address, random.randbytes(2000 * P))
ready(address=address)
"""
    expected = random.Random(7).randbytes(2000 * PAGE)
    with program(body) as target:
        runs = [(target["address"], target["address"] + 2000 * PAGE)]
        found = gathered(target.pid, runs, 1 << 20)
        assert b"".join(found[address] for address in sorted(found)) == expected


def test_data_of_a_sparse_memfd_with_an_odd_size() -> None:
    fd = LocalFd(os.memfd_create("sparse"))
    os.pwrite(fd, b"one", 10 * PAGE + 5)
    os.pwrite(fd, b"end", 100 * PAGE)
    runs = data_runs(fd, os.fstat(fd).st_size)
    assert runs == [(10 * PAGE, 11 * PAGE), (100 * PAGE, 101 * PAGE)]
    buffer = bytearray(8 * PAGE)
    ((segments, count),) = [(list(s), n) for s, n in read_file_runs(fd, runs, buffer)]
    assert segments == [(10 * PAGE, PAGE), (100 * PAGE, PAGE)]
    assert buffer[:count] == bytes(5) + b"one" + bytes(PAGE - 8) + b"end" + bytes(PAGE - 3)
    assert data_runs(fd, 0) == []
    os.close(fd)


def test_comparing_in_large_pieces_finds_every_page() -> None:
    one, other = bytearray(600 * PAGE), bytearray(600 * PAGE)
    for page in (0, 1, 77, 256, 599):
        other[page * PAGE + page] = 1
    expected = [(0, 2 * PAGE), *((p * PAGE, (p + 1) * PAGE) for p in (77, 256, 599))]
    assert differing_runs(one, other, len(one)) == expected
    assert nonzero_runs(other, len(other)) == expected
    assert nonzero_runs(one, len(one)) == []


@pytest.mark.root
def test_shared_memory_is_read_without_moving_the_targets_position() -> None:
    body = """
fd = os.memfd_create("m"); os.write(fd, b"a" * P * 3); os.lseek(fd, 17, 0)
address = mmap(3, flags=SHARED, fd=fd)
ready(fd=fd)
"""
    with program(body) as target, Scope() as scope, MemoryObjects(scope) as objects:
        capture_address_space(target.pid, objects, brk=0)
        (shared,) = objects.shared_memory
        buffer = bytearray(PAGE)
        assert [list(s) for s, _ in read_shared(shared, buffer)] == [[(p * PAGE, PAGE)] for p in range(3)]
        with open(f"/proc/{target.pid}/fdinfo/{target['fd']}") as info:
            assert info.readline() == "pos:\t17\n"


# -- copy on write ---------------------------------------------------------------------------

FORKED = """
base = mmap(1000); madvise(base, 1000, 15); write(base, b"p" * 600 * P)
only_parent = mmap(4); write(only_parent, b"x" * 4 * P)
if child := os.fork():
    write(base + 50 * P, b"parent changed this")
    ready(base=base, only_parent=only_parent, child=child)
for page in (3, 4, 100, 599): write(base + page * P, b"c")
madvise(base + 200 * P, 10, 4)
write(base + 700 * P, b"new")
mprotect(base, 20, R)
call(11, only_parent, 4 * P)
import time
time.sleep(1000)
"""


@pytest.fixture
def family() -> Iterator[tuple[Program, HostPid, Captured, Captured]]:
    with program(FORKED) as target, Scope() as scope, MemoryObjects(scope) as objects:
        child = HostPid(target["child"])
        try:
            rests_in(child, "nanosleep")
            yield (
                target,
                child,
                capture_address_space(target.pid, objects, brk=0),
                capture_address_space(child, objects, brk=0),
            )
        finally:
            os.kill(child, 9)


@pytest.mark.parametrize("frames", [True, False])
def test_pages_shared_with_the_parent(
    family: tuple[Program, HostPid, Captured, Captured], frames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, child, parents, childs = family
    if not frames:
        monkeypatch.setattr(sharing, "_tells_frames", lambda *_: False)
    plan = sharing.plan_copy_on_write(
        target.pid, parents.space, parents.runs, child, childs.space, childs.runs
    )
    base = target["base"]

    def pages(runs: list[Range]) -> set[int]:
        inside = intersect(runs, [(base, base + 1000 * PAGE)])
        return {(a - base) // PAGE + i for a, b in inside for i in range((b - a) // PAGE)}

    assert pages(plan.send) == {3, 4, 50, 100, 599, 700}
    assert pages(plan.dropped) == set(range(200, 210))
    assert pages(plan.shared) == set(range(600)) - pages(plan.send) - pages(plan.dropped)
    assert not intersect(plan.dropped, [(target["only_parent"], target["only_parent"] + 4 * PAGE)])
    assert total_bytes(plan.send) + total_bytes(plan.shared) == total_bytes(childs.runs)
    assert total_bytes(plan.send) < total_bytes(plan.shared)


def test_reading_leaves_shared_pages_shared(family: tuple[Program, HostPid, Captured, Captured]) -> None:
    target, child, parents, childs = family
    args = (target.pid, parents.space, parents.runs, child, childs.space, childs.runs)
    before = sharing.plan_copy_on_write(*args)
    gathered(target.pid, parents.runs, 1 << 20)
    found = gathered(child, childs.runs, 1 << 20)
    assert found[target["base"] + 3 * PAGE].startswith(b"cppp")
    assert sharing.plan_copy_on_write(*args) == before


def test_frames_and_contents_tell_the_same(
    family: tuple[Program, HostPid, Captured, Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, child, parents, childs = family
    args: tuple[HostPid, AddressSpace, list[Range], HostPid, AddressSpace, list[Range]]
    args = (target.pid, parents.space, parents.runs, child, childs.space, childs.runs)
    by_frames = sharing.plan_copy_on_write(*args)
    monkeypatch.setattr(sharing, "_tells_frames", lambda *_: False)
    by_contents = sharing.plan_copy_on_write(*args)
    assert subtract(by_frames.shared, by_contents.shared) == []
    assert by_frames.dropped == by_contents.dropped
