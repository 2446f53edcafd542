"""Every test program, at user-namespace depth 0, 1 and 2: dumped, gone, restored, right inside and in /proc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import carry
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import PROGRAMS, Tree

pytestmark = pytest.mark.root

#: never twice the same: `forking` (test_bad_input.py), `rewriting` (test_live_migration.py), `restless`
#: (test_freeze.py), `outrunning` (test_auto_converge.py), `wandering` (test_live_migration.py); `crowd` is carried by
#: test_scale_tasks.py, `closing` by test_looking_again.py
_OTHERS = {"support", "forking", "rewriting", "restless", "outrunning", "wandering", "crowd", "closing"}
#: of a tree that is looked at twice, and once
_MODES = {DEPTH_1.name: "stop"}
#: whose memory is shared, inherited, locked, or written behind the page tables
KINDS_OF_MEMORY = ("anonymous", "mappings", "processes", "rings", "sharing", "sysv", "together")
NAMES = sorted({path.stem for path in PROGRAMS.iterdir() if path.suffix in {".py", ".c"}} - _OTHERS)


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", NAMES)
def test_state_is_carried(start: Callable[..., Tree], tmp_path: Path, program: str, setting: Setting) -> None:
    tree = start(program, setting)
    carry(tree, tmp_path / "image", "--mode", _MODES.get(setting.name, "precopy"))
    tree.check()
    assert tree.end() == 0
