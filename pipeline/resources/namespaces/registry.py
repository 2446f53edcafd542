"""All kinds of namespaces, in the order of the support matrix."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.resources.namespaces import cgroups, clocks, ipc, keepers, mounts, names, network, pids
from pipeline.resources.support import Support

KINDS: Sequence[Support] = (
    keepers.SUPPORT,
    pids.SUPPORT,
    mounts.SUPPORT,
    names.SUPPORT,
    ipc.SUPPORT,
    network.SUPPORT,
    clocks.SUPPORT,
    cgroups.SUPPORT,
)
