"""The books of post-copy, against a table with a line for every page."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.kernel.pagemap import Range
from pipeline.resources.memory.missing import Missing, RangeSet

SIZE = 48
spans = st.tuples(st.integers(0, SIZE), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def flat(ranges: Iterable[Range]) -> list[int]:
    """Every address, and that ranges ascend with a gap between them."""
    found = list(ranges)
    assert all(start < end for start, end in found)
    assert all(one[1] < other[0] for one, other in pairwise(found))
    return [address for start, end in found for address in range(start, end)]


@given(st.lists(st.tuples(st.sampled_from(["add", "cut"]), spans)), spans, st.integers(0, SIZE))
def test_a_set_of_ranges_is_a_set(steps: list[tuple[str, Range]], looked: Range, at: int):
    ranges, model = RangeSet(), set[int]()
    for what, (start, end) in steps:
        if what == "add":
            ranges.add(start, end)
            model |= set(range(start, end))
        else:
            assert flat(ranges.cut(start, end)) == sorted(model & set(range(start, end)))
            model -= set(range(start, end))
        assert flat(ranges) == sorted(model)
    assert ranges.total() == len(model)
    assert bool(ranges) == bool(model)
    assert (at in ranges) == (at in model)
    assert flat(ranges.within(*looked)) == sorted(model & set(range(*looked)))
    behind = [address for address in sorted(model) if address >= at] or sorted(model)
    first = ranges.at_or_behind(at)
    assert (first[0] if first else None) == (behind[0] if behind else None)
    assert first is None or set(range(*first)) <= model
    copy = ranges.copy()
    copy.cut(0, SIZE * 2)
    assert ranges.total() == len(model)


@given(
    st.lists(spans, max_size=4),
    st.lists(st.tuples(st.booleans(), spans, st.integers(0, 2 * SIZE)), max_size=8),
    spans,
)
def test_what_is_missing_is_found_wherever_it_was_moved(
    begin: list[Range], steps: list[tuple[bool, Range, int]], asked: Range
):
    missing = Missing(begin)
    model = {address: address for start, end in begin for address in range(start, end)}
    for moves, (start, end), to in steps:
        if moves:
            missing.move(start, to, end - start)
            moved = {to + here - start: model[here] for here in range(start, end) if here in model}
            model = {
                here: origin
                for here, origin in model.items()
                if not start <= here < end and not to <= here < to + end - start
            } | moved
        else:
            missing.settle(start, end)
            model = {here: origin for here, origin in model.items() if not start <= here < end}
    assert bool(missing) == bool(model)
    assert {here: missing.origin_of(here) for here in range(4 * SIZE)} == {
        here: model.get(here) for here in range(4 * SIZE)
    }
    assert flat(missing.origins()) == sorted(set(model.values()))
    found = {
        place.start + at: place.origin + at
        for place in missing.places(*asked)
        for at in range(place.end - place.start)
    }
    assert found == {here: origin for here, origin in model.items() if asked[0] <= origin < asked[1]}
    child = missing.copy()
    child.settle(0, 4 * SIZE)
    assert bool(missing) == bool(model)
