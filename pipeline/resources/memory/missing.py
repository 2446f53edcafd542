"""What of an address space is still elsewhere: the books of post-copy. Pure.

A page that is missing has two addresses: where the program looks for it now, and where it was when it was left
behind, by which it is asked for. They are the same until the program moves a mapping (mremap(2)). The books keep the
first, in sets of ranges; each set belongs to a *shift*, which is the first less the second.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

from pipeline.kernel.pagemap import Range, subtract


class RangeSet:
    """A set of addresses, as disjoint ranges [start, end); every operation looks only at what it touches."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._ends, strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __contains__(self, address: int) -> bool:
        at = bisect_right(self._starts, address) - 1
        return at >= 0 and address < self._ends[at]

    def total(self) -> int:
        """Bytes."""
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> Self:
        """An equal set of its own."""
        other = type(self)()
        other._starts, other._ends = self._starts[:], self._ends[:]
        return other

    def add(self, start: int, end: int) -> None:
        """Take in [start, end)."""
        if start >= end:
            return
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def within(self, start: int, end: int) -> list[Range]:
        """What it has of [start, end)."""
        if start >= end:
            return []
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return [
            (max(start, a), min(end, b))
            for a, b in zip(self._starts[first:last], self._ends[first:last], strict=True)
        ]

    def cut(self, start: int, end: int) -> list[Range]:
        """Take out what it has of [start, end), and say what that was."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if first >= last or start >= end:
            return []
        found = self.within(start, end)
        rest = [(a, b) for a, b in ((self._starts[first], start), (end, self._ends[last - 1])) if a < b]
        self._starts[first:last] = [a for a, _ in rest]
        self._ends[first:last] = [b for _, b in rest]
        return found

    def at_or_behind(self, address: int) -> Range | None:
        """The first range, or what is left of it, from `address` on; the very first one if none is behind."""
        if not self._starts:
            return None
        at = bisect_right(self._ends, address)
        if at == len(self._ends):
            return self._starts[0], self._ends[0]
        return max(address, self._starts[at]), self._ends[at]


class Place(NamedTuple):
    """Where pages are wanted, and their address where they were left."""

    start: int
    end: int
    origin: int


class Missing:
    """The books of one address space.

    Args:
        ranges: of pages that are elsewhere, by their addresses there and here.
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._shifted: dict[int, RangeSet] = {}
        for start, end in ranges:
            self._shifted.setdefault(0, RangeSet()).add(start, end)

    def __bool__(self) -> bool:
        return any(self._shifted.values())

    def copy(self) -> Missing:
        """The books of a child that was forked now."""
        other = Missing()
        other._shifted = {shift: held.copy() for shift, held in self._shifted.items()}
        return other

    def origins(self) -> RangeSet:
        """Everything that is missing, by the addresses where it was left."""
        found = RangeSet()
        for shift, held in self._shifted.items():
            for start, end in held:
                found.add(start - shift, end - shift)
        return found

    def origin_of(self, address: int) -> int | None:
        """Where the byte at `address` was left; None if it is not missing."""
        for shift, held in self._shifted.items():
            if address in held:
                return address - shift
        return None

    def places(self, start: int, end: int) -> list[Place]:
        """Where of what was left at [start, end) is wanted; it may be in several places, or in none."""
        return [
            Place(a, b, a - shift)
            for shift, held in self._shifted.items()
            for a, b in held.within(start + shift, end + shift)
        ]

    def settle(self, start: int, end: int) -> None:
        """Nothing is missing at [start, end) any more: it is there, or unmapped, or was dropped."""
        for held in self._shifted.values():
            held.cut(start, end)
        self._forget_empty()

    def move(self, start: int, to: int, length: int) -> None:
        """The mapping at [start, start + length) is at `to` now, where nothing was before."""
        found = [(shift, held.cut(start, start + length)) for shift, held in self._shifted.items()]
        self.settle(to, to + length)
        for shift, ranges in found:
            for a, b in ranges:
                there = shift + to - start
                self._shifted.setdefault(there, RangeSet()).add(a + to - start, b + to - start)
        self._forget_empty()

    def lack_too(self, other: Missing, start: int, to: int, length: int) -> None:
        """What `other` lacks at [start, start + length) may be wanted at `to` here.

        But for what is said to be missing there already. What is there, or has no mapping, is settled when it comes.
        """
        taken = sorted(run for held in self._shifted.values() for run in held.within(to, to + length))
        for shift, held in list(other._shifted.items()):
            there = [(a + to - start, b + to - start) for a, b in held.within(start, start + length)]
            for a, b in subtract(there, taken):
                self._shifted.setdefault(shift + to - start, RangeSet()).add(a, b)

    def _forget_empty(self) -> None:
        for shift in [shift for shift, held in self._shifted.items() if not held]:
            del self._shifted[shift]
