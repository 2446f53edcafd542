"""What a person may decide about states that have more than one good answer.

One record for the side that captures (check, dump, migrate), one for the side that rebuilds (restore,
serve). Every kind finds them in its scope; the command line builds them in `pipeline.cli.policies`.
Whatever is not decided has the default that loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tcp = Literal["established", "close", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpPolicy:
    """Decisions of whoever captures a tree.

    Args:
        tcp: what becomes of TCP connections: carried, closed, or refused by name.
    """

    tcp: Tcp = "established"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePolicy:
    """Decisions of whoever rebuilds a tree."""
