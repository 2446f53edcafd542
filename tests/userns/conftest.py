"""A launcher for tests that make namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from pipeline.ids import RemoteAddress
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import spawn_launcher
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.userns.forest import Forest

_SCRATCH = RemoteAddress(0x2000_0000_0000)
Making = Callable[[Forest], AbstractContextManager[Keepers]]


@pytest.fixture
def making() -> Making:
    """``with making(forest) as keepers``: nothing of it is left after the block."""

    @contextmanager
    def making(forest: Forest) -> Iterator[Keepers]:
        with ExitStack() as claims:
            launcher = spawn_launcher(_SCRATCH, 900)
            claims.callback(launcher.stage.channel.close)
            claims.callback(launcher.kill_and_reap)
            yield Keepers(launcher, forest, claims)
        assert not LEDGER.held()

    return making
