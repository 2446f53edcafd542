"""How many huge pages of hugetlbfs a tree needs where it is built, and what is said where there are too few."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.ids import RemoteFd
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, Vma
from pipeline.kernel import hugetlb
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.calls import Call
from pipeline.resources.memory import huge_pages, rebuild

HUGE = 2 << 20
PRIVATE, SHARED, NORESERVE = 2, 1, 0x4000


def mapping(first: int, pages: int, flags: int, **more: int) -> Vma:
    return Vma(
        start=first * HUGE,
        end=(first + pages) * HUGE,
        kind="shared" if "backing" in more else "anon",
        prot=3,
        flags=flags | hugetlb.mapping_flags(HUGE),
        **more,
    )


def space(number: int, *vmas: Vma, copy_of: int | None = None) -> AddressSpace:
    return AddressSpace(space=number, vmas=list(vmas), exe=0, layout=[0] * 11, auxv=b"", copy_of=copy_of)


def image_of(*spaces: AddressSpace) -> Image:
    image = Image()
    image.spaces.update({one.space: one for one in spaces})
    return image


def pool(root: Path, monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    directory = root / "hugepages-2048kB"
    directory.mkdir()
    for name in ("free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages"):
        (directory / name).write_text(f"{counts.get(name, 0)}\n")
    monkeypatch.setattr(hugetlb, "_POOLS", root)


def test_what_is_reserved_is_counted_once() -> None:
    small = replace(mapping(40, 9, PRIVATE), flags=PRIVATE)
    inherited = mapping(0, 4, PRIVATE)
    parent = space(
        1,
        inherited,
        mapping(10, 5, PRIVATE | NORESERVE),
        mapping(20, 3, SHARED, backing=7),
        small,
    )
    child = space(2, inherited, mapping(30, 2, SHARED, backing=7, offset=2 * HUGE), copy_of=1)
    # of the object the parent maps pages 0 to 2, and the child 2 and 3
    assert huge_pages.reserved(image_of(parent, child)) == {HUGE: 4 + 4}
    executed = space(2, inherited)
    assert huge_pages.reserved(image_of(parent, executed)) == {HUGE: 4 + 3 + 4}


def test_a_memfd_that_is_mapped_privately_is_reserved_for_each() -> None:
    one, other = (space(number, mapping(0, 3, PRIVATE, backing=7)) for number in (1, 2))
    assert huge_pages.reserved(image_of(one, other)) == {HUGE: 6}


def test_too_few_are_refused_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(space(1, mapping(0, 4, PRIVATE)))
    pool(tmp_path, monkeypatch, free_hugepages=5, resv_hugepages=2)
    (blocker,) = huge_pages.lacking(image)
    assert str(blocker).startswith(
        "huge pages of 2048 kB: the tree needs 4, and 3 are free here (reserve more: /sys"
    )


@pytest.mark.parametrize(
    "counts",
    [
        {"free_hugepages": 6, "resv_hugepages": 2},
        {"nr_overcommit_hugepages": 5, "surplus_hugepages": 1},
        # the limit was lowered behind those that are there
        {"free_hugepages": 4, "nr_overcommit_hugepages": 1, "surplus_hugepages": 3},
    ],
    ids=["free", "more may be made", "no more may be made"],
)
def test_enough_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]) -> None:
    pool(tmp_path, monkeypatch, **counts)
    assert not list(huge_pages.lacking(image_of(space(1, mapping(0, 4, PRIVATE)))))


def test_a_kernel_without_that_size_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugetlb, "_POOLS", tmp_path)
    (blocker,) = huge_pages.lacking(image_of(space(1, mapping(0, 4, PRIVATE))))
    assert "0 are free here" in str(blocker)
    assert not list(huge_pages.lacking(image_of(space(1))))


@pytest.mark.parametrize("size", [64 << 10, HUGE, 1 << 30])
def test_flags_tell_the_size(size: int) -> None:
    assert hugetlb.page_bytes(hugetlb.mapping_flags(size) | PRIVATE) == size
    assert not hugetlb.page_bytes(PRIVATE)


# -- the calls that make such memory -------------------------------------------------------


def called(calls: list[Call], number: int) -> list[tuple[object, ...]]:
    return [call.args for call in calls if call.number == number]


def test_what_may_not_be_written_may_be_until_it_is_filled() -> None:
    """Nobody writes to huge pages against the permissions of their mapping, in kernels from 6.2 to 6.13."""
    read_only = replace(mapping(1, 2, PRIVATE), prot=1, offset=HUGE)
    shared = replace(mapping(5, 1, SHARED, backing=7), prot=1)
    one = space(1, read_only, shared)
    fds = {source: RemoteFd(9) for source in rebuild.sources(one.vmas)}
    made = called(rebuild.create(one, fds, {}), NR.mmap)
    # of private memory the offset is seen, too: it is a file of the kernel's
    assert [(args[0], args[2], args[4], args[5]) for args in made] == [
        (HUGE, 3, -1, HUGE),
        (5 * HUGE, 1, 9, 0),
    ]
    assert called(rebuild.complete(one), NR.mprotect) == [(HUGE, 2 * HUGE, 1)]


def test_a_child_may_write_to_what_its_parent_may_not_and_the_other_way_round() -> None:
    fixed = replace(mapping(1, 2, PRIVATE), prot=1)
    written = mapping(1, 2, PRIVATE)
    for parent, child in ((fixed, written), (written, fixed)):
        one, other = space(1, parent), space(2, child, copy_of=1)
        assert not rebuild.inherit(one, other, {}, {})
        assert len(called(rebuild.complete(other), NR.mprotect)) == (child is fixed)


def test_a_part_of_a_page_that_is_none_any_more_drops_it_whole() -> None:
    """The kernel drops no part, and does not always say so."""
    huge, small = mapping(1, 3, PRIVATE), replace(mapping(6, 1, PRIVATE), flags=PRIVATE)
    one = space(1, huge, small)
    dropped = [(HUGE + 4096, HUGE + 8192), (2 * HUGE, 2 * HUGE + 4096), (6 * HUGE, 6 * HUGE + 4096)]
    other = replace(space(2, huge, small, copy_of=1), dropped=dropped)
    found = called(rebuild.inherit(one, other, {}, {}), NR.madvise)
    assert [args[:2] for args in found] == [(HUGE, 2 * HUGE), (6 * HUGE, 4096)]
