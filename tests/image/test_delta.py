"""What a later look has in common with a draft is said by number, and becomes the same records again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.errors import ImageError
from pipeline.image.codec import Image, image_of
from pipeline.image.delta import Draft, condensed, grown
from pipeline.image.schema import AddressSpace, Content, Head, Record, SharedMemory, Unchanged
from tests.image.test_codec import HEAD


def _tree(sizes: dict[int, int], head: Head = HEAD) -> list[Record]:
    """A tree with shared memory and contents of these sizes, by their numbers, in this order."""
    shared = [SharedMemory(space=n, kind="anon", size_bytes=4096 * size) for n, size in sizes.items()]
    contents = [Content(space=n, size_bytes=4096 * size) for n, size in sizes.items()]
    return [head, *shared, *contents]


def _sent(draft: list[Record], now: list[Record]) -> list[Record]:
    known = Draft(image_of(draft))
    return list(condensed(map(known.known, now)))


def _come(draft: list[Record], sent: list[Record]) -> list[Record]:
    known, image = Draft(image_of(draft)), Image()
    for record in sent:
        for one in known.expanded(record):
            image.add(one)  # type: ignore[arg-type]
    return list(image.records())


SIZES = st.dictionaries(st.integers(1, 9), st.integers(1, 3))


@given(SIZES, SIZES)
def test_both_sides_have_the_same(before: dict[int, int], after: dict[int, int]):
    draft, now = _tree(before), _tree(after, replace(HEAD, created_ns=7))
    assert _come(draft, _sent(draft, now)) == now


def test_runs_of_what_is_unchanged_are_one():
    draft, now = _tree({1: 1, 2: 1, 3: 1, 4: 1}), _tree({1: 1, 2: 1, 3: 2, 4: 1})
    changed = [record for record in now if record not in draft]
    assert _sent(draft, now) == [
        Unchanged(first=0, count=3),
        changed[0],
        Unchanged(first=4, count=3),
        changed[1],
        Unchanged(first=8, count=1),
    ]


def test_what_came_before_something_else_keeps_its_place():
    """Processes are in the order of their births: a later tree may have them in another one."""
    draft, now = _tree({1: 1, 2: 1}), _tree({2: 1, 1: 1})
    assert _come(draft, _sent(draft, now)) == now


def test_what_is_unchanged_is_the_record_of_the_draft():
    """So that whoever compares the two has nothing to compare."""
    image = image_of(_tree({1: 1}))
    known = Draft(image)
    again, number = known.known(Content(space=1, size_bytes=4096))
    assert (again is image.contents[1], number) == (True, 2)
    assert known.known(Content(space=1, size_bytes=0))[1] is None
    assert known.known(Content(space=2, size_bytes=4096))[1] is None
    assert known.known(SharedMemory(space=2, kind="anon", size_bytes=4096))[1] is None


@pytest.mark.parametrize("beyond", [Unchanged(first=1, count=3), Unchanged(first=3, count=1)])
def test_a_draft_has_no_more_than_it_has(beyond: Unchanged):
    known = Draft(image_of(_tree({1: 1})))
    with pytest.raises(ImageError, match="which has 3"):
        known.expanded(beyond)


def test_no_image_refers_to_a_draft():
    image = image_of(_tree({}))
    with pytest.raises(ImageError, match="there is none"):
        image.add(Unchanged(first=0, count=1))


def test_what_a_child_has_had_of_its_parent_is_not_asked_again():
    child = AddressSpace(space=2, vmas=[], exe=0, layout=[0] * 11, auxv=b"")
    drafted = replace(child, copy_of=1, dropped=[(0x1000, 0x2000)])
    known = Draft(image_of([HEAD, replace(child, space=1), drafted]))
    again, number = known.known(child)
    assert (again, number) == (child, 2)
    assert grown(drafted) == child
    assert known.known(replace(child, dropped=[(0x3000, 0x4000)]))[1] is None
