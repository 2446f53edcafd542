"""Which ipc namespaces are visited once more when processes have what they need: a visitor takes 5 ms of a pause."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.resources.namespaces import ipc_making
from pipeline.resources.namespaces.ipc import IpcState, is_settled
from pipeline.resources.namespaces.ipc_making import IpcMaking

BUSY: list[dict[str, Any]] = [
    {"segments": [object()]},
    {"semaphores": [object()]},
    {"queues": [object()]},
    {"sysctls": {"kernel/shm_rmid_forced": b"1"}},
]
IDLE: list[dict[str, Any]] = [{}, {"posix": [object()]}, {"sysctls": {"kernel/shmmni": b"7"}}]


@pytest.mark.parametrize("holds", BUSY)
def test_what_is_made_open_to_everybody_is_settled_later(holds: dict[str, Any]) -> None:
    assert not is_settled(IpcState(**holds))


@pytest.mark.parametrize("holds", IDLE)
def test_what_is_as_it_shall_be_is_settled(holds: dict[str, Any]) -> None:
    assert is_settled(IpcState(**holds))


def test_only_the_others_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[int] = []
    making = IpcMaking(None, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(IpcMaking, "_act", lambda _, index, __: visited.append(index))
    monkeypatch.setattr(ipc_making.ipc, "check", lambda _: None)
    for index, holds in enumerate([*IDLE, *BUSY]):
        making.add(index, IpcState(**holds))
    making.settle()
    assert visited == [3, 4, 5, 6]
