"""What a tree that stands still does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.resources import identity
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree

pytestmark = pytest.mark.root


def test_the_table_of_locks_is_read_before_it(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it waits for a grace period of RCU; a file that is mapped, and was just written, makes it wanted."""
    tree = start("mappings", DEPTH_1)
    states: list[str] = []
    asked: list[int] = []
    genuine_read, genuine_lines = identity._Leases._read, identity._Leases.lines

    def read(leases: identity._Leases) -> list[bytes]:
        states.append(procfs.stat(HostPid(tree.pid)).state)
        return genuine_read(leases)

    def lines(leases: identity._Leases) -> list[bytes]:
        asked.append(len(states))
        return genuine_lines(leases)

    monkeypatch.setattr(identity, "_AHEAD_S", 60.0)
    monkeypatch.setattr(identity._Leases, "_read", read)
    monkeypatch.setattr(identity._Leases, "lines", lines)
    trio.run(lambda: pipeline.dump(tree.pid, str(tmp_path / "image"), leave="running"))
    assert asked
    assert states
    assert "t" not in states
    tree.check()
