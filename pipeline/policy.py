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
        cgroup: whether the cgroups that only the tree lives in go along.
    """

    tcp: Tcp = "established"
    cgroup: Literal["keep", "ignore"] = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePolicy:
    """Decisions of whoever rebuilds a tree.

    Args:
        cgroup: where the cgroups that came with the tree are made: ``keep``: where they were; ``ignore``: nowhere,
            all of it is in the restorer's; or the path of a cgroup to make them in.
    """

    cgroup: str = "keep"
