"""The picture of a forest: of a fixed one, word by word, and of a tree that lives and of its image."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import forest
from pipeline.image.schema import Credentials, Extent, Id, Memberships, Namespace, UserNamespace
from pipeline.resources.namespaces.members import KINDS
from pipeline.userns.portrait import OVERFLOW_ID, Sitter, paint
from tests.harness.settings import DEPTH_0, DEPTH_1
from tests.harness.tree import Tree, dump, engine, said


def sitter(pids: list[int], user: int, uid: Id, gid: Id, **namespaces: int) -> Sitter:
    members = {kind: KINDS.index(kind) for kind in KINDS} | namespaces
    return Sitter(
        pids,
        f"p{pids[0]}",
        Memberships(user=user, pid_for_children=members["pid"], time_for_children=6, **members),
        Credentials(
            userns=user,
            uids=[uid] * 4,
            gids=[gid] * 4,
            groups=[],
            caps=[0] * 5,
            securebits=0,
            no_new_privs=False,
        ),
    )


def test_a_fixed_forest_word_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    users = [
        UserNamespace(index=0),
        UserNamespace(
            index=1,
            parent=0,
            owner=Id(0, 1000),
            uid_map=[Extent(0, 100_000, 65_536)],
            gid_map=[Extent(0, 100_000, 65_536)],
        ),
        UserNamespace(index=2, parent=0, owner=Id(0, 0)),
        UserNamespace(
            index=3,
            parent=1,
            owner=Id(1, 7),
            uid_map=[Extent(0, 1000, 100)],
            gid_map=[Extent(0, 2000, 9)],
            setgroups="deny",
        ),
    ]
    namespaces = [Namespace(index=n, kind=kind, external=True) for n, kind in enumerate(KINDS)]
    namespaces.append(Namespace(index=7, kind="pid", external=False, owner=1, parent=0))
    sitters = [
        sitter([50], 1, Id(1, 0), Id(1, 0)),
        sitter([51, 1], 3, Id(1, 1100), Id(3, 5), pid=7),
    ]
    forest.draw(paint(users, namespaces, sitters))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Namespaces",
        "└── user namespace 0  external: the surroundings of the tree",
        "    ├── external: pid, mnt, uts, ipc, net, cgroup, time",
        "    ├── user namespace 1  uid `0 100000 65536`  made by uid 1000",
        "    │   ├── 50 p50  uid 0, gid 0",
        "    │   ├── owns pid namespace 7 inside 0: pid 51",
        "    │   └── user namespace 3  uid `0 1000 100`  gid `0 2000 9`  setgroups denied  made by uid 7",
        "    │       └── 51 / 1 p51  uid 65534, gid 5",
        "    └── user namespace 2  uid not mapped yet  made by uid 0  (nobody lives in it)",
        (
            "pid 51 (p51): its real uid shows as 65534 in user namespace 3: it is 1100 of user namespace 1, which has "
            "no mapping there; the next line of the map is `0 1000 100`"
        ),
    ]


@pytest.mark.root
def test_a_tree_and_its_image_give_the_same_picture(start: Callable[..., Tree], tmp_path: Path) -> None:
    steps = [
        ["fork", "aside", [["ids", 44, 45, [7]], ["around", "0 1000 10", "0 1000 10", "allow"]]],
        ["user", "0 100000 65536", "0 100000 65536", "allow"],
        ["ns", ["uts", "pid"]],
        ["fork", "init", [["user", "0 1000 100", "0 2000 100", "deny"], ["ids", 3, 4, None]]],
    ]
    tree = start("topology", DEPTH_0, [json.dumps(steps)])

    def answer(*words: str | Path) -> subprocess.CompletedProcess[str]:
        done = engine(*words)
        assert done.returncode in {0, 1}, said(done)  # 1: this host lacks something
        return done

    live = json.loads(answer("check", "--pid", str(tree.pid), "--json").stdout)["namespaces"]
    image = tmp_path / "image"
    dump(tree, image)
    assert json.loads(answer("inspect", image, "--namespaces", "--json").stdout) == live
    main, aside, init = live["user-namespaces"][1:4][0], live["unmapped"], live["user-namespaces"]
    assert main["uid_map"] == ["0 100000 65536"]
    assert {(found["what"], found["id"]) for found in aside} == {
        ("real uid", 44),
        ("real gid", 45),
        ("supplementary group", 7),
    }
    residents = [resident for house in init for resident in house["residents"]]
    assert sorted(r["uid"] for r in residents) == [0, 3, OVERFLOW_ID]
    text = answer("inspect", image, "--namespaces").stdout
    assert "shows as 65534 in user namespace" in text
    assert "setgroups denied" in text


@pytest.mark.root
@pytest.mark.parametrize("program", ["held_namespaces", "showing"])
def test_namespaces_that_are_only_held_are_in_both_pictures(
    start: Callable[..., Tree], tmp_path: Path, program: str
) -> None:
    tree = start(program, DEPTH_1)
    live = json.loads(engine("check", "--pid", tree.pid, "--json").stdout)["namespaces"]
    dump(tree, tmp_path / "image")
    assert json.loads(engine("inspect", tmp_path / "image", "--namespaces", "--json").stdout) == live
    empty = [house for house in live["user-namespaces"] if not house["residents"] and house["index"]]
    assert empty
