"""The surroundings that a restore has made around a tree, and how to get into them to dump it again.

A tree that was restored with ``--new-pidns``, as every one of a plain user, lives in a pid namespace that was made
for it, whose first process is `pipeline.remote.init`, in a mount namespace with the /proc of that one, and,
rootless, in a cradle. None of it is the tree's. So it is dumped from in there: what was external before the
first dump is external again, pids are the numbers that the tree had, clocks say what they say to it, and nothing nests
deeper from one dump to the next.

Only surroundings that the same user has made are entered: whoever can write into a mount namespace decides what
is executed there.

Sources: setns(2), pid_namespaces(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import nsfs, procfs
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, setns

_KINDS = (("user", CLONE.NEWUSER), ("mnt", CLONE.NEWNS), ("pid", CLONE.NEWPID), ("time", CLONE.NEWTIME))


class Surroundings(NamedTuple):
    """What was made around a tree. `init`: the first process, as seen from here; `pid`: the root, from in there."""

    init: HostPid
    pid: HostPid


def find(pid: int) -> Surroundings | None:
    """The surroundings that a restore of this user has made around `pid`; None where there are none."""
    from pipeline.remote.init import COMM

    try:
        numbers = procfs.status(HostPid(pid)).ns_pid if pid > 0 else ()
        init = _outermost_init(HostPid(pid)) if len(numbers) > 1 else None
        if init is None or init == pid or procfs.comm(init).encode() != COMM or not _is_own(init):
            return None
    except (procfs.ProcessGone, OSError):
        return None
    return Surroundings(init, HostPid(numbers[1]))


def _outermost_init(pid: HostPid) -> HostPid | None:
    """The ancestor of `pid`, or itself, that is the first process of a pid namespace directly below ours."""
    at = pid
    while at > 0:
        status = procfs.status(at)
        if status.ns_pid[1:] == (1,):
            return at
        if len(status.ns_pid) == 1:
            return None
        at = HostPid(status.ppid)
    return None


def _is_own(init: HostPid) -> bool:
    """Whether it runs as us, in our user namespace or in one that we have made."""
    if set(procfs.status(init).uids) != {os.geteuid()}:
        return False
    fd = nsfs.open_namespace(init, "user")
    try:
        own = os.stat("/proc/self/ns/user")
        return nsfs.key_of(fd) == (own.st_dev, own.st_ino) or nsfs.owner_uid(fd) == os.geteuid()
    finally:
        os.close(fd)


def join(init: HostPid) -> None:
    """Enter the namespaces of a first process; children are born in its pid namespace. The working directory stays.

    Raises:
        ProcessGone: it has ended.
        OSError: the kernel refuses it, or this process has threads.
    """
    with ExitStack() as stack:
        fds: list[tuple[LocalFd, int]] = []
        for kind, flag in _KINDS:
            if not os.path.exists(f"/proc/self/ns/{kind}"):
                continue  # a kernel without time namespaces
            fd = nsfs.open_namespace(init, kind)
            stack.callback(os.close, fd)
            own = os.stat(f"/proc/self/ns/{kind}")
            if nsfs.key_of(fd) != (own.st_dev, own.st_ino):
                fds.append((fd, int(flag)))
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, here)
        for fd, kinds in fds:
            setns(fd, kinds)
        os.fchdir(here)
    prctl(PRCTL.SET_DUMPABLE, 1)  # our /proc files stay ours


def check_levels(pid: HostPid) -> Iterator[Blocker]:
    """A pid namespace between ours and the root's own has a first process, which is not of the tree.

    Such a namespace could not be made again.
    """
    numbers = procfs.status(pid).ns_pid
    if numbers[1:] in ((), (1,)):
        return
    init = _outermost_init(pid)
    if find(pid) is not None:
        yield Blocker(
            f"pid {pid}",
            f"was restored into a pid namespace made for its tree, whose first process is pid {init}",
            "use the command line, which looks at it from in there",
        )
    elif len(numbers) > 2:
        yield Blocker(
            f"pid {pid}",
            f"is {len(numbers) - 1} pid namespaces deep; the first process of the outermost is not part of the tree",
            f"give that one: --pid {init}"
            if init
            else "run the pipeline in the pid namespace next to the tree",
        )
