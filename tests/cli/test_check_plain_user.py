"""What `check` tells a plain user: the ids a tree can have, and for each missing thing what an administrator types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tree import Workshop
from tests.harness.users import User, Users

pytestmark = [
    pytest.mark.root,  # root becomes the users
    pytest.mark.skipif(not shutil.which("newuidmap"), reason="needs newuidmap (Debian: uidmap)"),
]

ALICE = User("alice", 61_301, 62_301, [(300_000, 10), (300_020, 1)], [(400_000, 65_536)])
CAROL = User("carol", 61_303, 62_303)
NOBODY_KNOWS = User("", 61_399, 62_399)


@pytest.fixture
def users(nothing_left_behind: None, workshop: Workshop) -> Iterator[Users]:
    users = Users(workshop.directory(), ALICE, CAROL)
    try:
        yield users
    finally:
        users.close()


def rows(command: list[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)["host"]}


def test_ids_that_a_tree_can_have(users: Users) -> None:
    code, found = rows(users.engine_command(ALICE, "check", "--json"))
    assert code == 0
    assert found["/etc/subuid"]["detail"] == "alice has 300000-300009, 300020"
    assert found["ids of a tree"]["detail"] == "uid 61301, 300000-300009, 300020; gid 62301, 400000-465535"
    assert found["exact pids here"]["ok"] is False


def test_who_has_no_range_is_told_what_root_types(users: Users) -> None:
    code, found = rows(users.engine_command(CAROL, "check", "--json"))
    assert code == 0  # a tree of one id is possible
    assert found["ids of a tree"]["detail"] == "uid 61303; gid 62303"
    assert found["/etc/subuid"]["remedy"] == "as root: usermod --add-subuids 300021-365556 carol"
    assert found["/etc/subgid"]["remedy"] == "as root: usermod --add-subgids 465536-531071 carol"


def test_who_has_no_name_is_told_to_get_one(users: Users) -> None:
    code, found = rows(users.engine_command(NOBODY_KNOWS, "check", "--json"))
    assert code == 0
    assert found["/etc/subuid"]["remedy"].startswith(
        "as root: useradd --uid 61399 NAME; usermod --add-subuids "
    )


def test_newuidmap_that_is_not_there(users: Users) -> None:
    empty = users.command(ALICE, "env", "PATH=/nowhere", users.python, "-m", "pipeline", "check", "--json")
    code, found = rows(empty)
    assert code == 0
    assert found["newuidmap"]["ok"] is False
    assert "apt-get install uidmap" in found["newuidmap"]["remedy"]
    assert found["ids of a tree"]["detail"] == "uid 61301; gid 62301"


def test_newuidmap_that_may_not_do_it(users: Users) -> None:
    command = users.engine_command(ALICE, "check", "--json")
    code, found = rows(
        [*command[: command.index("env")], "setpriv", "--no-new-privs", *command[command.index("env") :]]
    )
    assert code == 1
    assert found["ids of a tree"]["ok"] is False
    assert "uid_map failed: Operation not permitted" in found["ids of a tree"]["remedy"]
    assert "no_new_privs" in found["ids of a tree"]["remedy"]


def test_user_namespaces_that_are_forbidden(users: Users, tmp_path: Path) -> None:
    """In a user namespace of its own, whose limit is 0."""
    forbid = (
        'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    )
    inside = users.command(
        ALICE, "unshare", "-U", "-r", "sh", "-c", forbid, "sh", users.python, "-m", "pipeline"
    )
    code, found = rows([*inside, "check", "--json"])
    assert code == 1
    for name in ("user namespaces", "ids of a tree"):
        assert found[name]["ok"] is False
        assert "user.max_user_namespaces is 0 here" in found[name]["remedy"]
        assert "sysctl -w user.max_user_namespaces=10000" in found[name]["remedy"]
    for command in (["run", "--userns", "--", "true"], ["restore", "--from", os.fspath(tmp_path)]):
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "sysctl -w user.max_user_namespaces=10000" in done.stderr


def test_a_map_that_is_not_granted_names_check(users: Users) -> None:
    done = users.engine(ALICE, "run", "--userns=0:61301:1,1:300000:11", "--", "true")
    assert done.returncode == 1
    assert "not allowed" in done.stderr
    assert "`check` says" in done.stderr


def test_auto_maps_all_that_the_user_has(users: Users) -> None:
    script = "cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups"
    done = users.engine(ALICE, "run", "--userns=auto", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    uids = ["0", "61301", "1", "1", "300000", "10", "11", "300020", "1"]
    assert done.stdout.split() == [*uids, "0", "62301", "1", "1", "400000", "65536", "allow"]
    for options, code, words in (
        (["--userns=auto"], 1, "as root: usermod --add-subuids 300021-365556"),
        (["--userns", "--userns=auto"], 2, "for the outermost user namespace only"),
    ):
        done = users.engine(CAROL, "run", *options, "--", "true")
        assert done.returncode == code, done.stderr
        assert words in done.stderr
