"""PostgreSQL with pgbench in the tree: a cluster, its start, and what must be true of it at any time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.harness.networks import shell
from tests.harness.settings import CLONE_NEWIPC, CLONE_NEWNET, Level, Setting
from tests.harness.tree import Workshop
from tests.programs.real.tree import RealTree, find, lines_of

#: the server does not run as root, wants to find its user by name, and has a System V segment
KINDS = CLONE_NEWIPC | CLONE_NEWNET
DEPTH_1 = Setting("depth1", (Level(uid=1, gid=1),), KINDS)
DEPTH_2 = Setting("depth2", (Level(), Level(("0 1000 100",), ("0 2000 100",), uid=1, gid=1)), KINDS)


def binaries() -> Path | None:
    """Where Debian keeps the server's commands: of the newest release, not in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


BIN = binaries() or Path("/nonexistent")
#: server and load are one tree; each transaction writes a line of the log of pgbench
RUN = """
"$1"/postgres -D "$PWD/data" -k "$PWD" -c listen_addresses='*' -c max_connections=10 -c shared_buffers=8MB &
until "$1"/pg_isready -q -h "$PWD"; do sleep 0.05; done
touch begun
until [ -e network ]; do sleep 0.05; done
"$1"/pgbench -q -i -s 1 -h "$2" postgres
"$1"/pgbench -n -c 4 -j 2 -T 1000 -l --log-prefix="$PWD/load" -h "$2" postgres &
echo $! > load.pid
trap 'kill $(cat load.pid); wait $(cat load.pid); kill -INT $(head -n 1 data/postmaster.pid)' TERM
while kill -0 %1 2>/dev/null; do wait; done
"""
SUMS = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history),
       (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history),
       (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)
"""


def new_cluster(workshop: Workshop) -> Path:
    """A new cluster, as `initdb` leaves it, to be copied."""
    path = workshop.directory()
    os.chown(path, 1, 1)
    done = subprocess.run(
        [
            *(find("setpriv"), "--reuid=1", "--regid=1", "--clear-groups"),
            *(BIN / "initdb", "-D", path / "data", "-A", "trust", "-U", "postgres", "--no-sync"),
            *("--no-locale", "-E", "UTF8"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "LANG": "C"},
    )
    assert done.returncode == 0, done.stderr
    return path / "data"


def start_postgres(
    launch: Callable[..., RealTree],
    workshop: Workshop,
    cluster: Path,
    setting: Setting,
    address: str | None = None,
) -> RealTree:
    """A server on a copy of `cluster`, and pgbench with four clients; both are of the tree.

    Args:
        address: where the clients find it over TCP; None: by its socket.
    """
    directory = workshop.directory()
    shutil.copytree(cluster, directory / "data")
    owner = (100_001, 100_001) if setting.depth == 1 else (101_001, 102_001)
    for path in [directory / "data", *(directory / "data").rglob("*")]:
        os.chown(path, *owner)
    tree = launch(
        setting,
        ["bash", "-c", RUN, "bash", BIN, address or directory],
        transactions,
        directory=directory,
        environment={"PGUSER": "postgres"},
    )
    if address:
        tree.wait("it is in its network", (directory / "begun").exists)
        shell(f"/proc/{tree.pid}/ns/net", "ip link set lo up")
    (directory / "network").touch()
    return tree


def ask(tree: RealTree, query: str) -> str:
    """What the server says, over its socket."""
    done = subprocess.run(
        [BIN / "psql", "-X", "-A", "-t", "-U", "postgres", "-h", tree.directory, "-c", query, "postgres"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def transactions(directory: Path) -> int:
    return sum(lines_of(path.name)(directory) for path in directory.glob("load.[0-9]*"))


def adds_up(tree: RealTree) -> None:
    """No transaction is lost or done twice, and no client lost its connection."""
    assert ask(tree, SUMS) == "t|t|t"
    backends = ask(tree, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'")
    assert backends == "4", "a client lost its connection"
