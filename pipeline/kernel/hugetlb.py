"""Huge pages of hugetlbfs: the pools of the kernel, and its own file systems on which memory of them lies.

There is a pool for each size, which an administrator fills. mmap(2) reserves as many pages of it as the mapping may
come to need; MAP_NORESERVE leaves it to luck, and who finds the pool empty is sent SIGBUS. Memory that has no path
(MAP_HUGETLB, MFD_HUGETLB) is a file on a file system of the kernel's own, one a size, so the device of a mapping tells
the size of its pages. Such a file can be read and mapped, and not be written to.

Sources: Documentation/admin-guide/mm/hugetlbpage.rst; hugetlb_file_setup() in fs/hugetlbfs/inode.c;
include/uapi/asm-generic/hugetlb_encode.h.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

MAP_HUGETLB = 0x40000
_MFD_HUGETLB = 0x4
#: of both: above it is the logarithm of the size
_SHIFT, _LOGARITHM = 26, 0x3F
_POOLS = Path("/sys/kernel/mm/hugepages")
_KIB = 1024


def mapping_flags(page_bytes: int) -> int:
    """What mmap(2) takes for pages of that size."""
    return MAP_HUGETLB | _size_flag(page_bytes)


def memfd_flags(page_bytes: int) -> int:
    """What memfd_create(2) takes for pages of that size."""
    return _MFD_HUGETLB | _size_flag(page_bytes)


def _size_flag(page_bytes: int) -> int:
    return (page_bytes.bit_length() - 1) << _SHIFT


def page_bytes(flags: int) -> int:
    """The size of page that flags of `mapping_flags` ask for; 0: they ask for no huge pages."""
    return 1 << (flags >> _SHIFT & _LOGARITHM) if flags & MAP_HUGETLB else 0


@functools.cache
def devices() -> Mapping[int, int]:
    """The kernel's own file systems of huge pages: st_dev, and bytes of a page; the same in every namespace."""
    found = {}
    for size in _sizes():
        fd = os.memfd_create("probe", os.MFD_CLOEXEC | memfd_flags(size))
        try:
            found[os.fstat(fd).st_dev] = size
        finally:
            os.close(fd)
    return found


def _sizes() -> list[int]:
    try:
        names = os.listdir(_POOLS)
    except OSError:  # no such kernel, or no sysfs
        return []
    return [int(name.removeprefix("hugepages-").removesuffix("kB")) * _KIB for name in names]


def free_pages(page_bytes: int) -> int:
    """How many pages of that size may be reserved here now; 0 where the kernel has no such size."""
    pool = _POOLS / f"hugepages-{page_bytes // _KIB}kB"

    def count(name: str) -> int:
        return int((pool / name).read_text())

    try:
        more = max(0, count("nr_overcommit_hugepages") - count("surplus_hugepages"))
        return count("free_hugepages") - count("resv_hugepages") + more
    except OSError:
        return 0
