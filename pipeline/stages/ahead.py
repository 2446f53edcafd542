"""What the kernel takes long to tell of a tree that stands still, asked beside everything else.

/proc/PID/smaps is the only place where the kernel tells the flags of mappings, and it walks through all pages of the
process for them: 17 ms a GiB. That walk is the kernel's own work, so a thread beside the one that asks everything else
has it done when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from pipeline.ids import HostPid
from pipeline.kernel.smaps import Mapping, smaps


class MappingReader:
    """Who reads mappings: a thread that may be there before the tree stands still; a context manager."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "smaps")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Let the thread be there, which else is made when it is needed first: a third of a ms."""
        self._thread.submit(int)

    def ahead(self, pids: Sequence[HostPid]) -> MappingsAhead:
        """What is read of processes from now on."""
        return MappingsAhead(pids, self._thread)

    def close(self) -> None:
        """Let the thread end; idempotent."""
        self._thread.shutdown()


class MappingsAhead:
    """The mappings of processes, read in their order; a context manager, behind which nothing is read.

    Args:
        pids: they stand still, and may be read by any thread of this process.
        thread: reads them.
    """

    def __init__(self, pids: Sequence[HostPid], thread: ThreadPoolExecutor) -> None:
        self._read = {pid: thread.submit(smaps, pid) for pid in pids}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait([one for one in self._read.values() if not one.cancel()])

    def is_there(self, pid: HostPid) -> bool:
        """Whether those of one of them have been read: nobody walks through them any more."""
        return self._read[pid].done()

    def of(self, pid: HostPid) -> list[Mapping]:
        """Those of one of them, waited for; raises as `pipeline.kernel.smaps.smaps` does."""
        return self._read[pid].result()
