"""Whether this host has the huge pages of hugetlbfs that a tree needs, before anything of it is made.

Counted is what its mappings reserve, which the kernel would refuse otherwise (ENOMEM, at a mapping somewhere in the
middle). Not counted is what may run out all the same, and is then said where it does: pages of mappings that reserve
none, and copies that a child of fork(2) has made of its parent's.

Source: Documentation/mm/hugetlbfs_reserv.rst.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from pipeline.errors import Blocker
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace
from pipeline.kernel import hugetlb
from pipeline.kernel.pagemap import Range, subtract, total_bytes
from pipeline.resources.memory.alike import private_alike
from pipeline.resources.memory.classify import MAP_NORESERVE, MAP_SHARED
from pipeline.resources.memory.missing import RangeSet

_KIB = 1024


def lacking(image: Image) -> Iterator[Blocker]:
    """Sizes of which too few pages are free here."""
    for size, needed in sorted(reserved(image).items()):
        free = hugetlb.free_pages(size)
        if free < needed:
            yield Blocker(
                f"huge pages of {size // _KIB} kB",
                f"the tree needs {needed}, and {free} are free here",
                f"reserve more: /sys/kernel/mm/hugepages/hugepages-{size // _KIB}kB/nr_hugepages",
            )


def reserved(image: Image) -> Counter[int]:
    """How many pages the mappings of a tree reserve, by their size in bytes."""
    found: Counter[int] = Counter()
    shared: defaultdict[tuple[int, int], RangeSet] = defaultdict(RangeSet)
    for space in image.spaces.values():
        of_parent = _inherited(image, space)
        for vma in space.vmas:
            size = hugetlb.page_bytes(vma.flags)
            if not size or vma.flags & MAP_NORESERVE:
                continue
            if vma.flags & MAP_SHARED and vma.backing is not None:
                shared[size, vma.backing].add(vma.offset, vma.offset + vma.end - vma.start)
            else:
                found[size] += total_bytes(subtract([(vma.start, vma.end)], of_parent)) // size
    for (size, _), ranges in shared.items():
        found[size] += ranges.total() // size
    return found


def remark(sizes: Iterable[int]) -> str:
    """What to add where memory with such pages cannot be filled: of what there may be no more; sizes in bytes."""
    names = [f"{size // _KIB} kB" for size in sorted(sizes)]
    return f" (with huge pages of {' and '.join(names)}, which may have run out here)" if names else ""


def sizes(space: AddressSpace) -> set[int]:
    """The sizes of huge pages in an address space, in bytes."""
    return {hugetlb.page_bytes(vma.flags) for vma in space.vmas} - {0}


def _inherited(image: Image, space: AddressSpace) -> list[Range]:
    """The private mappings that fork(2) gives a process: their reservation stays its parent's."""
    if space.copy_of is None:
        return []
    return private_alike(image.spaces[space.copy_of].vmas, space.vmas)
