"""Everything that stops a tree from being carried, found without touching it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.resources.namespaces.members import check_visible
from pipeline.stages.capture import Capture
from pipeline.stages.freeze import check_root, check_traced, walk


def tree_blockers(pid: int) -> Iterator[Blocker]:
    """Every blocker of the tree below `pid`, which goes on running meanwhile."""
    at_root = list(check_root(pid))
    yield from at_root
    if at_root:
        return
    pids = walk(HostPid(pid))
    hidden: list[Blocker] = []
    for member in pids:
        with suppress(procfs.ProcessGone):
            hidden += check_visible(member)
    yield from hidden
    if hidden:
        return
    for member in pids:
        with suppress(procfs.ProcessGone):
            yield from check_traced(member)
    zombies = []
    for member in pids:
        with suppress(procfs.ProcessGone):
            if procfs.status(member).state in "ZX":
                zombies.append(member)
    with Capture(pids, zombies) as capture:
        yield from capture.blockers()
