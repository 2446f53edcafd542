"""The table of descriptors of this process: how large it may be, and how large it is already.

The kernel lets it grow by doubling, when a descriptor is wanted that has no room in it, and if the process has threads,
every time waits for a grace period of RCU: some 10 ms, which is much where a tree stands still.

Source: expand_fdtable() in fs/file.c; getrlimit(2).
"""

from __future__ import annotations

import fcntl
import os
import resource

#: descriptors of this process for each open file of a tree, and for what else there is
_EACH, _SPARE = 3, 1024
#: in a tree that is to find room at once
_FEW = 300


def raise_limit() -> None:
    """As many descriptors as this process may have: one is held for every open file of a tree."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_room_first() -> None:
    """Before this process has threads: room that costs nothing, for a tree with few open files."""
    raise_limit()
    make_room(_FEW)


def make_room(files: int) -> None:
    """Let the table have room now for what a tree with so many open files takes here, as far as the limit goes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(len(os.listdir("/proc/self/fd")) + _EACH * files + _SPARE, soft) - 1
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        if wanted > fd:
            os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, wanted))
    except OSError:
        pass  # all from there on are taken: there is room
    finally:
        os.close(fd)
