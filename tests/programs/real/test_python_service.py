"""A service in Python, with everything that the standard library offers for doing several things at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import Setting
from tests.harness.tree import find_python
from tests.programs.real.test_languages import goes_all_ways
from tests.programs.real.tree import DEPTHS, RealTree, lines_of

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("setting", "method"), [*zip(DEPTHS, ("forkserver", "fork"), strict=True)], ids=("depth1", "depth2")
)
def test_python(launch: Callable[..., RealTree], setting: Setting, method: str, tmp_path: Path) -> None:
    tree = launch(setting, [find_python(), "busy.py", method], lines_of("counts"), sources=["busy.py"])
    goes_all_ways(tree, tmp_path)
    assert (tree.directory / "ended").exists()
