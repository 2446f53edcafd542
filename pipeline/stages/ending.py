"""Whether the end of a tree has to be waited for before it runs on elsewhere.

A killed process runs nothing any more, but its end takes the kernel a while: 1 ms, 10 with ten processes. What that
end still does is mostly nobody else's: but what was written to a file of a network file system, or of FUSE and its
like, may be on its way until the file is closed (close-to-open consistency, nfs(5)), and would come behind what is
written elsewhere by then. So may what was written to a block device.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from pipeline.resources.kinds import FdView
from pipeline.resources.paths import Magic, filesystem

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


def may_write_at_its_end(views: Iterable[FdView], mapped_on: Iterable[int]) -> bool:
    """Whether something that others see may be written when the files of a tree are closed and unmapped.

    Args:
        views: one of each open file of the tree; their duplicates are asked.
        mapped_on: `f_type` of the file systems whose files it may write by way of its mappings.
    """
    written = [view for view in views if view.flags & os.O_ACCMODE != os.O_RDONLY]
    if any(stat.S_ISBLK(view.stat.st_mode) for view in written) or not _LOCAL.issuperset(mapped_on):
        return True
    places = {view.stat.st_dev: view.local for view in written if stat.S_ISREG(view.stat.st_mode)}
    try:
        return any(filesystem(local) not in _LOCAL for local in places.values())
    except OSError:  # it does not answer
        return True
