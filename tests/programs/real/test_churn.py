"""A program in which nothing stays for long is looked at, dumped and moved: what has gone meanwhile is in no way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import DEPTH_1
from tests.harness.tree import find_python, said
from tests.programs.real.tree import RealTree, count_in

pytestmark = pytest.mark.root


def test_what_comes_and_goes_is_in_no_way(launch: Callable[..., RealTree], tmp_path: Path) -> None:
    tree = launch(DEPTH_1, [find_python(), "churn.py"], count_in("counts"), sources=["churn.py"])
    tree.goes_on(10)
    for _ in range(4):
        done = tree.host.engine("check", "--pid", str(tree.root))
        assert done.returncode == 0, said(done)
    tree.all_ways(tmp_path)
    tree.finish(signal.SIGKILL)
