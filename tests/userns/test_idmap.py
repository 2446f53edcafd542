"""Id maps: laws, and the ends of extents."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.image.schema import Extent
from pipeline.userns.idmap import IDENTITY, NO_ID, IdMap, MapError, parse, relative_to_parent


@st.composite
def maps(draw: st.DrawFn, top: int = 400) -> IdMap:
    """Maps of up to six extents below `top`, in any order."""
    count = draw(st.integers(0, 6))

    def intervals() -> list[tuple[int, int]]:
        cuts = sorted(draw(st.sets(st.integers(0, top), min_size=2 * count, max_size=2 * count)))
        return list(zip(cuts[::2], cuts[1::2], strict=True))

    inner, lower = intervals(), draw(st.permutations(intervals()))
    return IdMap(
        Extent(a, c, min(b - a, d - c))
        for (a, b), (c, d) in draw(st.permutations(list(zip(inner, lower, strict=True))))
    )


ids = st.integers(0, 420)


@given(maps(), ids)
def test_up_and_down_are_inverse(one: IdMap, number: int) -> None:
    up, down = one.up(number), one.down(number)
    assert up is None or one.down(up) == number
    assert down is None or one.up(down) == number
    assert one.inverse().up(number) == down
    assert one.inverse().down(number) == up


@given(maps(), ids)
def test_lookup_is_what_the_lines_say(one: IdMap, number: int) -> None:
    said = {e.inner + n: e.lower + n for e in one.extents for n in range(e.count)}
    assert one.up(number) == said.get(number)
    assert one.down(number) == {lower: inner for inner, lower in said.items()}.get(number)


@given(maps())
def test_no_two_ids_become_one(one: IdMap) -> None:
    lower = [one.up(number) for number in range(420)]
    mapped = [number for number in lower if number is not None]
    assert len(mapped) == len(set(mapped)) == sum(extent.count for extent in one.extents)


@given(maps(), maps(), ids)
def test_composition_is_one_map_after_the_other(one: IdMap, two: IdMap, number: int) -> None:
    between = one.up(number)
    expected = None if between is None else two.up(between)
    assert one.compose(two).up(number) == expected


@given(maps(), maps(), maps(), ids)
def test_composition_is_associative(one: IdMap, two: IdMap, three: IdMap, number: int) -> None:
    assert one.compose(two).compose(three).up(number) == one.compose(two.compose(three)).up(number)


@given(maps())
def test_identity_changes_nothing(one: IdMap) -> None:
    assert set(one.compose(IDENTITY).extents) == set(IDENTITY.compose(one).extents) == set(one.extents)


@given(maps())
def test_text_keeps_lines_and_their_order(one: IdMap) -> None:
    assert parse(one.text()) == list(one.extents)


@given(maps(), ids)
def test_an_unmapped_id_has_a_nearest_extent(one: IdMap, number: int) -> None:
    nearest = one.nearest(number)
    if not one.extents:
        assert nearest is None
    elif one.up(number) is not None:
        assert nearest is not None
        assert nearest.inner <= number < nearest.inner + nearest.count


def test_ends_of_an_extent_are_exact() -> None:
    one = IdMap([Extent(10, 100_000, 5)])
    assert [one.up(n) for n in (9, 10, 14, 15)] == [None, 100_000, 100_004, None]
    assert [one.down(n) for n in (99_999, 100_000, 100_004, 100_005)] == [None, 10, 14, None]


def test_highest_id_is_mapped_and_the_number_behind_it_is_none() -> None:
    one = IdMap([Extent(NO_ID - 1, 7, 1)])
    assert (one.up(NO_ID - 1), one.up(NO_ID), one.down(7), one.down(8)) == (7, None, NO_ID - 1, None)
    assert IDENTITY.up(NO_ID) is None


@pytest.mark.parametrize(
    ("extents", "said"),
    [
        ([Extent(0, 0, 0)], "empty"),
        ([Extent(NO_ID, 0, 1)], "4294967295"),
        ([Extent(0, NO_ID, 1)], "4294967295"),
        ([Extent(2, 0, NO_ID)], "4294967295"),
        ([Extent(0, 0, 2), Extent(1, 10, 1)], "overlap inside"),
        ([Extent(0, 0, 2), Extent(5, 1, 1)], "overlap in the parent"),
    ],
)
def test_what_the_kernel_would_not_take_is_refused(extents: list[Extent], said: str) -> None:
    with pytest.raises(MapError, match=said):
        IdMap(extents)


def test_more_text_than_a_page_is_refused() -> None:
    far = 4_000_000_000
    with pytest.raises(MapError, match="bytes of map"):
        IdMap(Extent(far + 2 * n, far + 2 * n, 1) for n in range(300)).text()
    assert len(IdMap(Extent(2 * n, 2 * n, 1) for n in range(340)).text()) < 4096


def test_map_read_from_outside_is_put_relative_to_its_parent() -> None:
    parent = IdMap([Extent(0, 100_000, 10), Extent(10, 300_000, 10)])
    read = [Extent(5, 300_002, 3), Extent(0, 100_004, 2)]
    assert relative_to_parent(read, parent).extents == (Extent(5, 12, 3), Extent(0, 4, 2))


def test_neighbouring_lines_stay_two_lines() -> None:
    # `0 0 1` and `1 1 1` may lie on two lines of the parent: as one line the kernel would refuse them
    parent = IdMap([Extent(0, 1000, 1), Extent(1, 2000, 1)])
    read = [Extent(0, 1000, 1), Extent(1, 2000, 1)]
    assert relative_to_parent(read, parent).extents == (Extent(0, 0, 1), Extent(1, 1, 1))
    assert all(one.count == 1 for one, _ in pairwise(relative_to_parent(read, parent).extents))


def test_more_lines_than_the_kernel_takes_are_not_written() -> None:
    extents = [Extent(2 * n, 2 * n, 1) for n in range(341)]
    assert IdMap(extents[:340]).text().count(b"\n") == 339
    with pytest.raises(MapError, match="341 extents"):
        IdMap(extents).text()
