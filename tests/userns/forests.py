"""Forests that the kernel would take: for each namespace a parent, an owner, maps within the parent's."""

from __future__ import annotations

from hypothesis import strategies as st

from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.userns.forest import Forest

OUTSIDE = (Extent(0, 0, 1 << 24),)


@st.composite
def extents(draw: st.DrawFn, parent: tuple[Extent, ...], most: int) -> list[Extent]:
    """Lines of a map, each within one line of the parent's."""
    lines: list[Extent] = []
    inner = draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, most))):
        outer = draw(st.sampled_from(parent))
        first = draw(st.integers(0, min(outer.count - 1, 200_000)))
        count = draw(st.integers(1, min(outer.count - first, 1000)))
        line = Extent(inner, outer.inner + first, count)
        if all(line.lower + line.count <= o.lower or o.lower + o.count <= line.lower for o in lines):
            lines.append(line)
        inner += count + draw(st.sampled_from([0, 0, 1, 7]))
    return draw(st.permutations(lines))


@st.composite
def forests(draw: st.DrawFn, most: int = 6, lines: int = 7) -> Forest:
    """Up to `most` namespaces below namespace 0, at any depth."""
    records = [UserNamespace(index=0)]
    for index in range(1, draw(st.integers(1, most)) + 1):
        parent = draw(st.sampled_from(records))
        uids = tuple(parent.uid_map) if parent.index else OUTSIDE
        gids = tuple(parent.gid_map) if parent.index else OUTSIDE
        creator = draw(st.sampled_from(uids))
        records.append(
            UserNamespace(
                index=index,
                parent=parent.index,
                owner=Id(parent.index, creator.inner + draw(st.integers(0, min(creator.count - 1, 100_000)))),
                uid_map=draw(extents(uids, lines)),
                gid_map=draw(extents(gids, lines)),
                setgroups="deny" if parent.setgroups == "deny" else draw(st.sampled_from(["allow", "deny"])),
            )
        )
    return Forest(records)
