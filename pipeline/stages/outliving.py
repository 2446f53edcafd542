"""Whose memory may outlive its process: what a tree gives back at its end but memory is given back at once then.

Much memory takes a killed process longer to give back than everything else, and nobody waits for it: what runs on
elsewhere waits for locks, connections, addresses and terminals, which come behind it. So large memories are made to
last (`pipeline.kernel.lasting`) while the tree stands still, until it runs elsewhere.

Not those with which something else would last: a mapping keeps the description of its file, with the locks and leases
on it; file systems such as FUSE and 9P write when a shared mapping of a file ends; the last detachment counts for a
segment of System V; contexts of asynchronous I/O end with the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import AddressSpace, MappedFile, Record, Vma
from pipeline.kernel.lasting import LastingMemory
from pipeline.kernel.pagemap import total_bytes
from pipeline.resources.locks import Lock
from pipeline.resources.regular import RegularState
from pipeline.stages.memory import PageSource, ProcessPages

#: a memory that is given back in less than a millisecond
SMALL_BYTES = 8 << 20
#: the largest ones do
MOST = 16
_MAP_SHARED = 1


class Memory(NamedTuple):
    """The memory of a process: its space number, a thread that is in it, and a page that it has."""

    space: int
    pid: HostPid
    page: RemoteAddress
    size_bytes: int


def large_memories(
    records: Sequence[tuple[Record, Record | None]],
    sources: Iterable[PageSource],
    small_bytes: int = SMALL_BYTES,
    most: int = MOST,
) -> list[Memory]:
    """The memories that are to last, the largest first.

    Args:
        records: of the tree, each with that of its kind where it is an open file.
        sources: of its pages.
        small_bytes: those up to this size are none.
        most: how many there are; each one takes a thread.
    """
    locked: set[bytes] = set()
    for _, state in records:
        locks: Sequence[Lock] = getattr(state, "locks", ())
        if all(lock.kind == "posix" for lock in locks):
            continue
        if not isinstance(state, RegularState) or state.last_name:
            return []  # nobody can say which mappings are of the same description
        locked.add(os.path.basename(state.path.path))
    spaces = {record.space: record for record, _ in records if isinstance(record, AddressSpace)}
    holding = {
        record.index
        for record, _ in records
        if isinstance(record, MappedFile)
        and locked
        and (record.last_name or os.path.basename(record.path.path) in locked)
    }
    found = [
        Memory(source.space, source.pid, RemoteAddress(source.runs[0][0]), size)
        for source in sources
        if isinstance(source, ProcessPages)
        and (size := total_bytes(source.runs)) > small_bytes
        and not any(_holds_more(vma, holding) for vma in spaces[source.space].vmas)
    ]
    return sorted(found, key=lambda memory: -memory.size_bytes)[:most]


def _holds_more(vma: Vma, holding: set[int]) -> bool:
    if vma.kind in ("aio", "sysv"):
        return True
    return vma.kind == "file" and (
        vma.backing in holding or bool(vma.flags & _MAP_SHARED and not vma.readonly_file)
    )


class Outliving:
    """Memories that last until `close`."""

    def __init__(self) -> None:
        self._held: list[LastingMemory] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._held

    def hold(self, memories: Iterable[Memory]) -> None:
        """Let them last, as far as this user may do so; in any thread."""
        for memory in memories:
            try:
                self._held.append(LastingMemory(memory.pid, memory.page))
            except (OSError, RuntimeError):
                return  # then its process takes its time

    def close(self) -> None:
        """Give them back, which takes its time; idempotent."""
        while self._held:
            self._held.pop().close()
