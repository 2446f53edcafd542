"""Namespaces as files: which one a task is in, who owns it, what its parent is.

A namespace is known by (device, inode) of its nsfs file; the numbers are the same for
every reader and are reused only when the namespace is gone. An open descriptor of one
keeps it alive.

Sources: namespaces(7), ioctl_nsfs(2), include/uapi/linux/nsfs.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.ids import HostPid, HostUid, LocalFd
from pipeline.kernel.procfs import ProcessGone, is_exiting

_NS_GET_USERNS = 0xB701
_NS_GET_PARENT = 0xB702
_NS_GET_NSTYPE = 0xB703
_NS_GET_OWNER_UID = 0xB704

#: the links of /proc/PID/ns
KINDS: Sequence[str] = (
    "user",
    "pid",
    "pid_for_children",
    "mnt",
    "uts",
    "ipc",
    "net",
    "cgroup",
    "time",
    "time_for_children",
)


class NamespaceKey(NamedTuple):
    """Identity of a namespace: st_dev and st_ino of its file."""

    device: int
    inode: int


def key_of(fd: LocalFd) -> NamespaceKey:
    """Identity of the namespace behind an open namespace file."""
    result = os.fstat(fd)
    return NamespaceKey(result.st_dev, result.st_ino)


def keys(pid: HostPid) -> dict[str, NamespaceKey]:
    """Identity of every namespace that task `pid` is in, by link name.

    Kinds that this kernel lacks are left out; so is `pid_for_children` between unshare(2)
    and the first child, when the namespace has no first process yet.

    Raises:
        ProcessGone: there is no such process, or it is a zombie: it is in no namespace but `user` and `pid`.
        PermissionError: it may not be traced.
    """
    found = {}
    for kind in KINDS:
        identity = key(pid, kind)
        if identity is not None:
            found[kind] = identity
    if not found:
        raise ProcessGone(pid)
    return found


def key(pid: HostPid, kind: str) -> NamespaceKey | None:
    """Identity of one namespace of task `pid`, by its link's name; None where `keys` leaves it out.

    Raises:
        ProcessGone, PermissionError: see `keys`.
    """
    try:
        result = os.stat(f"/proc/{pid}/ns/{kind}")
    except ProcessLookupError:
        raise ProcessGone(pid) from None
    except PermissionError:
        if is_exiting(pid):  # with its memory goes who may look at it
            raise ProcessGone(pid) from None
        raise
    except FileNotFoundError:
        return None
    return NamespaceKey(result.st_dev, result.st_ino)


def open_namespace(pid: HostPid, kind: str) -> LocalFd:
    """Open /proc/PID/ns/`kind` (see `KINDS`); the caller owns it.

    Raises:
        ProcessGone: there is no such process (or, for a zombie, no such namespace).
        PermissionError: it may not be traced.
    """
    try:
        return LocalFd(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGone(pid) from None


def owner(fd: LocalFd) -> LocalFd:
    """The user namespace that owns this one; of a user namespace: its parent. The caller owns the result.

    Raises:
        OSError: EPERM: it is outside of what the caller may see (its own user namespace and below).
    """
    return LocalFd(fcntl.ioctl(fd, _NS_GET_USERNS))


def parent(fd: LocalFd) -> LocalFd:
    """The parent of a user or pid namespace. The caller owns the result.

    Raises:
        OSError: EPERM: there is none, or it is outside of what the caller may see; EINVAL: another kind.
    """
    return LocalFd(fcntl.ioctl(fd, _NS_GET_PARENT))


def owner_uid(fd: LocalFd) -> HostUid:
    """Uid of the creator of a user namespace, as the caller's user namespace maps it (65534: not at all).

    Raises:
        OSError: EINVAL: it is no user namespace.
    """
    argument = bytearray(4)
    fcntl.ioctl(fd, _NS_GET_OWNER_UID, argument)
    return HostUid(struct.unpack("<I", argument)[0])


def kind_of(fd: LocalFd) -> int:
    """The CLONE_NEW* flag of this namespace."""
    return fcntl.ioctl(fd, _NS_GET_NSTYPE)
