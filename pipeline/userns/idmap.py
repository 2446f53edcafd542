"""Uid and gid maps: exact translation of one id between a user namespace and its parent.

A map is what /proc/PID/uid_map says, read *relative to the parent*: extents
(inner, lower, count), at most 340, none overlapping on either side. The last id of an
extent is first + count - 1; what no extent covers has no mapping, which is a state
(`None`) and never a number.

Lines and their order are kept: the kernel takes an extent only if it lies within one
extent of the parent's map, so two lines that continue each other may not become one.

Sources: user_namespaces(7); kernel/user_namespace.c map_write.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

from pipeline.image.schema import Extent

MAX_EXTENTS = 340
#: one less than a page: the kernel takes less than PAGE_SIZE bytes of text
MAX_TEXT_BYTES = 4095
#: (uid_t) -1 is no id: "leave unchanged", and the kernel's mark for "invalid"
NO_ID = 0xFFFF_FFFF


class MapError(ValueError):
    """A map that the kernel would not take; says which extent and why."""


class IdMap:
    """An immutable map between a namespace (inner) and its parent (lower).

    Args:
        extents: its lines, in any order; `extents` keeps it, as the kernel does up to five lines.

    Raises:
        MapError: extents overlap or wrap around.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        self.extents: tuple[Extent, ...] = tuple(extents)
        self._by_inner = tuple(sorted(self.extents, key=lambda extent: extent.inner))
        self._by_lower = tuple(sorted(self.extents, key=lambda extent: extent.lower))
        for extent in self.extents:
            if extent.count < 1 or max(extent.inner, extent.lower) + extent.count > NO_ID:
                raise MapError(f"extent {self._line(extent)} is empty or reaches id {NO_ID}")
        for one, other in pairwise(self._by_inner):
            if one.inner + one.count > other.inner:
                raise MapError(f"extents {self._line(one)} and {self._line(other)} overlap inside")
        for one, other in pairwise(self._by_lower):
            if one.lower + one.count > other.lower:
                raise MapError(f"extents {self._line(one)} and {self._line(other)} overlap in the parent")

    @staticmethod
    def _line(extent: Extent) -> str:
        return f"`{extent.inner} {extent.lower} {extent.count}`"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and self.extents == other.extents

    def __hash__(self) -> int:
        return hash(self.extents)

    def __repr__(self) -> str:
        return f"IdMap({', '.join(self._line(extent) for extent in self.extents)})"

    @cached_property
    def _inner_starts(self) -> list[int]:
        return [extent.inner for extent in self._by_inner]

    @cached_property
    def _lower_starts(self) -> list[int]:
        return [extent.lower for extent in self._by_lower]

    def up(self, inner: int) -> int | None:
        """The parent's id for `inner`; None where it is not mapped."""
        at = bisect_right(self._inner_starts, inner) - 1
        if at < 0:
            return None
        extent = self._by_inner[at]
        return extent.lower + inner - extent.inner if inner - extent.inner < extent.count else None

    def down(self, lower: int) -> int | None:
        """The inner id for the parent's `lower`; None where it is not mapped."""
        at = bisect_right(self._lower_starts, lower) - 1
        if at < 0:
            return None
        extent = self._by_lower[at]
        return extent.inner + lower - extent.lower if lower - extent.lower < extent.count else None

    def inverse(self) -> IdMap:
        """The map that reads the other way."""
        return IdMap(Extent(e.lower, e.inner, e.count) for e in self.extents)

    def compose(self, outer: IdMap) -> IdMap:
        """This map followed by `outer`: from here to the grandparent; what either lacks, the result lacks."""
        return IdMap(
            Extent(inner, lower, count)
            for extent in self.extents
            for inner, lower, count in _through(extent, outer.extents)
        )

    def text(self) -> bytes:
        """What is written to /proc/PID/uid_map by somebody in the parent namespace.

        Raises:
            MapError: more lines, or more text, than the kernel takes in one write.
        """
        if len(self.extents) > MAX_EXTENTS:
            raise MapError(f"{len(self.extents)} extents; the kernel takes {MAX_EXTENTS}")
        content = b"\n".join(b"%d %d %d" % (e.inner, e.lower, e.count) for e in self.extents)
        if len(content) > MAX_TEXT_BYTES:
            raise MapError(f"{len(content)} bytes of map; the kernel takes {MAX_TEXT_BYTES}")
        return content

    def nearest(self, inner: int) -> Extent | None:
        """The extent closest to an unmapped id, for messages."""

        def distance(extent: Extent) -> int:
            return max(extent.inner - inner, inner - (extent.inner + extent.count - 1))

        return min(self.extents, key=distance, default=None)


def _through(extent: Extent, outer: Sequence[Extent]) -> Iterable[tuple[int, int, int]]:
    for other in outer:
        start = max(extent.lower, other.inner)
        end = min(extent.lower + extent.count, other.inner + other.count)
        if start < end:
            yield extent.inner + start - extent.lower, other.lower + start - other.inner, end - start


def parse(content: bytes) -> list[Extent]:
    """The lines of a map file, as they are read: field 2 is in the *reader's* namespace."""
    extents = []
    for line in content.splitlines():
        inner, lower, count = map(int, line.split())
        extents.append(Extent(inner, lower, count))
    return extents


def relative_to_parent(as_read: Iterable[Extent], parent_to_reader: IdMap) -> IdMap:
    """A map as its reader sees it, put relative to the parent of its namespace.

    The kernel prints each extent's lower id as the *reader* sees it: translate it back through
    everything between the reader and the parent. Each extent lies within one extent of the parent's
    map, so it stays one.

    Args:
        as_read: extents with lower ids in the reader's namespace.
        parent_to_reader: from ids of the parent to ids of the reader.
    """
    return IdMap(as_read).compose(parent_to_reader.inverse())


#: every id to itself: the map of a namespace seen from itself
IDENTITY = IdMap([Extent(0, 0, NO_ID)])
