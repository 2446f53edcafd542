"""The later phases of kinds that need none: an open file that is complete once it is created."""

from __future__ import annotations

from typing import Any

from pipeline.image.schema import OpenFile
from pipeline.resources.kinds import CreateScope


class CompleteOnceCreated:
    """Base of kinds without something to do in `connect` or `finish`; each overrides what it needs."""

    def connect(self, file: OpenFile, record: Any, scope: CreateScope) -> None:
        """Nothing to join."""

    def finish(self, file: OpenFile, record: Any, scope: CreateScope) -> None:
        """Nothing to do from inside."""
