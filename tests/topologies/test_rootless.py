"""Topologies that a plain user can make without newuidmap: dumped and restored by that user, right from inside.

The user has no capability on the host. The tree comes back in a pid namespace of its own, with the numbers it had.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import Level, Setting
from tests.harness.tree import ROOT, Tree, reap
from tests.topologies.catalogue import Step, Steps, fork, ids, ns

pytestmark = pytest.mark.root  # root becomes the user

UID, GID = 1234, 2345
PLAIN = Setting("plain", host_ids=(UID, GID))
ROOT_OF_ONE_ID = Setting(
    "root of one id", (Level((f"0 {UID} 1",), (f"0 {GID} 1",), "deny"),), host_ids=(UID, GID)
)


def own(uid: int, gid: int, around_uid: int = UID, around_gid: int = GID) -> Step:
    """A user namespace of one id."""
    return ["user", f"{uid} {around_uid} 1", f"{gid} {around_gid} 1", "deny"]


#: all in namespaces of the user's own: who was in the host's user namespace sees the cradle's map afterwards
ROOTLESS: dict[str, Steps] = {
    "one id": [own(0, 0)],
    "one id, itself": [own(UID, GID), fork("child")],
    "one id, another": [own(77, 78)],
    "five levels": [own(0, 0), *[own(n, n, n - 1, n - 1) for n in range(1, 5)]],
    "siblings": [
        own(0, 0),
        fork("one", own(0, 0, 0, 0)),
        fork("two", own(5, 6, 0, 0)),
        fork("three", own(0, 0, 0, 0), ns("uts")),
    ],
    "child higher than its parent": [own(0, 0), fork("child"), own(0, 0, 0, 0)],
    "child deeper": [own(0, 0), fork("child", own(7, 8, 0, 0), fork("grandchild"))],
    "less capabilities": [own(0, 0), ["bound", 21], fork("child", ["drop"]), ["securebits", 0x2F]],
    "own id in a second namespace": [own(0, 0), own(UID, GID, 0, 0), ns("uts", "ipc"), ["hostname", "inner"]],
    "network": [own(0, 0), ns("net"), fork("child")],
    "all kinds": [own(0, 0), ns("uts", "ipc", "net", "cgroup", "mnt"), ["hostname", "all"], fork("child")],
    "time": [own(0, 0), ns("time"), fork("child")],
    "pid namespace": [own(0, 0), ns("pid"), fork("init", fork("child"))],
    "container": [
        own(0, 0),
        ns("pid", "uts", "ipc", "net", "cgroup"),
        fork("init", ns("mnt"), ["proc"], ["hostname", "box"], fork("job", own(33, 33, 0, 0), ["thread"])),
    ],
    "container with a root of its own": [
        own(0, 0),
        ns("pid", "uts", "ipc", "net", "cgroup"),
        fork("init", ns("mnt"), ["pivot"], ["proc"], fork("job")),
    ],
    "container in a container": [
        own(0, 0),
        ns("pid", "uts"),
        fork(
            "init",
            ns("mnt"),
            ["proc"],
            own(0, 0, 0, 0),
            ns("pid", "uts"),
            fork("inner", ns("mnt"), ["proc"], fork("job", ids(None))),
        ),
    ],
}


#: programs whose state a plain user can carry; `mappings`, `files` and `sharing` are refused (memfds without a
#: descriptor, deleted mapped files), and the others want more ids than one, or see the host's namespaces
STATES = (
    "anonymous", "attributes", "clocks", "datagrams", "deadlines", "firewalled", "held_namespaces", "identity",
    "mounted", "networks", "pipes", "processes", "showing", "signals", "sockets", "sysv", "terminal", "threads",
)  # fmt: skip


@pytest.fixture(scope="module")
def user_python() -> str:
    """A Python of our version that every uid may execute, with what is installed here."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or "/bin/false"
    done = as_user(python, "-c", "import sys, pipeline.dump; print(sys.version_info[:2])")
    if done.stdout.strip() != str(sys.version_info[:2]):
        pytest.skip(f"another uid has no Python like ours: {done.stdout} {done.stderr[-200:]}")
    return python


def as_user(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    become = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]
    return subprocess.run(
        [*become, *map(str, command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environ,
        cwd="/",
    )


@pytest.mark.parametrize("name", ROOTLESS)
def test_topology_of_a_plain_user_is_carried(user_python: str, start: Callable[..., Tree], name: str) -> None:
    carry_as_user(user_python, start("topology", PLAIN, [json.dumps(ROOTLESS[name])]))


@pytest.mark.parametrize("program", STATES)
def test_state_of_a_plain_user_is_carried(user_python: str, start: Callable[..., Tree], program: str) -> None:
    carry_as_user(user_python, start(program, ROOT_OF_ONE_ID))


@pytest.mark.parametrize("name", ["one id", "pid namespace", "container", "container in a container"])
def test_topology_of_a_plain_user_is_carried_twice(
    user_python: str, start: Callable[..., Tree], name: str
) -> None:
    """What a restore has made around the tree is not in the second image."""
    tree = start("topology", PLAIN, [json.dumps(ROOTLESS[name])])
    carry_as_user(user_python, tree)
    depth = numbers(tree.pid)
    carry_as_user(user_python, tree)
    assert numbers(tree.pid)[1:] == depth[1:]


def test_clocks_of_a_plain_user_are_kept_twice(user_python: str, start: Callable[..., Tree]) -> None:
    tree = start("deadlines", ROOT_OF_ONE_ID)
    own = os.stat("/proc/self/ns/time").st_ino
    for _ in range(2):
        carry_as_user(user_python, tree, "--clocks", "keep")
        assert os.stat(f"/proc/{tree.pid}/ns/time").st_ino != own


def numbers(pid: int) -> list[str]:
    """What a process is called in every pid namespace around it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith("NSpid:"))


def carry_as_user(user_python: str, tree: Tree, *options: str) -> None:
    """Dump a tree and restore it, as its user."""
    family = tree.pids()
    image, pidfile = tree.directory / "image", tree.directory / "pid"
    engine = [user_python, "-m", "pipeline"]
    done = as_user(*engine, "dump", "--pid", str(tree.pid), "--to", image)
    assert done.returncode == 0, done.stderr
    assert not reap(family), "the dump left the tree running"
    done = as_user(*engine, "restore", "--from", image, "--detach", "--pidfile", pidfile, *options)
    assert done.returncode == 0, done.stderr
    tree.pid = int(pidfile.read_text())
    pidfile.unlink()
    tree.check()
    shutil.rmtree(image)
