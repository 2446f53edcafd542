"""The thin, typed edge to the kernel: one function a system call, spelled as the kernel spells it.

Nothing here interprets: every function raises `OSError` with the kernel's errno and
returns what the kernel returned. Only the calls that Python's `os` lacks are here.
Sources: the man page of each call, and for newer ones the kernel's headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.kernel.arch.x86_64_numbers import NR, call_name

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
#: pointers take numbers as they are, modulo 2**64
_syscall.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 6]
_UNUSED = [(0,) * (6 - count) for count in range(7)]

_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE = 0x01
_SYNC_FILE_RANGE_WRITE = 2
#: most remote ranges in one process_vm_readv (UIO_MAXIOV)
IOV_MAX = 1024


def syscall(number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a raw system call. Numbers are passed as 64-bit values, bytes and buffers as pointers.

    Raises:
        OSError: with the errno and the call's name.
    """
    result: int = _syscall(number, *args, *_UNUSED[len(args)])
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{call_name(number)}: {os.strerror(code)}")
    return result


def populate(view: memoryview) -> None:
    """Let the kernel give the memory behind a writable buffer now: MADV_POPULATE_WRITE of madvise(2), Linux 5.14."""
    buffer = (ctypes.c_char * len(view)).from_buffer(view)
    syscall(NR.madvise, ctypes.addressof(buffer), len(view), _MADV_POPULATE_WRITE)


def fallocate(fd: LocalFd, offset: int, length: int) -> None:
    """Reserve storage for a part of a file, whose size stays as it is: FALLOC_FL_KEEP_SIZE of fallocate(2).

    posix_fallocate(3) would write to every block where the file system cannot.
    """
    syscall(NR.fallocate, fd, _FALLOC_FL_KEEP_SIZE, offset, length)


def begin_writeback(fd: LocalFd, offset: int, length: int) -> None:
    """Let a part of a file be on its way to the disk: SYNC_FILE_RANGE_WRITE of sync_file_range(2).

    It waits for nothing but a place in the queue of the disk; whether it arrives fsync(2) tells.
    """
    syscall(NR.sync_file_range, fd, offset, length, _SYNC_FILE_RANGE_WRITE)


class CLONE(IntFlag):
    """Flags of clone3(2), unshare(2) and setns(2)."""

    NEWTIME = 0x80
    VM = 0x100
    FS = 0x200
    FILES = 0x400
    SIGHAND = 0x800
    PIDFD = 0x1000
    PTRACE = 0x2000
    VFORK = 0x4000
    PARENT = 0x8000
    THREAD = 0x10000
    NEWNS = 0x20000
    SYSVSEM = 0x40000
    SETTLS = 0x80000
    PARENT_SETTID = 0x100000
    CHILD_CLEARTID = 0x200000
    CHILD_SETTID = 0x1000000
    NEWCGROUP = 0x2000000
    NEWUTS = 0x4000000
    NEWIPC = 0x8000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000
    IO = 0x80000000


class PRCTL(IntEnum):
    """Operations of prctl(2)."""

    SET_PDEATHSIG = 1
    GET_PDEATHSIG = 2
    GET_DUMPABLE = 3
    SET_DUMPABLE = 4
    GET_KEEPCAPS = 7
    SET_KEEPCAPS = 8
    SET_NAME = 15
    GET_NAME = 16
    GET_SECCOMP = 21
    SET_SECCOMP = 22
    CAPBSET_READ = 23
    CAPBSET_DROP = 24
    GET_TSC = 25
    SET_TSC = 26
    GET_SECUREBITS = 27
    SET_SECUREBITS = 28
    SET_TIMERSLACK = 29
    GET_TIMERSLACK = 30
    MCE_KILL = 33
    MCE_KILL_GET = 34
    SET_MM = 35
    SET_CHILD_SUBREAPER = 36
    GET_CHILD_SUBREAPER = 37
    SET_NO_NEW_PRIVS = 38
    GET_NO_NEW_PRIVS = 39
    GET_TID_ADDRESS = 40
    SET_THP_DISABLE = 41
    GET_THP_DISABLE = 42
    CAP_AMBIENT = 47
    GET_SPECULATION_CTRL = 52
    SET_SPECULATION_CTRL = 53
    SET_IO_FLUSHER = 57
    GET_IO_FLUSHER = 58
    SET_SYSCALL_USER_DISPATCH = 59
    SCHED_CORE = 62
    SET_MDWE = 65
    GET_MDWE = 66
    SET_MEMORY_MERGE = 67
    GET_MEMORY_MERGE = 68
    TIMER_CREATE_RESTORE_IDS = 77
    SET_VMA = 0x53564D41
    SET_PTRACER = 0x59616D61


#: PR_SET_MM sub-operation (prctl(2)): set all of mm's bounds at once
PR_SET_MM_MAP = 14


#: of one thread, which may be the first of its process; kept in the status flags; since 6.9
PIDFD_THREAD = os.O_EXCL


def pidfd_open(pid: HostPid, flags: int = 0) -> LocalFd:
    """pidfd_open(2); the caller owns the descriptor (close-on-exec)."""
    return LocalFd(syscall(NR.pidfd_open, pid, flags))


def pidfd_getfd(pidfd: LocalFd, fd: int) -> LocalFd:
    """pidfd_getfd(2): duplicate descriptor `fd` of the process into this one (close-on-exec)."""
    return LocalFd(syscall(NR.pidfd_getfd, pidfd, fd, 0))


def pidfd_send_signal(pidfd: LocalFd, signal: int) -> None:
    """pidfd_send_signal(2)."""
    syscall(NR.pidfd_send_signal, pidfd, signal, 0, 0)


class KCMP(IntEnum):
    """Types of kcmp(2)."""

    FILE = 0
    VM = 1
    FILES = 2
    FS = 3
    SIGHAND = 4
    IO = 5
    SYSVSEM = 6
    EPOLL_TFD = 7


def kcmp(pid1: int, pid2: int, kind: KCMP, idx1: int = 0, idx2: int | bytes = 0) -> int:
    """kcmp(2): 0 equal, 1 less, 2 greater, 3 not equal but unordered."""
    return syscall(NR.kcmp, pid1, pid2, kind, idx1, idx2)


_OPEN_TREE_CLONE = 1


class RESOLVE(IntFlag):
    """How openat2(2) walks a path."""

    NO_XDEV = 1
    NO_MAGICLINKS = 2
    NO_SYMLINKS = 4
    BENEATH = 8
    IN_ROOT = 16
    CACHED = 32


def openat2(dirfd: int, path: bytes, flags: int, mode: int = 0, resolve: int = 0) -> LocalFd:
    """openat2(2); O_CLOEXEC is added. `mode` only counts with O_CREAT or O_TMPFILE."""
    how = struct.pack("<3Q", flags | os.O_CLOEXEC, mode, resolve)
    return LocalFd(syscall(NR.openat2, dirfd, path, how, len(how)))


def setns(fd: int, kinds: int) -> None:
    """setns(2) of the calling thread."""
    syscall(NR.setns, fd, kinds)


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread (CLONE_NEWUSER and CLONE_NEWPID: of a single-threaded process)."""
    syscall(NR.unshare, flags)


def mount(
    source: bytes | None, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None
) -> None:
    """mount(2)."""
    syscall(NR.mount, source, target, kind, flags, data)


def umount2(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    syscall(NR.umount2, target, flags)


def open_tree(dirfd: int, path: bytes) -> LocalFd:
    """open_tree(2): a detached copy of the mount at `path`, without those on it; gone when it is closed.

    Raises:
        OSError: EINVAL: mounts on it were locked by another user namespace.
    """
    return LocalFd(syscall(NR.open_tree, dirfd, path + b"\0", _OPEN_TREE_CLONE | os.O_CLOEXEC))


def prctl(option: int, *args: int | bytes) -> int:
    """prctl(2) of the calling thread."""
    return syscall(NR.prctl, option, *args, *[0] * (4 - len(args)))


def process_vm_readv(
    pid: HostPid, segments: Sequence[tuple[int, int]], buffer: bytearray | memoryview, offset: int = 0
) -> int:
    """Read up to `IOV_MAX` ranges (address, length in bytes) of `pid` into `buffer` from `offset` on.

    Returns the number of bytes read; short where a range is not readable.

    Raises:
        OSError: EFAULT if not even the first byte was readable, ESRCH, EPERM.
    """
    total = sum(length for _, length in segments)
    local = struct.pack("<2Q", _address_of(buffer, offset, total), total)
    remote = b"".join(struct.pack("<2Q", address, length) for address, length in segments)
    return syscall(NR.process_vm_readv, pid, local, 1, remote, len(segments), 0)


def process_vm_writev(pid: HostPid, parts: Sequence[tuple[int, int, int]], buffer: memoryview) -> int:
    """Write up to `IOV_MAX` parts (address, offset in `buffer`, length in bytes) of `buffer` to `pid`.

    Returns the number of bytes written; short where a part may not be written.

    Raises:
        OSError: EFAULT if not even the first byte could be written, ESRCH, EPERM.
    """
    base = _address_of(buffer, 0, len(buffer))
    local = b"".join(struct.pack("<2Q", base + at, length) for _, at, length in parts)
    remote = b"".join(struct.pack("<2Q", address, length) for address, _, length in parts)
    return syscall(NR.process_vm_writev, pid, local, len(parts), remote, len(parts), 0)


def _address_of(buffer: bytearray | memoryview, offset: int, size_bytes: int) -> int:
    return ctypes.addressof((ctypes.c_char * size_bytes).from_buffer(buffer, offset))


def read_memory(pid: HostPid, address: RemoteAddress, size_bytes: int) -> bytes:
    """Read `size_bytes` at `address` of `pid`, whole or OSError(EFAULT)."""
    buffer = bytearray(size_bytes)
    if size_bytes and process_vm_readv(pid, [(address, size_bytes)], buffer) != size_bytes:
        raise OSError(errno.EFAULT, f"pid {pid}: memory at {address:#x} is not readable")
    return bytes(buffer)
