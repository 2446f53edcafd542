"""What every kind of namespace says of itself: what of it is carried, and what is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Support(NamedTuple):
    """One row of the support matrix; each file that makes a kind of namespace has one."""

    kind: str
    carried: Sequence[str]
    refused: Sequence[str]
