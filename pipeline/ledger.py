"""Counts what was taken from the world and what was given back.

Everything the engine takes (a seized task, a puppet, a descriptor that outlives a
function) is entered before the act and struck out after the release. Striking
out twice is an error at once; tests assert that nothing is left.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable


class Ledger:
    """What is held now, and how often each kind was taken and given back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: set[tuple[str, Hashable]] = set()
        self._taken: Counter[str] = Counter()
        self._given_back: Counter[str] = Counter()

    def take(self, kind: str, key: Hashable) -> None:
        """Enter `key`; RuntimeError if it is held already."""
        with self._lock:
            if (kind, key) in self._held:
                raise RuntimeError(f"{kind} {key!r} is taken twice")
            self._held.add((kind, key))
            self._taken[kind] += 1

    def give_back(self, kind: str, key: Hashable) -> None:
        """Strike out `key`; RuntimeError if it is not held: a double release."""
        with self._lock:
            if (kind, key) not in self._held:
                raise RuntimeError(f"{kind} {key!r} is given back but not held")
            self._held.remove((kind, key))
            self._given_back[kind] += 1

    def held(self) -> set[tuple[str, Hashable]]:
        """What is held now."""
        with self._lock:
            return set(self._held)

    def statistics(self) -> dict[str, tuple[int, int]]:
        """Per kind: how often taken, how often given back."""
        with self._lock:
            return {kind: (self._taken[kind], self._given_back[kind]) for kind in self._taken}


#: the process's ledger
LEDGER = Ledger()
