"""Every topology of the catalogue moves to another host, with the pids it has, and is there what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.hosts import Host, migrate
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Workshop
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
    try:
        migrate(source, destination, tree, secret)
        tree.check()
    finally:
        tree.kill()
