"""Every topology of the catalogue moves to another host, with the pids it has, and is there what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.hosts import Host, migrate
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Tree
from tests.topologies.catalogue import CATALOGUE

pytestmark = pytest.mark.root


@pytest.mark.parametrize("name", CATALOGUE)
def test_topology_moves(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], name: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "topology", DEPTH_0, [json.dumps(CATALOGUE[name])])
    migrate(source, destination, tree, secret)
    tree.check()
