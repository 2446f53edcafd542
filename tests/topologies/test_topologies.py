"""Every topology of the catalogue is dumped, restored, and is afterwards what it was: from inside and from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import carry
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Tree
from tests.topologies.catalogue import CATALOGUE

pytestmark = pytest.mark.root


def test_there_are_enough() -> None:
    assert len(CATALOGUE) >= 60


@pytest.mark.parametrize("name", CATALOGUE)
def test_topology_is_carried(start: Callable[..., Tree], tmp_path: Path, name: str) -> None:
    tree = start("topology", DEPTH_0, [json.dumps(CATALOGUE[name])])
    carry(tree, tmp_path / "image")
    assert tree.end() == 0
