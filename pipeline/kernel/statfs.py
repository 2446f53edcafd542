"""On what kind of file system an open file is.

Source: statfs(2).
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall

_STATFS_BYTES = 120


class Magic(IntEnum):
    """`f_type` of the filesystems that matter here (include/uapi/linux/magic.h)."""

    PROC = 0x9FA0
    SYSFS = 0x62656572
    CGROUP = 0x27E0EB
    CGROUP2 = 0x63677270
    TMPFS = 0x01021994
    HUGETLBFS = 0x958458F6
    SECRETMEM = 0x5345434D
    NSFS = 0x6E736673
    ANON_INODE = 0x09041934
    DEBUGFS = 0x64626720
    TRACEFS = 0x74726163
    SECURITYFS = 0x73636673
    SELINUX = 0xF97CFF8C
    CONFIGFS = 0x62656570
    BPF = 0xCAFE4A11
    EFIVARFS = 0xDE5E81E4
    PSTOREFS = 0x6165676C
    BINFMTFS = 0x42494E4D
    RESCTRL = 0x07655821
    MQUEUE = 0x19800202
    FUSE = 0x65735546
    NFS = 0x6969
    EXT4 = 0xEF53
    XFS = 0x58465342
    BTRFS = 0x9123683E
    F2FS = 0xF2F52010
    OVERLAYFS = 0x794C7630
    RAMFS = 0x858458F6


def filesystem(fd: int) -> int:
    """The `f_type` of the filesystem that a local descriptor is on, see `Magic`."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    syscall(NR.fstatfs, fd, buffer)
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFF_FFFF
