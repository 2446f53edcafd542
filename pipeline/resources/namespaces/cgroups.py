"""Cgroup namespaces: where the names of cgroups begin.

A cgroup namespace has a root in every hierarchy: the cgroup that its maker was in. Nobody says which that is; but
whoever is in it or below has a name that begins there, which is the end of the name that the pipeline sees. The root
is one of the tree's own cgroups (`pipeline.resources.cgroups`), and is made again with them; or it is one of the
surroundings: then the restorer's cgroup takes its place, as long as all members are at it.

Refused: a namespace that begins beside all of its members: nobody can tell where.

Source: cgroup_namespaces(7).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Index, Record
from pipeline.kernel import cgroupfs
from pipeline.resources.cgroups.capture import CgroupCapture
from pipeline.resources.support import Support
from pipeline.userns.visit import Way, read_file, visit

SUPPORT = Support(
    "cgroup",
    carried=(
        "one that begins at a cgroup of the tree, with members there and below it",
        "one that begins at a cgroup of the surroundings: the restorer's takes its place",
    ),
    refused=("one that begins beside all of its members",),
    shown_by=("topologies/test_topologies.py", "resources/test_cgroups.py"),
)


class CgroupNamespaceState(Record, frozen=True, kw_only=True):
    """The `Cgroup` indexes of its roots; where there is none of a hierarchy, it begins where the restorer is."""

    roots: list[Index] = []


def capture(
    members: Sequence[HostPid], way: Way, cgroups: CgroupCapture
) -> tuple[CgroupNamespaceState, list[Blocker]]:
    """Where a cgroup namespace begins, and what stops it from being carried.

    Args:
        members: the processes of the tree that are in it, or, of one without any, who holds it.
        way: what a visitor joins to be in it.
        cgroups: of the tree; of nobody where they are left behind: then it begins where the restorer is.
    """
    if not cgroups.places:
        return CgroupNamespaceState(), []

    def look() -> bytes:
        views = []
        for pid in members:
            try:
                views.append(read_file(f"/proc/{pid}/cgroup"))
            except (FileNotFoundError, ProcessLookupError):
                views.append(b"")  # it has ended
        return b"\0".join(views)

    views = [cgroupfs.parse_places(view) for view in visit(way, look).split(b"\0")]
    roots: list[int] = []
    blockers: list[Blocker] = []
    for name in sorted({name for view in views for name in view}):
        root, all_at_it = None, True
        for pid, view in zip(members, views, strict=True):
            inside, outside = view.get(name), cgroups.places.get(pid, {}).get(name)
            if inside is None or outside is None:
                continue
            all_at_it = all_at_it and inside == b"/"
            if inside == b"/":
                root = outside
            elif not cgroupfs.is_outside(inside) and outside.endswith(inside):
                root = outside[: -len(inside)] or b"/"
        if root is None:
            if any(name in view for view in views):
                reason = f"its cgroup namespace begins beside all of its members ({name or 'version 2'})"
                blockers.append(Blocker(f"pid {members[0]}", reason, "move one of them to its root"))
        elif cgroups.is_own((name, root)) or not all_at_it:
            roots.append(cgroups.number((name, root)))
    return CgroupNamespaceState(roots=roots), blockers
