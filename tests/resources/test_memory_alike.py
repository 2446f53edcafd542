"""Which mappings of two address spaces are alike (`pipeline.resources.memory.alike`)."""

from __future__ import annotations

import mmap

from msgspec.structs import replace

from pipeline.image.schema import Vma
from pipeline.kernel.pagemap import merged
from pipeline.resources.memory.alike import overlaps, private_alike

PAGE = mmap.PAGESIZE
HEAP = Vma(start=0, end=4 * PAGE, kind="anon", prot=3, flags=mmap.MAP_PRIVATE)
FILE = Vma(start=8 * PAGE, end=9 * PAGE, kind="file", prot=1, flags=mmap.MAP_PRIVATE, backing=1)
SHARED = Vma(start=12 * PAGE, end=13 * PAGE, kind="shared", prot=3, flags=mmap.MAP_SHARED, backing=2)
VDSO = Vma(start=20 * PAGE, end=21 * PAGE, kind="vdso", prot=5, flags=mmap.MAP_PRIVATE)
ALL = [HEAP, FILE, SHARED, VDSO]


def test_of_the_same_mappings_those_are_private_that_are_neither_shared_nor_the_kernels() -> None:
    """It is told without comparing them one by one, and is what that would tell."""
    assert private_alike(ALL, list(ALL)) == [(HEAP.start, HEAP.end), (FILE.start, FILE.end)]
    one_by_one = [(each.start, each.end) for each in overlaps(ALL, ALL) if each.child is not SHARED]
    assert private_alike(ALL, ALL) == one_by_one


def test_mappings_that_are_in_other_pieces_are_alike_where_both_have_some() -> None:
    pieces = [replace(HEAP, end=PAGE, prot=1), replace(HEAP, start=2 * PAGE, end=6 * PAGE)]
    assert merged(private_alike(ALL, [*pieces, FILE])) == [
        (0, PAGE),
        (2 * PAGE, 4 * PAGE),
        (FILE.start, FILE.end),
    ]


def test_another_file_at_the_same_place_is_not_alike() -> None:
    for other in (
        replace(FILE, backing=7),
        replace(FILE, offset=PAGE),
        replace(FILE, kind="anon", backing=None),
    ):
        assert private_alike([HEAP, FILE], [HEAP, other]) == [(HEAP.start, HEAP.end)]
