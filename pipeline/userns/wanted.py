"""Maps that a person asks for, as `run` takes them: in words, or all that the user has."""

from __future__ import annotations

import itertools
import operator
import os
import re
from typing import Literal, NamedTuple

from pipeline.errors import PipelineError, UsageError
from pipeline.userns.permitted import ask_for_ranges, subordinate_ranges, user_name

_MOST_EXTENTS = 340


class Extent(NamedTuple):
    """`length` ids from `inner` on are `outer` on in the parent user namespace."""

    inner: int
    outer: int
    length: int

    def text(self) -> str:
        """As /proc/PID/uid_map wants it."""
        return f"{self.inner} {self.outer} {self.length}"


IdMap = tuple[Extent, ...]
#: own ids as 0, and behind it every range that subuid(5) and subgid(5) grant to the caller
Granted = Literal["auto"]


def parse_map(text: str) -> IdMap:
    """Parse ``inner:outer:count[,inner:outer:count…]``.

    Raises:
        UsageError: not of that form, over 340 lines, an id over 2**32-2, or lines that overlap.
    """
    extents = []
    for line in text.split(","):
        found = re.fullmatch(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", line)
        if found is None:
            raise UsageError(f"{line!r} is not a map line: it is INNER:OUTER:COUNT, such as 0:100000:65536")
        extent = Extent(*map(int, found.groups()))
        if extent.length == 0 or max(extent.inner, extent.outer) + extent.length > 0xFFFF_FFFF:
            raise UsageError(f"map line {line!r}: the count is 0, or an id is over 4294967294")
        extents.append(extent)
    if len(extents) > _MOST_EXTENTS:
        raise UsageError(f"a map has at most {_MOST_EXTENTS} lines, this one has {len(extents)}")
    for field, side in ((0, "inner"), (1, "outer")):
        ordered = sorted(extents, key=operator.itemgetter(field))
        for low, high in itertools.pairwise(ordered):
            if low[field] + low.length > high[field]:
                raise UsageError(f"map lines {low.text()!r} and {high.text()!r} overlap in their {side} ids")
    return tuple(extents)


def granted(kind: str, own: int) -> IdMap:
    """Own id as 0, and behind it every range that subuid(5) or subgid(5) grants to this user.

    Raises:
        PipelineError: there is none; says what an administrator does.
    """
    ranges = subordinate_ranges(f"/etc/sub{kind}", user_name(), os.geteuid())
    if not ranges:
        raise PipelineError(f"/etc/sub{kind} has no range for {user_name()}; {ask_for_ranges()}")
    starts = itertools.accumulate((count for _, count in ranges), initial=1)
    lines = (Extent(inner, first, count) for inner, (first, count) in zip(starts, ranges, strict=False))
    return (Extent(0, own, 1), *lines)
