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
import fcntl
import functools
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import PIDFD_THREAD, pidfd_getfd, pidfd_open, syscall

#: runs a system call inside a process
Inside = Callable[..., int]

#: flags of userfaultfd(2): what anybody may make, for faults of user space
MAKE_FLAGS = 1 | os.O_CLOEXEC | os.O_NONBLOCK

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WRITEPROTECT = 0xC018AA06
_API_VERSION = 0xAA
_API = struct.Struct("<3Q")
_REGISTER = struct.Struct("<4Q")
_WRITEPROTECT = struct.Struct("<3Q")
_MODE_WP = 2
_WP_UNPOPULATED = 1 << 13
_WP_ASYNC = 1 << 15


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


def make_inside(pid: HostPid, inside: Inside) -> LocalFd:
    """A descriptor of the memory of a process that stands still; the caller owns it.

    Nothing is left of it in the process: but for a descriptor that watches nothing, if we are killed just between the
    calls that make it.

    Args:
        pid: the process, by any of its threads.
        inside: runs a system call inside it; OSError if that fails.

    Raises:
        OSError: EINVAL, ENOSYS: this kernel cannot; EPERM: a sandbox forbids it.
    """
    number = inside(NR.userfaultfd, MAKE_FLAGS)
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
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(_API_VERSION, _WP_UNPOPULATED | _WP_ASYNC, 0)))


def register(fd: LocalFd, start: int, end: int) -> bool:
    """Watch the mappings of [start, end); False where that is not possible, or nothing is mapped any more.

    Raises:
        ProcessLookupError: the memory is gone: the process has ended, or executes another program (the kernel says
            ENOMEM).
    """
    try:
        fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, end - start, _MODE_WP, 0)))
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
        fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(_WRITEPROTECT.pack(start, end - start, 0)))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EAGAIN):
            return False
        raise
    return True
