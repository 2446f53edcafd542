"""Files of a process that is ours, but runs with an id that is not.

Who made a user namespace has all capabilities in it, so its processes may be traced. But the files in /proc/PID
that only their owner may open belong to the id that the process runs as, such as one of the ranges of
subuid(5), and so do files that it has made. A capability counts for a file only inside of a user namespace that maps
its owner. So a child joins the outermost user namespace below ours, opens the file there, and hands it over.

The child does nothing but system calls between fork and exit, so that it is safe to fork where other threads run.

Sources: user_namespaces(7), proc_pid(5); capable_wrt_inode_uidgid() in the kernel.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import CLONE, setns


def open_file(pid: HostPid, name: str, flags: int) -> LocalFd:
    """Open /proc/PID/`name`, from inside of its user namespace where that is what it takes; the caller owns it.

    Raises:
        FileNotFoundError, ProcessLookupError: there is no such process, or no such file.
        PermissionError: it may not be opened from there either.
    """
    path = f"/proc/{pid}/{name}"
    return opened(pid, lambda: os.open(path, flags | os.O_CLOEXEC))


def opened(pid: HostPid, act: Callable[[], int]) -> LocalFd:
    """The descriptor that `act` opens here, or, where that is not permitted, inside of the user namespace of `pid`.

    Args:
        pid: the process whose file it is.
        act: does system calls only.

    Raises:
        ProcessLookupError: there is no such process.
        OSError: as `act` raises it.
    """
    try:
        return LocalFd(act())
    except PermissionError:
        with ExitStack() as stack:
            namespace = _outermost_below_ours(pid, stack)
            if namespace is None:
                raise
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(ours)
            with theirs:
                child = fork_deaf()
                if child == 0:
                    _hand_over(namespace, act, theirs)
            stack.callback(os.waitpid, child, 0)
            answer, fds, _, _ = socket.recv_fds(ours, 16, 1, socket.MSG_CMSG_CLOEXEC)
    if fds:
        return LocalFd(fds[0])
    code = int(answer or b"1")
    raise OSError(code, os.strerror(code))


def _hand_over(namespace: LocalFd, act: Callable[[], int], to: socket.socket) -> None:
    try:
        setns(namespace, CLONE.NEWUSER)
        socket.send_fds(to, [b"0"], [act()])
    except OSError as error:
        to.send(b"%d" % (error.errno or 1))
    finally:
        os._exit(0)


def _outermost_below_ours(pid: HostPid, stack: ExitStack) -> LocalFd | None:
    """The user namespace around `pid` whose parent is our own; None where there is none. `stack` closes it."""
    own = os.stat("/proc/self/ns/user")
    ours = nsfs.NamespaceKey(own.st_dev, own.st_ino)
    at = nsfs.open_namespace(pid, "user")
    stack.callback(os.close, at)
    while nsfs.key_of(at) != ours:
        try:
            above = nsfs.parent(at)
        except PermissionError:
            return None
        stack.callback(os.close, above)
        if nsfs.key_of(above) == ours:
            return at
        at = above
    return None
