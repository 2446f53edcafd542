"""Where the roots of a forest lie at the destination: laws of the placing, and trees moved for real."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RebuildError
from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.userns.destination import pieces, place
from pipeline.userns.forest import Forest
from tests.harness.settings import DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, dump, engine, said

LINES = st.lists(
    st.builds(Extent, st.integers(0, 500), st.integers(0, 500), st.integers(1, 40)), min_size=1, max_size=8
)


def inside(number: int, ranges: list[tuple[int, int]]) -> bool:
    return any(first <= number < first + count for first, count in ranges)


# -- the core ---------------------------------------------------------------------------


@given(LINES)
def test_pieces_cover_what_lines_cover_and_no_line_is_split(lines: list[Extent]) -> None:
    found = pieces(lines)
    for number in range(600):
        covered = any(line.lower <= number < line.lower + line.count for line in lines)
        assert covered == inside(number, found)
    for line in lines:
        whole = [first <= line.lower and line.lower + line.count <= first + count for first, count in found]
        assert whole.count(True) == 1
    for (first, count), (after, _) in pairwise(found):
        assert first + count <= after


@given(LINES, st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_placing_keeps_apart_what_was_apart_and_stays_in_the_ranges(
    lines: list[Extent], sizes: list[int]
) -> None:
    ranges = [(10_000 * (number + 1), size) for number, size in enumerate(sizes)]
    wanted = pieces(lines)
    try:
        outside = place(wanted, ranges, "uid")
    except RebuildError:
        assert max(count for _, count in wanted) > max(sizes) or sum(c for _, c in wanted) > min(sizes)
        return
    placed = [outside.up(number) for number in range(600)]
    assert [number is not None for number in placed] == [inside(number, wanted) for number in range(600)]
    numbers = [number for number in placed if number is not None]
    assert len(set(numbers)) == len(numbers)
    assert all(inside(number, ranges) for number in numbers)


@given(st.integers(0, 70_000), st.integers(0, 100))
def test_inside_the_forest_nothing_changes(outer: int, inner: int) -> None:
    namespaces = [
        UserNamespace(index=0),
        UserNamespace(index=1, parent=0, uid_map=[Extent(0, 100_000, 65_536)]),
        UserNamespace(index=2, parent=1, uid_map=[Extent(5, 1_000, 50)]),
    ]
    here = Forest(namespaces)
    there = Forest(
        namespaces,
        {
            "uid": place(pieces(namespaces[1].uid_map), [(7, 1), (300_000, 65_536)], "uid"),
            "gid": place([], [], "gid"),
        },
    )
    for wanted, namespace in ((Id(2, inner), 1), (Id(1, outer), 2), (Id(2, inner), 2)):
        assert here.number_in(wanted, namespace, "uid") == there.number_in(wanted, namespace, "uid")
    before, after = (forest.number_in(Id(1, outer), 0, "uid") for forest in (here, there))
    assert (before is None) == (after is None)
    assert before is None or after == before + 200_000
    assert there.number_in(Id(0, 5), 0, "uid") is None


def test_the_lines_that_are_written_are_those_of_the_roots_moved() -> None:
    root = UserNamespace(
        index=1,
        parent=0,
        uid_map=[Extent(0, 1000, 1), Extent(1, 100_000, 9)],
        gid_map=[Extent(3, 3, 3)],
    )
    below = UserNamespace(index=2, parent=1, uid_map=[Extent(0, 1, 1)])
    forest = Forest(
        [UserNamespace(index=0), root, below],
        {
            "uid": place(pieces(root.uid_map), [(1234, 1), (50, 9)], "uid"),
            "gid": place(pieces(root.gid_map), [(90, 9)], "gid"),
        },
    )
    assert forest.lines_of(1, "uid").text() == b"0 1234 1\n1 50 9"
    assert forest.lines_of(1, "gid").text() == b"3 90 3"
    assert forest.lines_of(2, "uid").text() == b"0 1 1"


# -- trees --------------------------------------------------------------------------------


def maps_of(pid: int) -> list[list[str]]:
    return [Path(f"/proc/{pid}/{name}").read_text().split() for name in ("uid_map", "gid_map")]


def restored(tree: Tree, image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return engine("restore", "--from", image, "--detach", "--pidfile", tree.directory / "pid", *options)


@pytest.mark.root
@pytest.mark.parametrize(
    ("program", "setting"),
    [
        ("credentials", DEPTH_1),
        ("pipes", DEPTH_1),
        ("anonymous", DEPTH_2),
        ("namespaced", DEPTH_2),
        ("levels", DEPTH_2),
    ],
)  # whoever is in a root of the forest can read in its own map where it lies
def test_a_tree_lies_elsewhere_and_does_not_see_it(
    start: Callable[..., Tree], tmp_path: Path, program: str, setting: Setting
) -> None:
    tree = start(program, setting)
    dump(tree, tmp_path / "image")
    done = restored(tree, tmp_path / "image", "--map", "3000000:65536")
    assert done.returncode == 0, said(done)
    uids, gids = maps_of(tree.pid)
    offset = 0 if setting is DEPTH_1 else 1000
    assert (uids[1], gids[1]) == (str(3_000_000 + offset), str(3_000_000 + 2 * offset))
    tree.check()


@pytest.mark.root
def test_ids_from_outside_have_no_place_elsewhere_but_by_the_policy(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("unplaced")
    image = tmp_path / "image"
    inside = max(tree.pids())
    dump(tree, image)
    done = restored(tree, image, "--map", "3000000:2000")
    assert done.returncode == 3, said(done)
    for words in (
        f"pid {inside}: its uid uid 91 of the surroundings",
        "its gid gid 92",
        "--unmapped overflow",
    ):
        assert words in done.stderr, said(done)
    assert not Path(f"/proc/{tree.pid}").exists()
    done = restored(tree, image, "--map", "3000000:2000", "--unmapped", "overflow")
    assert done.returncode == 0, said(done)
    assert maps_of(inside) == [["0", "3000000", "50"], ["0", "3000000", "50"]]
    lines = Path(f"/proc/{inside}/status").read_text().splitlines()
    assert [line.split()[1:] for line in lines if line.startswith(("Uid:", "Groups:"))] == [
        ["65534"] * 4,
        ["65534"],
    ]


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--map", "3000000:100"), 1, "65536 uids from 100000 on find no place in one piece"),
        (("--map", "3000000"), 2, "say same, auto, or BASE:COUNT"),
        (("--map", "4294967290:65536"), 2, "not all of these uids exist"),
        (("--unmapped", "perhaps"), 2, "invalid choice: 'perhaps'"),
    ],
)
def test_what_cannot_be_placed_is_said_and_nothing_is_left(
    start: Callable[..., Tree], tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    tree = start("quiet", DEPTH_1)
    dump(tree, tmp_path / "image")
    done = restored(tree, tmp_path / "image", *options)
    assert done.returncode == code, said(done)
    assert words in done.stderr
    assert not Path(f"/proc/{tree.pid}").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--map", "elsewhere"], "--map elsewhere: say same, auto, or BASE:COUNT"),
        (["--map", "4294967290:100"], "not all of these uids exist"),
    ],
)
def test_a_destination_that_cannot_be_meant_is_said_before_anybody_is_listened_to(
    options: list[str], words: str
) -> None:
    done = engine("serve", "--listen", "127.0.0.1:0", *options)
    assert done.returncode == 2, said(done)
    assert words in done.stderr
    assert not done.stdout
