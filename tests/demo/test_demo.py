"""The whole demo, as `make demo` runs it, and as a plain user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.userns import cradle


def judge(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [check for check in document["checks"] if not check["ok"]] == []
    assert document["ok"]
    assert len(document["before"]) == len(document["after"]) == 4
    assert {"downtime", "transferred", "total-time"} <= set(document["figures"])
    assert document["client"]["wrong"] == 0


@pytest.mark.skipif(not cradle.is_privileged(), reason="hosts of their own need CAP_SYS_ADMIN")
def test_the_tree_moves_and_everything_holds() -> None:
    judge(
        subprocess.run(
            [sys.executable, "-m", "pipeline", "demo", "--json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
    )


def test_a_plain_user_sees_the_same_and_is_told_where() -> None:
    command = [sys.executable, "-m", "pipeline", "demo", "--json"]
    environ = dict(os.environ)
    if os.geteuid() == 0:
        # another uid must be able to execute Python and to import what is installed here
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
        version = subprocess.run(
            [python or "false", "-c", "import sys; print(sys.version_info[:2])"],
            capture_output=True,
            check=False,
        ).stdout.decode()
        if version.strip() != str(sys.version_info[:2]) or shutil.which("setpriv") is None:
            pytest.skip(f"no {sys.version_info[:2]} that every uid may execute: {version.strip()!r}")
        command = ["setpriv", "--reuid=1234", "--regid=1235", "--clear-groups", str(python), *command[1:]]
        environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env=environ,
        cwd=os.environ["TMPDIR"],
    )
    if "No module named" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"another uid cannot read what is installed here: {done.stderr.splitlines()[-1]}")
    judge(done)
    assert "as a plain user" in done.stderr
