"""A thread in each network of a tree, and the open files of its sysctls, kept for all looks at it.

To get into a network takes half a millisecond, and to open the thousand sysctls that each has takes ten. Both are done
at the first look, when the tree still runs. A thread keeps its network alive: it has to leave before the tree ends
here and its addresses come up elsewhere.

Source: network_namespaces(7); fs/proc/proc_sysctl.c: an open file belongs to one table of one network, and can no
longer be read when the device is gone that the table was of.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, TypeVar

from pipeline.errors import passed_over
from pipeline.ids import LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.nsfs import NamespaceKey
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.resources.namespaces.network import SYSCTLS
from pipeline.userns.visit import Visitor, Way, fetch, visit

T = TypeVar("T")
#: those kept at the most: each takes a thread, and a descriptor for each sysctl
_MOST = 4
#: of the descriptors that this process may have, one in so many may be such a one, for each network
_PART = 8
#: most values are much shorter than the first, none is longer than the second
_SHORT_BYTES, _LONGEST_BYTES = 512, 1 << 16


class _Open(NamedTuple):
    """The open sysctls of a network: of which devices, and by name."""

    devices: frozenset[str]
    files: dict[str, LocalFd]


class KeptNetworks:
    """Who is in the networks of a tree.

    Args:
        most: how many are kept; in others somebody is for a moment only.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._visitors: dict[NamespaceKey, Visitor] = {}
        self._open: dict[NamespaceKey, _Open] = {}

    def close(self) -> None:
        """Leave every network, and close all files; idempotent."""
        for key in list(self._open):
            self._close_files(key)
        while self._visitors:
            _, visitor = self._visitors.popitem()
            task: str | None = None
            with suppress(OSError):
                task = visitor.do(lambda: os.readlink("/proc/thread-self"))
            visitor.close()
            while task and os.path.exists(f"/proc/{task}"):  # a moment longer than it takes to wait for it
                time.sleep(0.0001)

    def look(self, way: Way, look: Callable[[], bytes]) -> bytes:
        """What `look` returns in a network, which it does not leave; see `pipeline.userns.visit.visit`."""
        visitor = self._visitor(way)
        return visit(way, look) if visitor is None else visitor.do(look)

    def socket(self, way: Way, make: Callable[[], socket.socket]) -> socket.socket:
        """What `make` makes in a network; the caller owns it."""
        visitor = self._visitor(way)
        if visitor is None:
            return socket.socket(fileno=fetch(way, lambda: make().detach()))
        return visitor.do(make)

    def sysctls(
        self, way: Way, devices: Sequence[str], is_wanted: Callable[[str], bool]
    ) -> dict[str, bytes] | None:
        """The sysctls of a network that can be read, by their names; None where it is not kept.

        Args:
            devices: all that the network has; its sysctls are looked for anew when these are others.
            is_wanted: whether one is, the same for every look at a network with these devices.
        """
        visitor = self._visitor(way)
        if visitor is None:
            return None
        key = nsfs.key_of(LocalFd(way[0][0]))
        known = self._open.get(key)
        if known is not None and known.devices == frozenset(devices):
            with suppress(OSError):  # a device was made anew meanwhile, under the same name
                return visitor.do(lambda: {name: _read(fd) for name, fd in known.files.items()})
        self._close_files(key)
        found = visitor.do(lambda: dict(walk(is_wanted)))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if _PART * len(found) > soft:
            return found  # what we open, nobody else in this process may: they are read like this each time
        with suppress(OSError):  # one has gone meanwhile, or there are no more files
            files = visitor.do(lambda: _opened(found))
            self._open[key] = _Open(frozenset(devices), files)
            for fd in files.values():
                LEDGER.take("sysctl", fd)
        return found

    def _visitor(self, way: Way) -> Visitor | None:
        if len(way) != 1 or way[0][1] != CLONE.NEWNET:
            return None
        key = nsfs.key_of(LocalFd(way[0][0]))
        if key not in self._visitors and len(self._visitors) < self._most:
            self._visitors[key] = Visitor(way)
        return self._visitors.get(key)

    def _close_files(self, key: NamespaceKey) -> None:
        known = self._open.pop(key, None)
        for fd in known.files.values() if known is not None else ():
            os.close(fd)
            LEDGER.give_back("sysctl", fd)


def walk(is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The sysctls of the network that the caller is in, as far as they can be read, by their names below `SYSCTLS`."""
    for folder, _, names in os.walk(SYSCTLS, onerror=_unless_passed_over):
        inside = folder.removeprefix(SYSCTLS).lstrip("/")
        for last in names:
            name = f"{inside}/{last}" if inside else last
            if is_wanted(name):
                with passed_over():
                    fd = LocalFd(os.open(f"{folder}/{last}", os.O_RDONLY | os.O_CLOEXEC))
                    try:
                        yield name, _read(fd)
                    finally:
                        os.close(fd)


def _unless_passed_over(error: OSError) -> None:
    with passed_over():
        raise error


def _opened(names: Iterable[str]) -> dict[str, LocalFd]:
    """The file of each; OSError: some of them cannot be opened, and none is."""
    files: dict[str, LocalFd] = {}
    with ExitStack() as failed:
        for name in names:
            files[name] = LocalFd(os.open(f"{SYSCTLS}/{name}", os.O_RDONLY | os.O_CLOEXEC))
            failed.callback(os.close, files[name])
        failed.pop_all()
    return files


def _read(fd: LocalFd) -> bytes:
    """The kernel gives as much of a value as is asked for at once, and nothing more behind that."""
    value = os.pread(fd, _SHORT_BYTES, 0)
    return (value if len(value) < _SHORT_BYTES else os.pread(fd, _LONGEST_BYTES, 0)).strip()
