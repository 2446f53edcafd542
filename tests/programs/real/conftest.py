"""The two hosts between which real programs move, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.tree import Workshop
from tests.programs.real.tree import RealTree, Stage, launching, made_stage


@pytest.fixture(scope="session")
def stage(workshop: Workshop, secret: Path) -> Iterator[Stage]:
    with made_stage(workshop, secret) as stage:
        yield stage


@pytest.fixture
def launch(stage: Stage, nothing_left_behind: None) -> Iterator[Callable[..., RealTree]]:
    """`Stage.start`; whatever is left of a program is killed at the end."""
    with launching(stage) as launch:
        yield launch
