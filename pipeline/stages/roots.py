"""Roots of the mount namespaces of a tree that is being rebuilt: names of the image are opened in them."""

from __future__ import annotations

import os
from collections.abc import Callable

from pipeline.ids import LocalFd
from pipeline.image.schema import Index, PathRef
from pipeline.kernel.syscalls import RESOLVE, openat2
from pipeline.ledger import LEDGER

_ENTRY = "root directory"


class Roots:
    """The roots, each opened when it is asked for first.

    Args:
        path_of: where the root of a mount namespace can be reached from here.

    Ownership: holds a descriptor of each until `close`.
    """

    def __init__(self, path_of: Callable[[Index], str]) -> None:
        self._path_of = path_of
        self._open: dict[Index, LocalFd] = {}

    def of(self, mntns: Index) -> LocalFd:
        """The root of a mount namespace, as an O_PATH descriptor that stays ours; OSError: it cannot be reached."""
        if mntns not in self._open:
            fd = LocalFd(os.open(self._path_of(mntns), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            LEDGER.take(_ENTRY, fd)
            self._open[mntns] = fd
        return self._open[mntns]

    def open(self, path: PathRef, flags: int) -> LocalFd:
        """Open a path in the root of its mount namespace; the caller owns it. OSError as openat2(2)."""
        return openat2(self.of(path.mntns), path.path, flags, 0, RESOLVE.IN_ROOT)

    def close(self) -> None:
        """Close them all; idempotent."""
        while self._open:
            _, fd = self._open.popitem()
            os.close(fd)
            LEDGER.give_back(_ENTRY, fd)
