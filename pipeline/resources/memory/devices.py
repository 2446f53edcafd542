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
from collections.abc import Mapping, Sequence

from pipeline.ids import HostPid
from pipeline.kernel import procfs

_RING = b"anon_inode:[io_uring]"
#: what fdinfo says of such
_SAID_OF_RING = "SqMask"


def may_write_to(pid: HostPid) -> bool:
    """Whether devices may write to a process now; false where it has ended.

    Raises:
        OSError: EACCES: it may not be looked at.
    """
    with procfs.unless_gone(pid):
        for number in procfs.list_dir(pid, "fdinfo"):
            if _is_way_in(pid, int(number)):
                return True
    return False


def _is_way_in(pid: HostPid, fd: int) -> bool:
    try:
        try:
            target = procfs.read_link(pid, f"fd/{fd}")
        except PermissionError:  # it runs with an id that is not ours: see `pipeline.kernel.inside`
            info = procfs.fdinfo(pid, fd)
            return _SAID_OF_RING in info or _is_direct(info)
        if not target.startswith(b"/"):
            return target == _RING
        # of a pipe with a name it means packets
        return _is_direct(procfs.fdinfo(pid, fd)) and not stat.S_ISFIFO(
            os.stat(f"/proc/{pid}/fd/{fd}").st_mode
        )
    except FileNotFoundError:
        return False


def _is_direct(info: Mapping[str, Sequence[str]]) -> bool:
    (flags,) = info["flags"]
    return bool(int(flags, 8) & os.O_DIRECT)
