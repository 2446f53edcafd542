"""Descriptors of namespaces (nsfs): what open(2) of /proc/PID/ns/KIND gives.

The kernel holds a reference to the namespace, which keeps it alive even when no process is in
it. Kept: which namespace of the image it is; its number (inode) is the kernel's and differs
afterwards. One that is external is the restorer's afterwards, as it is for the tree's processes.

Source: namespaces(7); fs/nsfs.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import Index, NamespaceKind, OpenFile, Record
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.steps import CompleteOnceCreated

#: what readlink says of a descriptor of one
LINKS = (b"mnt:[", b"net:[", b"pid:[", b"user:[", b"uts:[", b"ipc:[", b"cgroup:[", b"time:[")


class NamespaceFileState(Record, frozen=True, kw_only=True):
    """`index`: a `UserNamespace` index for kind `user`, a `Namespace` index for the others."""

    kind: Literal["user"] | NamespaceKind
    index: Index


class NamespaceFile(CompleteOnceCreated):
    """See the module."""

    name = "namespace"
    record: type[NamespaceFileState] = NamespaceFileState
    carried: Sequence[str] = (
        "descriptors of namespaces of the tree, of those that only the descriptor holds, and of external ones",
    )
    refused: Sequence[str] = (
        "namespaces that belong to a user namespace outside of the pipeline's own",
        "a pid namespace that no process of the tree is in",
    )
    shown_by: Sequence[str] = ("programs/held_namespaces.py",)

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link.startswith(LINKS)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """It must be possible to make the namespace again; what is in it is looked at elsewhere."""
        if scope.namespace(view) is None:
            yield Blocker(
                view.subject,
                "belongs to a user namespace that is not below the pipeline's own",
                "close it; /proc/PID/ns names the namespace as well",
            )

    def capture(self, view: FdView, scope: CaptureScope) -> NamespaceFileState:
        """Which namespace it is."""
        found = scope.namespace(view)
        assert found is not None
        kind, index = found
        return NamespaceFileState(kind=kind, index=index)  # type: ignore[arg-type]

    def create(self, file: OpenFile, record: NamespaceFileState, scope: CreateScope) -> LocalFd:
        """Open the namespace that stands for it."""
        return scope.namespace(record.kind, record.index)


KIND = NamespaceFile()
