"""What the kernel takes long to tell of a tree that stands still, asked beside everything else.

/proc/PID/smaps is the only place where the kernel tells the flags of mappings, and it walks through all pages of the
process for them: 17 ms a GiB. That walk is the kernel's own work, so a thread beside the one that asks everything else
has it done when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pipeline.ids import HostPid
from pipeline.kernel.smaps import Mapping, smaps


class MappingsAhead:
    """The mappings of processes, read in their order; a context manager, behind which its thread has ended.

    Args:
        pids: they stand still, and may be read by any thread of this process.
    """

    def __init__(self, pids: Sequence[HostPid]) -> None:
        self._reader = ThreadPoolExecutor(1, "smaps")
        self._read = {pid: self._reader.submit(smaps, pid) for pid in pids}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def of(self, pid: HostPid) -> list[Mapping]:
        """Those of one of them, waited for; raises as `pipeline.kernel.smaps.smaps` does."""
        return self._read[pid].result()
