"""Giving up while pages come later: a tree that is whole by then is not said to be in doubt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pipeline.errors import InDoubt
from pipeline.progress import NullProgress
from pipeline.stages.lending import Lending


def _send(monkeypatch: pytest.MonkeyPatch, survives: bool) -> None:
    """Send all, and be told in the same moment to give up."""

    async def attempt(*_: object) -> bool:
        return survives

    def reconnect() -> Any:
        raise AssertionError("nobody is to be reached")

    monkeypatch.setattr(Lending, "_survives", staticmethod(attempt))
    channel: Any = SimpleNamespace(peer="there")
    trio.run(Lending("migration", reconnect, NullProgress()).send_all, channel, lambda: True)


def test_what_is_whole_when_somebody_gives_up_is_not_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):  # which of the two comes first is a matter of chance
        _send(monkeypatch, survives=True)


def test_what_is_given_up_while_pages_are_missing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InDoubt, match="pages were missing at there"):
        _send(monkeypatch, survives=False)
