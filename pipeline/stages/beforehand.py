"""What is read of a tree, and of the host around it, before it stands still, so that inside it is only checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pipeline.ids import HostPid
from pipeline.resources.namespaces.kept_networks import KeptNetworks
from pipeline.resources.outside import Outsiders
from pipeline.resources.shielded import Shield
from pipeline.stages.ahead import MappingReader
from pipeline.userns.limits import Limits


class Beforehand:
    """A context manager, for all looks at one tree.

    Attributes:
        limits: of its user namespaces.
        outsiders: who else has descriptors on this host.
        networks: who of us is in those of the tree, and has to be out before it ends.
        mappings: who reads its mappings beside everything else.
        shield: who borrows state of its open files.
    """

    def __init__(self) -> None:
        self.limits = Limits()
        self.shield = Shield()
        self.outsiders = Outsiders(self.shield)
        self.networks = KeptNetworks()
        self.mappings = MappingReader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.limits.close()
        self.networks.close()
        self.mappings.close()
        self.shield.close()

    def refresh(self, pids: Sequence[HostPid]) -> None:
        """Right before the processes `pids` of the tree are stopped; in any thread."""
        self.mappings.start()
        self.limits.open(pids)
        self.outsiders.look_anew(pids)
