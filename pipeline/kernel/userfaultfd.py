"""Write protection by userfaultfd(2) in asynchronous mode: the kernel notes which pages of a process were written.

The descriptor belongs to the process whose memory it watches and has to be made by a system call inside it; this
process works on a duplicate. While it is open, a page that is write-protected by a PAGEMAP_SCAN (PM_SCAN_WP_MATCHING)
loses its protection when it is written, without anybody having to answer. When the last duplicate is closed, also by
the end of whoever holds it, nothing of it is left.

A range has to be registered; what is mapped later, grown by brk(2), or moved by mremap(2) is not.

Sources: ioctl_userfaultfd(2); Documentation/admin-guide/mm/userfaultfd.rst; include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs, uffdio
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import PIDFD_THREAD, pidfd_getfd, pidfd_open, syscall
from pipeline.kernel.uffdio import FEATURE, MODE

#: runs a system call inside a process
Inside = Callable[..., int]

#: where /proc/PID/fd/N points to
LINK = "anon_inode:[userfaultfd]"
#: what fdinfo says of such, and of nothing else
_SAID = {"pending", "total", "API"}
#: UFFD_USER_MODE_ONLY: only faults of user space; anybody may make such a one
USER_MODE_ONLY = 1
MAKE_FLAGS = USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK


@functools.cache
def is_asynchronous() -> bool:
    """Whether this kernel has the asynchronous mode, and lets us use it."""
    try:
        fd = LocalFd(syscall(NR.userfaultfd, MAKE_FLAGS))
        try:
            begin_tracking(fd)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def make_inside(pid: HostPid, inside: Inside, flags: int = MAKE_FLAGS) -> LocalFd:
    """A descriptor of the memory of a process that stands still; the caller owns it.

    Nothing is left of it in the process: but for a descriptor that watches nothing, if we are killed just between the
    calls that make it.

    Args:
        pid: the process, by any of its threads.
        inside: runs a system call inside it; OSError if that fails.
        flags: of userfaultfd(2).

    Raises:
        OSError: EINVAL, ENOSYS: this kernel cannot; EPERM: a sandbox forbids it, or that it is for more than user
            space.
    """
    number = inside(NR.userfaultfd, flags)
    return taken_from(pid, number, inside)


def has_one(pid: HostPid) -> bool:
    """Whether a process has a userfaultfd; false where it has ended.

    Raises:
        OSError: EACCES: it may not be looked at.
    """
    with procfs.unless_gone(pid):
        for number in procfs.list_dir(pid, "fdinfo"):
            if _is_one(pid, int(number)):
                return True
    return False


def _is_one(pid: HostPid, number: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}") == LINK
    except PermissionError:  # it runs with an id that is not ours: see `pipeline.kernel.inside`
        with suppress(FileNotFoundError):
            return procfs.fdinfo(pid, number).keys() >= _SAID
    except (FileNotFoundError, ProcessLookupError):
        pass  # it is closed by now
    return False


def taken_from(pid: HostPid, number: int, inside: Inside) -> LocalFd:
    """A descriptor of a process, or a thread, becomes ours, and its no longer; the caller owns it.

    Raises:
        OSError: as pidfd_getfd(2); as `inside`.
    """
    with ExitStack() as undo:
        try:
            process = pidfd_open(pid, 0 if procfs.status(pid).tgid == pid else PIDFD_THREAD)
            try:
                fd = LocalFd(pidfd_getfd(process, number))
            finally:
                os.close(process)
            undo.callback(os.close, fd)
        finally:
            inside(NR.close, number)
        undo.pop_all()
    return fd


def begin_tracking(fd: LocalFd) -> None:
    """Choose the asynchronous mode.

    Raises:
        OSError: EINVAL: this kernel has none (it came with 6.7).
    """
    uffdio.begin(fd, FEATURE.WP_UNPOPULATED | FEATURE.WP_ASYNC)


def begin_following(fd: LocalFd) -> None:
    """The same, and whoever forks, or moves or drops what is watched, waits until that was read.

    See `pipeline.kernel.paging`. A child's mappings are watched, too, by a descriptor that its fork tells of.

    Raises:
        OSError: as `begin_tracking`; EPERM: that is for CAP_SYS_PTRACE in the initial user namespace only.
    """
    followed = FEATURE.EVENT_FORK | FEATURE.EVENT_REMAP | FEATURE.EVENT_REMOVE
    uffdio.begin(fd, FEATURE.WP_UNPOPULATED | FEATURE.WP_ASYNC | followed)


def register(fd: LocalFd, start: int, end: int) -> bool:
    """Watch the mappings of [start, end); False where that is not possible, or nothing is mapped any more.

    Raises:
        ProcessLookupError: the memory is gone: the process has ended, or executes another program (the kernel says
            ENOMEM).
    """
    try:
        uffdio.register(fd, start, end, MODE.WP)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise ProcessLookupError(errno.ESRCH, "the memory that was watched is gone") from None
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.EPERM):
            return False
        raise
    return True


def unprotect(fd: LocalFd, start: int, end: int) -> bool:
    """Take the protection from the pages of [start, end), and the mark of it; False where it is not watched (any more).

    Raises:
        ProcessLookupError: the memory is gone.
    """
    try:
        uffdio.unprotect(fd, start, end)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EAGAIN):
            return False
        raise
    return True
