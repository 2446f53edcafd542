"""What capturing memory may ask about the rest of the tree, and how it says no."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Id, Index, PathRef


class MemoryScope(Protocol):
    """What memory needs of the capture of a tree; compare `pipeline.resources.kinds.CaptureScope`."""

    def space_of(self, key: Hashable) -> Index:
        """The number for page frames of whatever is known by `key`; nothing else in the image has it."""

    def file_of(self, key: Hashable) -> Index:
        """The number of the mapped file that is known by `key`."""

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        """The path `link` (as a magic link of /proc/PID prints it) in the mount namespace of `pid`."""

    def user(self, uid: int) -> Id:
        """Translate a uid as the pipeline sees it into the image's forest."""

    def group(self, gid: int) -> Id:
        """Translate a gid likewise."""

    def content(self, local: LocalFd, size_bytes: int) -> Index:
        """Carry the bytes of a file without a name. Duplicates `local`.

        The same inode gives the same space, so that a deleted file that is both open and mapped stays one.
        """

    def take_along(self, pid: HostPid, name: bytes, fd: LocalFd) -> None:
        """Let the content of a file go along, if that is asked for; `fd` may be O_PATH.

        Raises:
            OSError: it may not be read.
        """

    def segment(self, pid: HostPid, identifier: int) -> Index:
        """The space of a System V segment of the ipc namespace of `pid`; raises CannotCarry if it has none."""


class CannotCarry(Exception):
    """A mapping (or what is behind it) is refused; the catcher knows which one and makes the `Blocker`."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy

    def blocker(self, subject: str) -> Blocker:
        """The refusal, said about `subject`."""
        return Blocker(subject, self.reason, self.remedy)
