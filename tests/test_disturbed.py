"""Whoever disturbs a migration, a dump or a restore, and when, the tree is in exactly one place, or in an image.

Often: `python -m tests.disturbed`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.disturbed_images import NAMES, Shelf
from tests.harness.disturbing import DISTURBANCES, Journey
from tests.harness.hosts import Host
from tests.harness.settings import DEPTH_2
from tests.harness.tree import Tree
from tests.soak import MODES

pytestmark = pytest.mark.root

_NAMES = [name for name in DISTURBANCES if name != "nothing"]
#: of dumps, and restores of those that have ended their tree
_TIMES_KEPT = 2


@pytest.mark.timeout(400)  # a destination that is silent is tried to be told for a while
@pytest.mark.parametrize(("name", "mode"), list(zip(_NAMES, itertools.cycle(MODES), strict=False)))
def test_a_tree_is_in_one_place(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], name: str, mode: str
) -> None:
    tree = start_on(hosts[0], "rewriting", DEPTH_2, ["forks"])
    journey = Journey(*hosts, tree, secret, mode)
    journey.go()
    dice = random.Random(name)
    journey.disturb(dice, name)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_a_tree_runs_or_is_in_an_image(
    hosts: tuple[Host, Host], tmp_path: Path, start_on: Callable[..., Tree], name: str
) -> None:
    shelf = Shelf(hosts[0], start_on(hosts[0], "rewriting", DEPTH_2, ["forks"]), str(tmp_path))
    shelf.go()
    dice = random.Random(name)
    for _ in range(_TIMES_KEPT):
        shelf.disturb(dice, [name])
