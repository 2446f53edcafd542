"""How a recipe tells a person how far it is: a few calls, no terminal in sight.

A recipe takes any `Progress` and calls it from its own thread; a call must not
block and must not raise. Rendering is the command line's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

#: the parts of the pause, in their order
PAUSE_PARTS = ("freeze", "collect", "last-pages", "transfer", "finish", "thaw")


class Round(Struct, frozen=True):
    """One round of pre-copy, told when it ends.

    Args:
        number: 0 for the first, which sends everything.
        dirty_bytes: what it was to send.
        sent_bytes: what went over the wire for it.
        seconds: how long it took.
        rate: bytes a second on the wire.
        dirty_rate: bytes a second that the program wrote to meanwhile.
        expected_downtime_s: how long the tree would stand still if it were frozen now (None: not known).
        throttle_percentage: how much of its time the tree is held back from now on.
    """

    number: int
    dirty_bytes: int
    sent_bytes: int
    seconds: float
    rate: float
    dirty_rate: float
    expected_downtime_s: float | None = None
    throttle_percentage: int = 0


class Progress(Protocol):
    """Listens to a recipe."""

    def phase(self, name: str) -> None:
        """A phase begins, such as ``setup``, ``freeze``, ``memory`` or ``thaw``."""

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        """`bytes_done` bytes of the phase's pages are through, of `bytes_total` (None: not known)."""

    def round(self, ended: Round) -> None:
        """A round of pre-copy has ended."""

    def pause(self, parts: Mapping[str, float]) -> None:
        """The tree stood still this long: milliseconds by the names of `PAUSE_PARTS`, in order; 0 may be left out."""


class NullProgress:
    """Listens to nothing."""

    def phase(self, name: str) -> None:
        """Ignore it."""

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        """Ignore it."""

    def round(self, ended: Round) -> None:
        """Ignore it."""

    def pause(self, parts: Mapping[str, float]) -> None:
        """Ignore it."""
