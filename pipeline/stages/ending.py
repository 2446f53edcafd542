"""Whether the end of a tree has to be waited for before it runs on elsewhere.

A killed process runs nothing any more, but its end takes the kernel a while: 1 ms, 10 with ten processes. What that
end still does is mostly nobody else's: but what was written to a file of a network file system, or of FUSE and its
like, may be on its way until the file is closed (close-to-open consistency, nfs(5)), and would come behind what is
written elsewhere by then. So may what was written to a block device. And a socket may say at its end what is not true
of who has its addresses by then: that nobody is in its multicast groups any more, or that its connection has ended.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from pipeline.image.schema import Record
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.policy import DumpPolicy
from pipeline.resources.datagram_state import DatagramState
from pipeline.resources.kinds import FdView

#: whoever else sees files of these, sees them through the same page cache
_LOCAL = frozenset(
    {
        Magic.BTRFS,
        Magic.EXT4,
        Magic.F2FS,
        Magic.HUGETLBFS,
        Magic.OVERLAYFS,
        Magic.RAMFS,
        Magic.SECRETMEM,
        Magic.TMPFS,
        Magic.XFS,
    }
)


def may_be_seen(
    views: Iterable[FdView], mapped_on: Iterable[int], states: Iterable[Record | None], policy: DumpPolicy
) -> bool:
    """Whether others may see something of it when the files of a tree are closed and unmapped.

    Args:
        views: one of each open file of the tree; their duplicates are asked.
        mapped_on: `f_type` of the file systems whose files it may write by way of its mappings.
        states: what its open files are.
        policy: by which they were captured.
    """
    written = [view for view in views if view.flags & os.O_ACCMODE != os.O_RDONLY]
    if any(stat.S_ISBLK(view.stat.st_mode) for view in written) or not _LOCAL.issuperset(mapped_on):
        return True
    if policy.tcp == "close" or any(isinstance(state, DatagramState) and state.groups for state in states):
        return True
    places = {view.stat.st_dev: view.local for view in written if stat.S_ISREG(view.stat.st_mode)}
    try:
        return any(filesystem(local) not in _LOCAL for local in places.values())
    except OSError:  # it does not answer
        return True
