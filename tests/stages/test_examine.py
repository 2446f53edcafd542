"""A tree that is looked at while it runs, and changes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipeline.errors import Blocker
from pipeline.stages import examine


@pytest.mark.parametrize(("denied", "blockers"), [(0, 0), (1, 0), (3, 0), (99, 1)])
def test_a_number_that_is_somebody_elses_by_now_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, denied: int, blockers: int
) -> None:
    looks = iter(range(200))

    def look(_pid: int, *_: object) -> Iterator[Blocker]:
        if next(looks) < denied:
            raise PermissionError(13, "Permission denied", "/proc/8883/ns/user")
        yield from ()

    monkeypatch.setattr(examine, "_look", look)
    found = examine.tree_blockers(os.getpid())
    assert len(found) == blockers
    assert all("/proc/8883/ns/user" in blocker.reason for blocker in found)
