"""Ids are found by type, wherever they are; nothing that may hold one is passed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import pytest
from msgspec import Meta, Struct

from pipeline.image.schema import AnyRecord, Id
from pipeline.resources.registry import kinds
from pipeline.stages import translate
from pipeline.stages.translate import change_ids

Ids = Annotated[list[Id], Meta(max_length=3)]


class Leaf(Struct, frozen=True):
    number: int = 0
    gid: Id | None = None


class Inner(Leaf, frozen=True):
    leaves: tuple[Leaf, ...] = ()


class Outer(Struct, frozen=True):
    plain: list[int] = []
    uid: Id | None = None
    groups: Ids = []
    inner: Inner | None = None
    pairs: list[tuple[int, Id]] = []
    anything: Any = None


class Plain(Struct, frozen=True):
    numbers: list[tuple[int, int]] = []


def _moved(value: Any) -> Any:
    """With the kind of each id for its namespace: 1 for a uid, 2 for a gid."""
    return change_ids(value, lambda kind: lambda one: Id(1 if kind == "uid" else 2, one.id))


def test_ids_are_found_at_any_depth():
    leaf = Leaf(1, Id(0, 4))
    outer = Outer(
        [1], Id(0, 5), [Id(0, 6), Id(0, 7)], Inner(2, Id(0, 8), (leaf,)), [(3, Id(0, 9))], [Id(0, 10)]
    )
    assert _moved(outer) == Outer(
        [1],
        Id(1, 5),
        [Id(2, 6), Id(2, 7)],
        Inner(2, Id(2, 8), (Leaf(1, Id(2, 4)),)),
        [(3, Id(1, 9))],
        [Id(1, 10)],
    )


@pytest.mark.parametrize("value", [Plain([(1, 2)]), Outer([3]), Leaf(4), [Leaf(5)], None, b"x"])
def test_what_has_no_ids_stays_itself(value: Any):
    assert _moved(value) is value


def _evaluated(hint: Any) -> bool:
    """Whether a type may hold ids, by its annotations as they are evaluated."""
    if hint is Any or (isinstance(hint, type) and issubclass(hint, Id)):
        return True
    if isinstance(hint, type) and issubclass(hint, Struct):
        return any(_fields(hint))
    return any(map(_evaluated, get_args(hint)))


def _fields(kind: type[Struct]) -> Iterator[str]:
    return (name for name, hint in get_type_hints(kind, include_extras=True).items() if _evaluated(hint))


@pytest.mark.parametrize(
    "kind",
    [*get_args(AnyRecord), *dict.fromkeys(kind.record for kind in kinds()), Outer, Inner],
    ids=lambda kind: kind.__name__,
)
def test_every_field_with_ids_is_looked_through(kind: type[Struct]):
    assert {name for name, _ in translate._fields_with_ids(kind)} == set(_fields(kind))


def test_it_is_known_before_a_tree_stands_still():
    translate._fields_with_ids.cache_clear()
    translate.prepare(kind.record for kind in kinds())
    before = translate._fields_with_ids.cache_info().misses
    for kind in (*get_args(AnyRecord), *(kind.record for kind in kinds())):
        assert issubclass(kind, msgspec.Struct)
        translate._fields_with_ids(kind)
    assert translate._fields_with_ids.cache_info().misses == before
