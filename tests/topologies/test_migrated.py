"""Every topology of the catalogue moves to another host, with the pids it has, and is there what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.carry import assert_same
from tests.harness.hosts import Host, inner_pid, terminate
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Workshop, reap, said
from tests.topologies.catalogue import CATALOGUE

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts for all topologies, one after the other."""
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(Host())
            stack.callback(found[-1].close)
        yield found[0], found[1]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text("a secret that is long enough for both sides\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("name", CATALOGUE)
def test_topology_moves(
    hosts: tuple[Host, Host], secret: Path, nothing_left_behind: None, workshop: Workshop, name: str
) -> None:
    source, destination = hosts
    tree = source.start(workshop, "topology", DEPTH_0, 5000, [json.dumps(CATALOGUE[name])])
    root, family = inner_pid(tree.pid), tree.pids()
    before = source.snapshot(root)
    serve = ["serve", "--listen", "127.0.0.1:0", "--once", "--secret-file", secret]
    server = subprocess.Popen(
        destination.command(sys.executable, "-m", "pipeline", *serve),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        to = server.stdout.readline().split()[-1]
        done = source.engine("migrate", "--pid", str(root), "--to", to, "--secret-file", secret)
        assert done.returncode == 0, said(done) + str(terminate(server))
        _, err = server.communicate(timeout=20)
        assert server.returncode == 0, err
        assert not reap(family), "the source still runs"
    finally:
        terminate(server)
        tree.kill()
    tree.pid = destination.outer_pid(root)
    try:
        after = destination.snapshot(root)
        # the parent of the root is outside of the tree
        for found in (before, after):
            for key in [k for k in found if k.startswith(f"{root} ") and k.endswith((".ppid", ".PPid"))]:
                del found[key]
        assert_same(before, after)
        tree.check()
    finally:
        tree.kill()
