"""Cgroup namespaces: where the names of cgroups begin.

A cgroup namespace has a root: the cgroup that its maker was in. Which cgroup that is belongs to
the host, and so does the membership of a process: a tree is restored in the cgroup of the
restorer. So a namespace is carried while all its members are *at* its root, where all names are
`/`, in every hierarchy; at the destination the restorer's cgroup becomes the root.

Refused: members in a cgroup below the root, or outside of it.

Source: cgroup_namespaces(7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.resources.support import Support
from pipeline.userns.visit import Way, read_file, visit

SUPPORT = Support(
    "cgroup",
    carried=("one whose members are all at its root: the restorer's cgroup becomes the root",),
    refused=("members in cgroups below or beside the root",),
    shown_by=("topologies/test_topologies.py",),
)


def check_held(holder: HostPid, how: str, way: Way) -> Iterator[Blocker]:
    """What stops one that no process of the tree is in: it must begin where its holder is.

    Args:
        holder: has it by `how`, in words.
        way: what a visitor joins to be in it.
    """
    if any(True for _ in check([holder], way)):
        reason = f"holds, by {how}, a cgroup namespace that does not begin at the cgroup that it is in"
        yield Blocker(f"pid {holder}", reason, "close or umount it")


def check(members: Sequence[HostPid], way: Way) -> Iterator[Blocker]:
    """What stops a cgroup namespace from being carried.

    Args:
        members: the processes of the tree that are in it.
        way: what a visitor joins to be in it.
    """

    def look() -> bytes:
        views = []
        for pid in members:
            try:
                views.append(read_file(f"/proc/{pid}/cgroup"))
            except (FileNotFoundError, ProcessLookupError):
                views.append(b"")  # it has ended
        return b"\0".join(views)

    for pid, view in zip(members, visit(way, look).split(b"\0"), strict=True):
        for line in view.splitlines():
            hierarchy, controllers, path = line.split(b":", 2)
            if path != b"/":
                name = controllers.decode() or "unified"
                yield Blocker(
                    f"pid {pid}",
                    f"is in cgroup {path.decode(errors='replace')} of its cgroup namespace ({name} hierarchy"
                    f" {hierarchy.decode()}); only members at the root of a cgroup namespace are carried",
                    "move it to the root of its cgroup namespace",
                )
