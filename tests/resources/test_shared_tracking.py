"""Writes to shared memory are told, whoever writes and however; where that cannot be known, it is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipeline.ids import HostPid
from pipeline.image.schema import SharedMemory
from pipeline.kernel import paging, procfs, userfaultfd
from pipeline.kernel.pagemap import PAGE_BYTES, Range
from pipeline.kernel.syscalls import process_vm_writev
from pipeline.ledger import LEDGER
from pipeline.resources.memory import shared_tracking
from pipeline.resources.memory.objects import SharedObject, Window
from pipeline.resources.memory.shared_tracking import SharedTracking, Shown, is_worth_it
from pipeline.stages import freeze
from pipeline.stages.asking import inside
from tests.resources.sharedtarget import SIZE, SPACE, Family

pytestmark = pytest.mark.root


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family()
    try:
        yield family
    finally:
        family.close()


@contextmanager
def watching(family: Family, *before: str) -> Iterator[Callable[[], list[int] | None]]:
    """What tells the numbers of the pages that may have been written since it was asked last; None: any."""
    if not userfaultfd.is_asynchronous():
        pytest.skip("this kernel has no asynchronous write protection")
    for words in before:
        family.do(words)
    tracking = SharedTracking()
    fd = family.opened()

    def collected() -> list[int] | None:
        found = tracking.collect({SPACE: Shown(fd, SIZE, family.windows()[SPACE])})
        return numbers(found[SPACE])

    try:
        where = family.windows()[SPACE]
        for pid in freeze.walk(family.pid):
            tree = freeze.freeze(pid, suspend_seccomp=True)
            try:
                with inside(pid, [pid]) as task:
                    assert tracking.begin(pid, task.syscall, [one for one in where if one.pid == pid])
            finally:
                freeze.release(tree)
        assert collected() is None, "nothing is known at first"
        assert collected() == []
        yield collected
    finally:
        tracking.close()
        os.close(fd)
    assert not family.watched()
    family.do("by_a_child_that_ends 1")  # nobody waits for anybody
    for pid in freeze.walk(family.pid):
        assert not userfaultfd.has_one(pid)


def numbers(runs: list[Range] | None) -> list[int] | None:
    if runs is None:
        return None
    return [at // PAGE_BYTES for start, end in runs for at in range(start, end, PAGE_BYTES)]


def test_pages_that_were_written_are_told_once(family: Family) -> None:
    with watching(family) as told:
        family.do("write 1 7 40")
        assert told() == [1, 7, 40]
        assert told() == []
        family.do("read 3 41 50")
        assert told() == []
        family.do("write 41")
        family.do("by_a_file 5")
        assert told() == [5, 41]
        for page in (2, 44):
            process_vm_writev(
                family.pid, [(family.start + page * PAGE_BYTES, 0, 1)], memoryview(bytearray(b"?"))
            )
        assert told() == [2, 44]
        assert told() == []


def test_only_where_there_is_data_it_is_marked(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tracking, "_TABLE_BYTES", 16 * PAGE_BYTES)
    with watching(family) as told:
        family.do("write 3")
        assert told() == [3]
        family.do("write 41")
        assert told() == list(range(32, 48)), "of it nothing was known"
        family.do("write 33 41")
        assert told() == [33, 41]
        family.do("by_a_hole 41")
        family.do("read 60")
        assert told() is None
        family.do("write 50 60")
        assert told() == [50, 60]


def test_whoever_has_it_mapped_is_watched(family: Family) -> None:
    with watching(family, "bear", "child_writes 60") as told:
        family.do("child_writes 3")
        family.do("write 9 33")
        assert told() == [3, 9, 33]
        family.do("child_writes 9")
        assert told() == [9]
        assert told() == []


@pytest.mark.parametrize(
    "unseen",
    [
        "by_a_child_that_ends",
        "by_a_mapping_that_goes",
        "by_page_tables_that_are_emptied",
        "by_a_hole",
        "by_a_hole_that_is_looked_into",
    ],
)
@pytest.mark.parametrize("page", [4, 60], ids=["written", "never-touched"])
def test_what_leaves_no_mark_is_not_taken_for_unwritten(family: Family, unseen: str, page: int) -> None:
    with watching(family, "bear") as told:
        for _ in range(2):
            family.do(f"{unseen} {page}")
            found = told()
            assert found is None or page in found
            # what had happened is over: the next one knows again
            family.do("write 8")
            assert told() == [8]


def test_a_child_that_stays_is_watched_from_its_birth(family: Family) -> None:
    with watching(family) as told:
        family.do("bear")
        family.do("child_writes 12")
        assert told() is None, "somebody was born"
        family.do("child_writes 13")
        family.do("write 14")
        assert told() == [13, 14]
        family.do("child_writes 15")
        family.do("child_ends")
        assert told() is None, "what it has written is gone with it"
        family.do("write 16")
        assert told() == [16]


@pytest.mark.parametrize("end", ["child_ends", "child_unmaps"])
def test_what_was_written_through_a_mapping_that_is_gone_is_not_taken_for_unwritten(
    family: Family, end: str
) -> None:
    with watching(family, "bear") as told:
        family.do("child_writes 12")
        family.do(end)
        assert told() is None
        family.do("write 13")
        assert told() == [13]


def test_a_child_that_does_not_show_it_any_more_may_have_it_anywhere(family: Family) -> None:
    """It has no mapping now, which cannot be told from one that is not found."""
    with watching(family) as told:
        family.do("bear")
        assert told() is None
        family.do("child_unmaps")
        for _ in range(2):
            assert told() is None
        family.do("child_ends")
        assert told() is None
        assert told() == []


def test_who_forks_does_not_wait_where_there_is_no_room_for_the_child(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(family) as told:

        def full(fd: int) -> list[paging.Event]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patched:
            patched.setattr(paging, "read_events", full)
            family.do("by_a_child_that_ends 5")
            assert told() is None
        family.do("write 5")
        assert told() is None, "it is watched no longer"


def test_where_forks_are_not_told_of_nothing_is_watched(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(userfaultfd, "begin_following", refused)
    tracking = SharedTracking()
    tree = freeze.freeze(family.pid, suspend_seccomp=True)
    try:
        with inside(family.pid, [family.pid]) as task:
            assert not tracking.begin(family.pid, task.syscall, family.windows()[SPACE])
    finally:
        freeze.release(tree)
        tracking.close()
    assert not family.watched()
    assert not userfaultfd.has_one(family.pid)
    assert not [kind for kind, _ in LEDGER.held() if kind == "watch of shared memory"]


def shared(size_bytes: int = 8 << 20, mappings: int = 1, **facts: object) -> SharedObject:
    """Shared memory of this kind, mapped so often; `is_open`, `fd`: see `SharedObject`, others: see `SharedMemory`."""
    is_open, fd = facts.pop("is_open", False), facts.pop("fd", 5)
    record = SharedMemory(**{"space": SPACE, "kind": "anon", "size_bytes": size_bytes, **facts})  # type: ignore[arg-type]
    windows = [Window(HostPid(100 + number), 0, size_bytes, 0) for number in range(mappings)]
    return SharedObject(record, fd, windows, is_open)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "worth_it"),
    [
        (shared(), True),
        (shared(mappings=16), True),
        (shared(mappings=17), False),
        (shared(size_bytes=4 << 20), False),
        (shared(kind="memfd"), False),
        (shared(is_open=True), False),
        (shared(fd=None), False),
        (shared(hugetlb=2 << 20), False),
    ],
    ids=["large", "some-processes", "many-processes", "small", "memfd", "open", "not-to-be-opened", "huge-pages"],
)  # fmt: skip
def test_only_what_nobody_else_can_reach_and_pays_is_watched(one: SharedObject, *, worth_it: bool) -> None:
    assert is_worth_it(one) is worth_it


def test_whoever_has_it_mapped_is_found(family: Family) -> None:
    family.do("bear")
    own, child = freeze.walk(family.pid)
    everybody = [HostPid(int(name)) for name in os.listdir("/proc") if name.isdecimal()]
    found = shared_tracking.windows(everybody, family.keys)[SPACE]
    assert {(one.pid, one.start, one.offset) for one in found} == {
        (own, family.start, 0),
        (child, family.start, 0),
    }
    assert procfs.stat(child).ppid == own
