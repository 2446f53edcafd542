"""How a recipe tells a person how far it is: two calls, no terminal in sight.

A recipe takes any `Progress` and calls it from its own thread; the call must not
block and must not raise. Rendering is the command line's business.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Listens to a recipe."""

    def phase(self, name: str) -> None:
        """A phase begins, such as ``setup``, ``freeze``, ``memory`` or ``thaw``."""

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        """`bytes_done` bytes of the phase's pages are through, of `bytes_total` (None: not known)."""


class NullProgress:
    """Listens to nothing."""

    def phase(self, name: str) -> None:
        """Ignore it."""

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        """Ignore it."""
