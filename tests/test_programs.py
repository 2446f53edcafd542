"""The test programs themselves, without the engine: each check passes as it is and fails when its state is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.settings import CONTAINER_2
from tests.harness.tree import PROGRAMS, Tree

pytestmark = pytest.mark.root

#: `restless` is not asked anything: see test_freeze.py
_OTHERS = {"support", "restless"}
_ARGUMENTS = {"outrunning": ("1", "1000")}
NAMES = sorted({path.stem for path in PROGRAMS.iterdir() if path.suffix in {".py", ".c"}} - _OTHERS)


@pytest.mark.parametrize("program", NAMES)
def test_program_names_all_that_is_broken(start: Callable[..., Tree], program: str) -> None:
    tree = start(program, CONTAINER_2, _ARGUMENTS.get(program, ()))
    assert tree.checks
    tree.check()
    tree.check()
    assert tree.ask("spoil") == []
    named = {line.split("\t", 1)[0] for line in tree.ask("check")}
    assert set(tree.checks) - named == set()
    assert named - set(tree.checks) == set()
    tree.end()
