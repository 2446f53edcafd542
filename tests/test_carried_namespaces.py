"""Trees in user namespaces with all kinds of maps, across several levels, and of plain users."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import carry
from tests.harness.settings import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    CONTAINER_2,
    DEPTH_0,
    DEPTH_1,
    DEPTH_2,
    MAPS,
    Setting,
)
from tests.harness.tree import Tree

pytestmark = pytest.mark.root

KINDS = {"mnt": CLONE_NEWNS, "uts": CLONE_NEWUTS, "ipc": CLONE_NEWIPC, "pid": CLONE_NEWPID | CLONE_NEWNS}


@pytest.mark.parametrize("setting", MAPS, ids=lambda s: s.name)
def test_maps_are_carried(start: Callable[..., Tree], tmp_path: Path, setting: Setting) -> None:
    tree = start("namespaced", setting)
    carry(tree, tmp_path / "first")
    carry(tree, tmp_path / "second")
    assert tree.end() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1], ids=lambda s: s.name)
def test_one_kind_of_namespace_is_carried(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, kind: str
) -> None:
    """Each kind by itself; the others are shared with the host and stay so."""
    tree = start("namespaced", setting.with_kinds(f"{setting.name}-{kind}", KINDS[kind]))
    carry(tree, tmp_path / "image")
    assert tree.end() == 0


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
def test_listeners_answer_from_outside(start: Callable[..., Tree], tmp_path: Path, setting: Setting) -> None:
    tree = start("sockets", setting)
    carry(tree, tmp_path / "image")
    with socket.create_connection(("127.0.0.1", int((tree.directory / "port").read_text())), timeout=5):
        pass
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(tree.directory / "listening"))
