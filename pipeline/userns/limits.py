"""The limits of a user namespace: /proc/sys/user, which shows those of whoever *opens* its files.

The kernel holds: a number for each kind of object (namespaces of each kind, inotify and fanotify instances and
watches) that the users of a namespace may make in it. Only a process can join a user namespace, and a fork costs
some milliseconds; but a file that was opened inside goes on to tell the value of now, to anybody. So those of the
namespaces that are known before the freeze are opened before it (`Limits.open`), once for all stops of a tree, and
read inside it. An open file keeps its namespace, by the credentials of who opened it: no other one gets its number.

Source: namespaces(7), kernel/ucount.c (set_lookup), include/linux/fs.h (f_cred).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.inside import open_file
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.procfs import ProcessGone
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.userns.visit import fetch_all

_LIMITS = b"/proc/sys/user"
#: what every limit is in a fresh user namespace
NO_LIMIT = 0x7FFF_FFFF
_VALUE_BYTES = 64
#: namespaces whose files are kept open at the most
_MAX_NAMESPACES = 16


class Limits:
    """The open files of some user namespaces; a context manager that closes them."""

    def __init__(self) -> None:
        self._files: dict[NamespaceKey, dict[str, LocalFd]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; idempotent."""
        while self._files:
            key, files = self._files.popitem()
            for fd in files.values():
                os.close(fd)
            LEDGER.give_back("files of limits", (id(self), key))

    def open(self, pids: Iterable[HostPid]) -> None:
        """Open the files of the user namespaces of these processes; what cannot be is visited when it is wanted."""
        own = nsfs.key(HostPid(os.getpid()), "user")
        for pid in pids:
            with suppress(ProcessGone, OSError):
                key = nsfs.key(pid, "user")
                if key is None or key == own or key in self._files or len(self._files) >= _MAX_NAMESPACES:
                    continue
                namespace = open_file(pid, "ns/user", os.O_RDONLY)
                try:
                    if nsfs.key_of(LocalFd(namespace)) == key:
                        self._open(LocalFd(namespace), key)
                finally:
                    os.close(namespace)

    def _open(self, namespace: LocalFd, key: NamespaceKey) -> None:
        names = sorted(os.listdir(_LIMITS))
        fds = fetch_all(
            [(namespace, CLONE.NEWUSER)],
            lambda: [os.open(_LIMITS + b"/" + name, os.O_RDONLY | os.O_CLOEXEC) for name in names],
        )
        LEDGER.take("files of limits", (id(self), key))
        self._files[key] = {os.fsdecode(name): fd for name, fd in zip(names, fds, strict=True)}

    def of(self, fd: LocalFd, key: NamespaceKey) -> dict[str, int]:
        """See `limits_of`; `key` is that of the namespace behind `fd`."""
        files = self._files.get(key)
        if files is None:
            return limits_of(fd)
        return _set({name: int(os.pread(file, _VALUE_BYTES, 0)) for name, file in files.items()})


def limits_of(fd: LocalFd) -> dict[str, int]:
    """The limits that were set in a user namespace; a fresh one has the highest number for each."""
    with Limits() as limits:
        key = nsfs.key_of(fd)
        limits._open(fd, key)
        return limits.of(fd, key)


def _set(found: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in found.items() if value != NO_LIMIT}
