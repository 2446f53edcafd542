"""What is held of a live tree while it stands still, besides its tasks: given back exactly once, whichever way it goes.

A holding knows two ways: the tree runs on (`let_go`), or it has ended and is somebody else's now (`ended`, and
`settled` when that somebody runs it). At last, `close`.
"""

from __future__ import annotations

from typing import Protocol


class Holding(Protocol):
    """Something that is held; each is told of one of the two ways, once."""

    def let_go(self) -> None:
        """The tree runs on as it was."""

    def ended(self) -> list[str]:
        """The tree has ended, its place is kept for who has its image; says what went wrong, and raises nothing."""

    def settled(self) -> list[str]:
        """The tree runs elsewhere: nothing is to be kept here; says what went wrong, and raises nothing."""

    def close(self) -> None:
        """Behind `ended`: what this process holds ends, what is kept stays."""


class Held:
    """All holdings of one standstill.

    Args:
        image: where the image comes to be, for what is kept until it is restored; empty if nobody can say.
    """

    def __init__(self, image: str = "") -> None:
        self.image = image
        self._holdings: list[Holding] = []
        self._kept: list[Holding] = []
        #: what could not be done, in words
        self.complaints: list[str] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held any more."""
        return not self._holdings and not self._kept

    def add(self, holding: Holding) -> None:
        """Hold something more."""
        self._holdings.append(holding)

    def close(self) -> None:
        """Unless it has `ended`, the tree runs on; idempotent."""
        while self._holdings:
            self._holdings.pop().let_go()
        while self._kept:
            self._kept.pop().close()

    def ended(self) -> None:
        """Every process of the tree has ended."""
        while self._holdings:
            holding = self._holdings.pop()
            self.complaints += holding.ended()
            self._kept.append(holding)

    def settled(self) -> None:
        """The tree runs elsewhere."""
        for holding in self._kept:
            self.complaints += holding.settled()
