"""Where two address spaces have the same mappings, so that one can be forked from the other.

Both sides need the same answer: the dump, to leave out pages that the child shares
with its parent, and the rebuild, to keep what fork(2) gave and change the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.image.schema import Vma
from pipeline.kernel.pagemap import Range
from pipeline.resources.memory.classify import MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_SHARED

#: mappings that the kernel makes; they are put in place once, and fork keeps them
KERNEL_KINDS = frozenset({"vdso", "vvar", "vvar_vclock", "vsyscall"})
#: mappings that are made when all children are born
LATE_KINDS = frozenset({"aio"})
_NOT_ORDINARY = KERNEL_KINDS | LATE_KINDS
HUGE_ADVICE = frozenset({MADV_HUGEPAGE, MADV_NOHUGEPAGE})


class Overlap(NamedTuple):
    """[start, end), where the parent's and the child's mapping are alike; permissions may differ."""

    start: int
    end: int
    parent: Vma
    child: Vma


def ordinary(vmas: Sequence[Vma]) -> list[Vma]:
    """Without the kernel's own and those made late."""
    return [vma for vma in vmas if vma.kind not in _NOT_ORDINARY]


def is_forked(parent: Sequence[Vma], child: Sequence[Vma]) -> bool:
    """Whether the child can have come from the parent by fork alone: exec puts the kernel's mappings elsewhere."""

    def kernels(vmas: Sequence[Vma]) -> list[tuple[str, int, int]]:
        return [(vma.kind, vma.start, vma.end) for vma in vmas if vma.kind in KERNEL_KINDS]

    return kernels(parent) == kernels(child)


def huge_advice(vma: Vma) -> list[int]:
    """MADV_HUGEPAGE or MADV_NOHUGEPAGE, as far as set: given before the pages come, and never taken back."""
    return [value for value in vma.advice if value in HUGE_ADVICE]


def is_alike(parent: Vma, child: Vma) -> bool:
    """Whether both show the same thing at the same address: fork gives the child what it needs."""
    if (parent.kind, parent.flags, parent.backing, parent.readonly_file) != (
        child.kind,
        child.flags,
        child.backing,
        child.readonly_file,
    ):
        return False
    if parent.backing is not None and parent.offset - parent.start != child.offset - child.start:
        return False
    return parent.advice == child.advice or huge_advice(parent) == huge_advice(child)


def overlaps(parent: Sequence[Vma], child: Sequence[Vma]) -> Iterator[Overlap]:
    """Every piece of the address space where both have a mapping and the two are alike, ascending."""
    ones, others = ordinary(parent), ordinary(child)
    i = j = 0
    while i < len(ones) and j < len(others):
        one, other = ones[i], others[j]
        start, end = max(one.start, other.start), min(one.end, other.end)
        if start < end and is_alike(one, other):
            yield Overlap(start, end, one, other)
        if one.end <= other.end:
            i += 1
        else:
            j += 1


def private_alike(parent: Sequence[Vma], child: Sequence[Vma]) -> list[Range]:
    """Where both have mappings that are alike, and whose pages are copied on write; most processes keep theirs."""
    if parent == child:
        return [(vma.start, vma.end) for vma in ordinary(child) if not vma.flags & MAP_SHARED]
    return [(o.start, o.end) for o in overlaps(parent, child) if not o.child.flags & MAP_SHARED]
