"""The forest: what an id of one namespace is in another."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ImageError
from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.userns.forest import MAX_DEPTH, Forest
from tests.userns.forests import forests

SMALL = Forest(
    [
        UserNamespace(index=0),
        UserNamespace(index=1, parent=0, uid_map=[Extent(0, 100_000, 65_536)], gid_map=[Extent(5, 7, 1)]),
        UserNamespace(index=2, parent=1, uid_map=[Extent(0, 1000, 100)], gid_map=[Extent(9, 5, 1)]),
        UserNamespace(index=3, parent=1, uid_map=[Extent(1, 2000, 1)]),
        UserNamespace(index=4, parent=0, uid_map=[Extent(3, 101_050, 1)]),
    ]
)


@pytest.mark.parametrize(
    ("wanted", "namespace", "kind", "number"),
    [
        (Id(2, 0), 0, "uid", 101_000),
        (Id(2, 99), 0, "uid", 101_099),
        (Id(2, 100), 0, "uid", None),
        (Id(0, 101_099), 2, "uid", 99),
        (Id(0, 101_100), 2, "uid", None),
        (Id(2, 50), 4, "uid", 3),
        (Id(4, 3), 2, "uid", 50),
        (Id(3, 1), 2, "uid", None),
        (Id(3, 1), 1, "uid", 2000),
        (Id(2, 9), 0, "gid", 7),
        (Id(2, 9), 1, "gid", 5),
        (Id(3, 0), 0, "gid", None),
        (Id(1, 12), 1, "uid", 12),
    ],
)
def test_an_id_in_another_namespace(wanted: Id, namespace: int, kind: str, number: int | None) -> None:
    assert SMALL.number_in(wanted, namespace, kind) == number  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("external", "holder", "found"),
    [
        (101_000, 2, Id(2, 0)),
        (101_100, 2, Id(1, 1100)),
        (0, 2, Id(0, 0)),
        (101_050, 2, Id(2, 50)),
        (101_050, 4, Id(4, 3)),
        (102_000, 3, Id(3, 1)),
    ],
)
def test_an_id_from_outside_is_said_in_the_innermost_namespace(external: int, holder: int, found: Id) -> None:
    assert SMALL.innermost(external, holder, "uid") == found


@settings(max_examples=50)
@given(forests(), st.integers(0, 300_000), st.data())
def test_an_id_from_outside_comes_out_again(forest: Forest, external: int, data: st.DataObject) -> None:
    holder = data.draw(st.sampled_from(sorted(forest.namespaces)))
    found = forest.innermost(external, holder, "uid")
    assert forest.number_in(found, 0, "uid") == external
    assert forest.is_within(holder, found.ns)
    for namespace in forest.ancestors(holder):
        if namespace == found.ns:
            break
        assert forest.number_in(found, namespace, "uid") is None


@settings(max_examples=50)
@given(forests(), st.data())
def test_translation_goes_by_way_of_namespace_0(forest: Forest, data: st.DataObject) -> None:
    names = sorted(forest.namespaces)
    one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    for number in range(0, 2000, 97):
        outside = forest.number_in(Id(one, number), 0, "gid")
        if outside is not None and one != other and not forest.is_within(one, other):
            expected = forest.number_in(Id(0, outside), other, "gid")
            assert forest.number_in(Id(one, number), other, "gid") == expected
    assert forest.to_ancestor(one, 0, "gid").up(5) == forest.number_in(Id(one, 5), 0, "gid")


@settings(max_examples=50)
@given(forests())
def test_every_creator_is_mapped_where_it_is(forest: Forest) -> None:
    for namespace in forest.namespaces.values():
        if namespace.owner is not None and namespace.parent is not None:
            assert forest.number_in(namespace.owner, namespace.parent, "uid") is not None


def test_is_within() -> None:
    assert SMALL.is_within(2, 1)
    assert SMALL.is_within(2, 2)
    assert SMALL.is_within(4, 0)
    assert not SMALL.is_within(4, 1)
    with pytest.raises(ValueError, match="no ancestor"):
        SMALL.to_ancestor(2, 4, "uid")


def test_a_missing_parent_and_a_ring_are_refused() -> None:
    with pytest.raises(ImageError, match="user namespace 7 is not part"):
        Forest([UserNamespace(index=1, parent=7)])
    with pytest.raises(ImageError, match="ring"):
        Forest([UserNamespace(index=1, parent=2), UserNamespace(index=2, parent=1)])


def test_an_id_of_a_namespace_that_is_not_there_is_refused() -> None:
    with pytest.raises(ImageError, match="user namespace 9 is not part"):
        SMALL.number_in(Id(9, 0), 0, "uid")


def test_depth_is_bounded_as_the_kernel_does() -> None:
    def chain(depth: int) -> list[UserNamespace]:
        return [UserNamespace(index=n, parent=n - 1 if n else None) for n in range(depth + 1)]

    assert len(list(Forest(chain(MAX_DEPTH)).ancestors(MAX_DEPTH))) == MAX_DEPTH + 1
    with pytest.raises(ImageError, match="deeper than 33"):
        Forest(chain(MAX_DEPTH + 1))
