"""What kinds of open files do when the tree is let run: behind the decision, before its first instruction.

Each act has a duplicate of its open file, held until then. If the moment never comes, the duplicates are closed as the
files are: without an act.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.ledger import LEDGER

_ENTRY = "open file of a late act"


class Late:
    """Acts in the order in which they were added; `close` gives back what is held."""

    def __init__(self) -> None:
        self._acts: list[tuple[LocalFd, Callable[[LocalFd], None], str]] = []

    def add(self, local: LocalFd, act: Callable[[LocalFd], None], subject: str) -> None:
        """See `CreateScope.when_it_runs`."""
        duplicate = LocalFd(os.dup(local))
        LEDGER.take(_ENTRY, duplicate)
        self._acts.append((duplicate, act, subject))

    def run(self) -> list[str]:
        """The tree runs now; says what could not be done."""
        said = []
        for local, act, subject in self._acts:
            try:
                act(local)
            except OSError as error:
                said.append(f"{subject}: {error.strerror or error}")
            except RebuildError as error:
                said.append(f"{subject}: {error}")
        self.close()
        return said

    def close(self) -> None:
        """Idempotent."""
        while self._acts:
            local, _, _ = self._acts.pop()
            os.close(local)
            LEDGER.give_back(_ENTRY, local)
