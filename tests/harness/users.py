"""Plain users with ranges of subordinate ids: a mount namespace with its own /etc/passwd, /etc/subuid, /etc/subgid.

Nothing of it is seen outside of that namespace, which ends with the process that holds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.tree import ROOT

_HOLD = "import signal; print('up', flush=True); signal.pause()"


class User(NamedTuple):
    """A user of this machine, for one test. `uids`, `gids`: first id and count of each range."""

    name: str
    uid: int
    gid: int
    uids: Sequence[tuple[int, int]] = ()
    gids: Sequence[tuple[int, int]] = ()


class Users:
    """A running mount namespace in which `users` exist; `close` ends it.

    Args:
        directory: for the files that lie over those of /etc; every uid can reach it.
    """

    def __init__(self, directory: Path, *users: User) -> None:
        self.python = python_for_all()
        entries = [f"{u.name}:x:{u.uid}:{u.gid}::/:/bin/sh" for u in users]
        files = {
            "passwd": [*Path("/etc/passwd").read_text().splitlines(), *entries],
            "subuid": [f"{u.name}:{first}:{count}" for u in users for first, count in u.uids],
            "subgid": [f"{u.name}:{first}:{count}" for u in users for first, count in u.gids],
        }
        script = []
        for name, lines in files.items():
            path = directory / name
            path.write_text("".join(f"{line}\n" for line in lines))
            path.chmod(0o644)
            Path(f"/etc/{name}").touch()
            script.append(f"mount --bind {path} /etc/{name}")
        script.append(f'exec {sys.executable} -c "{_HOLD}"')
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            self.close()
            raise RuntimeError("the mount namespace of the test's users did not start")

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()

    def command(self, user: User, *arguments: str | Path) -> list[str]:
        """The command line that runs `arguments` as `user`."""
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        return [
            *("nsenter", "-t", str(self._process.pid), "-m", "-w/", "--"),
            *("setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"),
            *("env", "-i", "PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", f"PYTHONPATH={path}"),
            *map(str, arguments),
        ]

    def engine_command(self, user: User, *arguments: str | Path) -> list[str]:
        """`python -m pipeline ARGUMENTS` as `user`."""
        return self.command(user, self.python, "-m", "pipeline", *arguments)

    def engine(self, user: User, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `engine_command`."""
        return subprocess.run(
            self.engine_command(user, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )


def python_for_all() -> str:
    """A Python of our version that every uid may execute, with what is installed here."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or "/bin/false"
    probe = [python, "-c", "import sys; print(sys.version_info[:2])"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip()
    if found != str(sys.version_info[:2]):
        pytest.skip(f"another uid has no Python like ours: {found}")
    return python
