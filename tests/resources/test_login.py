"""The login uid of a process is kept where the kernel allows it, and where it does not, that is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, said

pytestmark = pytest.mark.root


def login_of(pid: int) -> str:
    return Path(f"/proc/{pid}/loginuid").read_text()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_a_login_is_kept(start: Callable[..., Tree], tmp_path: Path, setting: Setting) -> None:
    tree = start("attributes", setting)
    login = login_of(tree.pid)
    assert login != login_of(1)
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    assert login_of(tree.pid) == login
    assert "note" not in done.stderr


def test_a_login_that_may_not_be_taken_is_named(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("attributes", DEPTH_1)
    (number,) = {int(login_of(tree.pid))}
    dump(tree, tmp_path / "image")
    restore = [sys.executable, "-m", "pipeline", "restore", "--from", str(tmp_path / "image"), "--detach"]
    logged_in = 'echo 4321 > /proc/self/loginuid; exec setpriv --bounding-set -audit_control "$@"'
    done = subprocess.run(
        ["sh", "-c", logged_in, "sh", *restore],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert login_of(tree.pid) == "4321"
    inside = number - 100_000
    assert (
        f"restore: note: pid {tree.pid}: its login (uid {inside} of user namespace 1) becomes the restorer's: another "
        "than the restorer's takes CAP_AUDIT_CONTROL on the host"
    ) in done.stderr
    tree.check()
