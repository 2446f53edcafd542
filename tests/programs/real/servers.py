"""Redis with its clients around: a tree with a network of its own, and clients behind a bridge."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.harness.networks import THEIRS, plug, within
from tests.harness.settings import Setting
from tests.harness.tree import Workshop
from tests.programs.real.tree import SOURCES, RealTree, count_in

PORT = 6379
#: of `SOURCES`: clients that check every answer
CLIENTS = "redis_clients.py"
IDLE = "idle_connections.py"
REDIS = [
    *(
        "redis-server",
        "--port",
        str(PORT),
        "--bind",
        "*",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--io-threads",
        "2",
    ),
]
#: of clients
COUNT = 50


@contextmanager
def redis_and_clients(
    launch: Callable[..., RealTree], workshop: Workshop, around: str, setting: Setting
) -> Iterator[tuple[RealTree, subprocess.Popen[bytes]]]:
    """A server in a tree, plugged into the network `around`, and its clients there, each of which was served.

    SIGTERM ends the clients; `all_is_well` says then whether nothing was lost.
    """
    directory = workshop.directory()
    with ExitStack() as stack:
        tree = within(around, lambda: launch(setting, REDIS, count_in("rounds"), directory=directory))
        tree.wait(
            "it is in its network", lambda: Path(f"/proc/{tree.pid}/comm").read_text() == "redis-server\n"
        )
        plug(around, tree)
        clients = outside(around, directory, sys.executable, SOURCES / CLIENTS, THEIRS, str(COUNT))
        stack.callback(clients.wait)
        stack.callback(clients.kill)
        tree.wait("every client is served", lambda: count_in("rounds")(directory) > 2)
        yield tree, clients


@contextmanager
def idle_connections(around: str, tree: RealTree, count: int) -> Iterator[None]:
    """So many connections to the server from around, which are tried at the end: what is wrong goes to "wrong"."""
    idle = outside(around, tree.directory, sys.executable, SOURCES / IDLE, THEIRS, str(PORT), str(count))
    try:
        tree.wait_for_file("idle")
        yield
        idle.terminate()
        assert idle.wait(60) == 0
    finally:
        idle.kill()
        idle.wait()


def outside(around: str, directory: Path, *command: str | Path) -> subprocess.Popen[bytes]:
    """A command in the network around, that is no part of the tree."""
    with open(directory / "outside.log", "ab") as log:
        return subprocess.Popen(
            ["nsenter", f"--net={around}", *map(str, command)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def all_is_well(directory: Path) -> None:
    """Clients that have ended found nothing wrong."""
    wrong = directory / "wrong"
    assert not wrong.exists(), wrong.read_text()
    assert (directory / "ended").exists()
