"""Whether devices may be writing into the pages of a process, behind its page tables.

What arrives in a page that is pinned for direct I/O marks nothing by which writes are told
(`pipeline.resources.memory.tracking`). The pins cannot be seen, but what they are made through: an open file with
O_DIRECT, or a ring of io_uring. A device that is writing when the process is looked at does so through one that is
open then.

Source: Documentation/core-api/pin_user_pages.rst; open(2), O_DIRECT.
"""

from __future__ import annotations

import os
import stat

from pipeline.ids import HostPid
from pipeline.kernel import procfs

_RING = b"anon_inode:[io_uring]"


def may_write_to(pid: HostPid) -> bool:
    """Whether devices may write to a process now; false where it has ended.

    Raises:
        OSError: EACCES: it may not be looked at.
    """
    fds: list[str] = []
    with procfs.unless_gone(pid):
        fds = procfs.list_dir(pid, "fd")
    return any(_is_way_in(pid, int(name)) for name in fds)


def _is_way_in(pid: HostPid, fd: int) -> bool:
    try:
        target = procfs.read_link(pid, f"fd/{fd}")
        if not target.startswith(b"/"):
            return target == _RING
        (flags,) = procfs.fdinfo(pid, fd)["flags"]
        # of a pipe with a name it means packets
        return bool(int(flags, 8) & os.O_DIRECT) and not stat.S_ISFIFO(
            os.stat(f"/proc/{pid}/fd/{fd}").st_mode
        )
    except (FileNotFoundError, procfs.ProcessGone):
        return False
