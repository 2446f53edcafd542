"""What a test leaves behind: processes, mounts, descriptors, temporary files, named network namespaces.

The test process is a child subreaper, so that whatever loses its parent becomes its own
child and is seen. Only what is ours is looked at: our descendants, our mount namespace,
our descriptors, the temporary directory made for this session.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline import leftovers
from tests.harness.tree import family_of, reap

PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 10.0


def become_subreaper() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _of_obstore(fd: int, name: str) -> bool:
    """Whether `fd` is of obstore's runtime or connection pool, which live as long as the process that used them."""
    if "obstore" not in sys.modules:
        return False
    if name in {"anon_inode:[eventpoll]", "anon_inode:[eventfd]"}:
        return True
    if not name.startswith("socket:"):
        return False
    try:
        duplicate = os.dup(fd)
    except OSError:
        return True  # its pool has closed it since it was listed
    with socket.socket(fileno=duplicate) as copy:
        try:
            return copy.family in {socket.AF_INET, socket.AF_INET6} and bool(copy.getpeername())
        except OSError:
            return False


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the directory's own descriptor
    return {fd: name for fd, name in found.items() if not _of_obstore(fd, name)}


def _mounts() -> set[str]:
    return {line.split(" ", 1)[1] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def _named_namespaces() -> set[str]:
    try:
        return set(os.listdir("/run/netns"))
    except FileNotFoundError:
        return set()


def _files(temporary: Path) -> set[str]:
    return {str(path.relative_to(temporary)) for path in temporary.rglob("*")}


def _notes() -> set[str]:
    """What the engine noted as made and not taken away again, by processes that are gone."""
    try:
        names = os.listdir("/run/pipeline")
    except OSError:
        return set()
    return {name for name in names if not Path(f"/proc/{name.split('-')[0]}").exists()}


def sweep() -> None:
    """Take away what commands have left that were killed, as `clean` does; all of it can be."""
    kept = [left for left in leftovers.sweep() if not left.removed]
    assert not kept, kept


def _reap_orphans() -> None:
    """Zombies that came to us because their parent ended first: nobody else will reap them."""
    for pid in family_of(os.getpid())[1:]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == os.getpid():
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        name = Path(f"/proc/{pid}/comm").read_text("latin-1").strip()
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({name}) {command[:200]}"


@dataclass
class Inventory:
    """What there is now; `leaks` says what came since, after removing it where possible."""

    temporary: Path
    processes: set[int]
    mounts: set[str]
    descriptors: dict[int, str]
    namespaces: set[str]
    files: set[str]
    notes: set[str]

    @classmethod
    def take(cls, temporary: Path) -> Inventory:
        return cls(
            temporary,
            set(family_of(os.getpid())),
            _mounts(),
            _descriptors(),
            _named_namespaces(),
            _files(temporary),
            _notes(),
        )

    def leaks(self) -> list[str]:
        """One line for each thing left behind; leftover processes are killed."""
        deadline = time.monotonic() + _GRACE_S
        while found := self._differences():
            if time.monotonic() > deadline:
                break
            gc.collect()
            time.sleep(0.02)
        for pid in self._processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap(self._processes(), 3.0)
        return found

    def _processes(self) -> list[int]:
        return [pid for pid in family_of(os.getpid()) if pid not in self.processes]

    def _differences(self) -> list[str]:
        _reap_orphans()
        found = [_describe(pid) for pid in self._processes()]
        found += [f"mount {line}" for line in sorted(_mounts() - self.mounts)]
        now = _descriptors()
        found += [
            f"descriptor {fd} -> {name}" for fd, name in now.items() if self.descriptors.get(fd) != name
        ]
        found += [f"network namespace {name}" for name in sorted(_named_namespaces() - self.namespaces)]
        found += [f"note of a leftover {name}" for name in sorted(_notes() - self.notes)]
        found += [f"temporary file {name}" for name in sorted(_files(self.temporary) - self.files)]
        return found
