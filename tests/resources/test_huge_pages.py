"""How many huge pages of hugetlbfs a tree needs where it is built, and what is said where there are too few."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, Vma
from pipeline.kernel import hugetlb
from pipeline.resources.memory import huge_pages

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
