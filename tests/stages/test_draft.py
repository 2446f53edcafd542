"""What becomes of the processes of a draft: who stays, who is ended, who is born."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pipeline.image.codec import Image
from pipeline.image.numbers import puppet_descriptors
from pipeline.image.schema import FdEntry, Process, Together
from pipeline.stages import draft
from tests.image.test_codec import HEAD
from tests.image.test_graft import image, space
from tests.image.test_plan import process

ROOT = process([10], space=1)


def tree(*others: Process, exes: dict[int, int] | None = None) -> Image:
    """A tree below pid 10; `exes`: the executables of spaces, 0 if not given."""
    processes = [ROOT, *others]
    spaces = [replace(space(one.space), exe=(exes or {}).get(one.space, 0)) for one in processes if one.space]
    found = image(*processes, spaces=tuple(spaces))
    found.add(HEAD)
    return found


def leaf(pid: int, parent: int = 10, **options: int) -> Process:
    return process([pid], parent, space=pid, **options)


def becomes(before: Image, after: Image) -> tuple[list[int], list[int]]:
    """Who is ended, in order, and who is born."""
    found = draft.mending(before, after)
    assert not found.reasons
    born = [step.pid for step in found.births.steps if type(step).__name__ == "Spawn"]
    return list(found.ended), born


def test_nobody_ends_where_nothing_has_changed() -> None:
    assert becomes(tree(leaf(11)), tree(leaf(11))) == ([], [])


def test_who_has_ended_is_ended_and_who_is_new_is_born() -> None:
    assert becomes(tree(leaf(11), leaf(12, 11)), tree(leaf(13), leaf(14, 13))) == ([12, 11], [13, 14])


def test_children_are_ended_before_their_parents_wherever_they_stand() -> None:
    before = tree(leaf(12, 11), leaf(11))
    assert becomes(before, tree())[0] == [12, 11]


def test_a_process_that_is_a_zombie_by_now_is_born_as_one() -> None:
    assert becomes(tree(leaf(11)), tree(process([11], 10, state="zombie"))) == ([11], [11])


def test_with_a_process_that_is_born_anew_go_its_children() -> None:
    before, after = tree(leaf(11), leaf(12, 11)), tree(leaf(11), leaf(12, 11), exes={11: 1})
    assert becomes(before, after) == ([12, 11], [11, 12])


def test_a_number_by_which_a_group_is_called_is_not_free() -> None:
    """The members of the group of a process that is born anew are born anew, too; and their children."""
    others = [leaf(11, pgid=11), leaf(12, pgid=11), leaf(13, 12, pgid=13), leaf(14)]
    assert becomes(tree(*others), tree(*others, exes={11: 1})) == ([13, 12, 11], [11, 12, 13])


def test_a_group_whose_leader_has_ended_for_good_stays() -> None:
    assert becomes(tree(leaf(11, pgid=11), leaf(12, pgid=11)), tree(leaf(12, pgid=11))) == ([11], [])


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (tree(), tree(exes={1: 1}), "its first process"),
        (tree(), tree(leaf(11, sid=7)), "in a session that its parent is not in"),
        (tree(), tree(replace(leaf(11), cgroups=[3])), "in a cgroup where none was"),
        (tree(), tree(leaf(11, 0)), "its parent is not there before it"),
        (tree(), tree(leaf(12, 11), leaf(11)), "its parent is not there before it"),
        (tree(leaf(11, 0)), tree(), "a process without a parent"),
        (tree(replace(leaf(11), together=Together(files=10))), tree(), "share memory or descriptors"),
    ],
)
def test_what_cannot_be_mended_is_said(before: Image, after: Image, why: str) -> None:
    assert why in "; ".join(draft.mending(before, after).reasons)


def test_a_descriptor_where_who_builds_it_has_its_own_cannot_be_mended() -> None:
    def having(*numbers: int) -> Image:
        return tree(replace(leaf(11), fds=[FdEntry(number, 1, False) for number in numbers]))

    own = puppet_descriptors(having(3), draft.SPARE_DESCRIPTORS)
    assert not draft.mending(having(3), having(3, own.stop)).reasons
    for number in own:
        assert "under a number that who builds it has" in "; ".join(
            draft.mending(having(3), having(3, number)).reasons
        )
