"""What a kind of namespace or of task state says of itself: carried, refused by name, and what shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Support(NamedTuple):
    """One row of the support matrix; `shown_by`: the tests that show it, as paths below tests/."""

    kind: str
    carried: Sequence[str]
    refused: Sequence[str]
    shown_by: Sequence[str]
