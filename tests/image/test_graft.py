"""Births into a tree that stands: what a parent can still give, and what not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pipeline.image.codec import Image
from pipeline.image.graft import graft
from pipeline.image.schema import AddressSpace, Process, Together
from pipeline.image.steps import Become, Fill, FoundSession, Inherit, JoinGroup, Spawn
from tests.image.test_plan import PID, USER, process

LAYOUT = [0] * 11


def space(number: int, copy_of: int | None = None) -> AddressSpace:
    return AddressSpace(
        space=number, vmas=[], exe=0, layout=LAYOUT, auxv=b"", dumpable=1, coredump_filter=0, copy_of=copy_of
    )


def image(*processes: Process, spaces: tuple[AddressSpace, ...] = ()) -> Image:
    found = Image()
    found.processes = {one.pids[0]: one for one in processes}
    found.spaces = {one.space: one for one in spaces}
    found.namespaces = {one.index: one for one in PID}
    found.user_namespaces = {one.index: one for one in USER}
    return found


ROOT = process([10], space=1)


def test_a_child_has_the_memory_of_its_parent_and_then_its_own_children() -> None:
    tree = image(
        ROOT,
        process([11], 10, space=2),
        process([12], 11, pgid=12, space=3),
        process([13], 10, state="zombie"),
        spaces=(space(1), space(2, copy_of=1), space(3)),
    )
    found = graft(tree, {11, 12, 13})
    assert not found.blockers
    assert found.steps == [
        Spawn(11, 10),
        Inherit(11),
        Fill(2),
        Spawn(12, 11),
        JoinGroup(12, 12),
        Become(12),
        Fill(3),
        Spawn(13, 10),
    ]


def test_a_child_founds_a_session_of_its_own_and_its_children_are_in_it() -> None:
    tree = image(ROOT, process([11], 10, sid=11, pgid=11), process([12], 11, sid=11, pgid=11))
    found = graft(tree, {11, 12})
    assert not found.blockers
    assert found.steps == [Spawn(11, 10), FoundSession(11), Become(11), Spawn(12, 11), Become(12)]


def test_groups_of_siblings_are_joined_when_all_are_born() -> None:
    tree = image(ROOT, process([11], 10, pgid=12), process([12], 10, pgid=12))
    found = graft(tree, {11, 12})
    assert not found.blockers
    assert found.steps[-1] == JoinGroup(11, 12)


@pytest.mark.parametrize(
    ("child", "others", "why"),
    [
        (process([11], 10, user=1), [], "other namespaces"),
        (process([11], 10, sid=7), [], "session that its parent is not in"),
        (process([11], 10, pgid=9), [], "whose leader is not there"),
        (process([11], 10, pgid=12), [process([12], 10, sid=12, pgid=12)], "whose leader is not there"),
        (replace(process([11], 10), together=Together(files=10)), [], "shares more"),
        (
            process([11], 10),
            [replace(process([12], 10), together=Together(fs=11))],
            "shares more",
        ),
        (replace(process([11], 10, space=2), exit_signal=0), [], "another signal"),
    ],
)
def test_what_a_parent_cannot_give_any_more_is_said(child: Process, others: list[Process], why: str) -> None:
    found = graft(image(ROOT, child, *others, spaces=(space(1), space(2))), {11})
    assert why in "; ".join(map(str, found.blockers))


def test_a_child_that_is_born_before_its_parent_has_joined_a_group_joins_it_as_well() -> None:
    tree = image(ROOT, process([11], 10, pgid=11), process([12], 10, pgid=11), process([13], 12, pgid=11))
    found = graft(tree, {12, 13})
    assert not found.blockers
    assert found.steps == [
        Spawn(12, 10), Become(12), Spawn(13, 12), Become(13), JoinGroup(12, 11), JoinGroup(13, 11),
    ]  # fmt: skip
