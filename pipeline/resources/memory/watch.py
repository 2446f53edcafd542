"""Watching the memory of a puppet for missing pages, just before its program is let run.

A puppet lends its system calls: it gets /dev/userfaultfd, makes a descriptor of its own memory from it, and both are
closed in it again; a duplicate stays with us. What is watched must not be there. But a page that was written may have
brought its neighbours along, as zeros, by a huge page: they are dropped, and whether that was the end of it is looked
at once more when khugepaged keeps off, as it does where somebody watches.

Source: ioctl_userfaultfd(2); hugepage_vma_revalidate() and collapse_scan_pmd() in mm/khugepaged.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from pipeline.errors import ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import AddressSpace
from pipeline.kernel import paging, uffdio
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import Range, intersect, merged, open_pagemap, present, subtract
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.memory import later

_MADV_DONTNEED = 4
#: the same, also of locked memory
MADV_DONTNEED_LOCKED = 24
_TRIES = 5
ENTRY = "watch of missing pages"


def watch(puppet: Puppet, space: AddressSpace) -> LocalFd:
    """Watch what of `space` comes later, which nobody may touch from here on without an answer; the caller owns it.

    Raises:
        ImageError: it names pages that nobody can answer for.
        RebuildError: the kernel refuses.
    """
    if subtract(space.later, merged(later.mappings(space))):
        raise ImageError(
            f"space {space.space}: pages are to come later where the kernel lets nobody wait for them"
        )
    # whole mappings: one that is watched in part is two, and mremap(2) moves no more than one
    ranges = [one for one in later.mappings(space) if intersect([one], space.later)]
    try:
        fd = _descriptor(puppet)
        LEDGER.take(ENTRY, fd)
        try:
            _watch(puppet, fd, space.later, ranges)
        except BaseException:
            os.close(fd)
            LEDGER.give_back(ENTRY, fd)
            raise
    except OSError as error:
        raise RebuildError(f"the missing pages of pid {puppet.pid} cannot be watched: {error}") from error
    return fd


def _watch(puppet: Puppet, fd: LocalFd, missing: Sequence[Range], ranges: Sequence[Range]) -> None:
    def drop(stale: Sequence[Range]) -> None:
        puppet.run_checked(
            [Call(NR.madvise, (a, b - a, _MADV_DONTNEED), name=f"drop {a:x}-{b:x}") for a, b in stale]
        )

    def register() -> None:
        for start, end in ranges:
            paging.register(fd, start, end)

    def unregister() -> None:
        for start, end in ranges:
            uffdio.unregister(fd, start, end)

    pagemap = open_pagemap(puppet.pid)
    try:
        begin(pagemap, missing, drop, register, unregister)
    finally:
        os.close(pagemap)


def begin(
    pagemap: LocalFd,
    missing: Sequence[Range],
    drop: Callable[[Sequence[Range]], None],
    register: Callable[[], None],
    unregister: Callable[[], None],
) -> None:
    """Begin to watch memory of which exactly `missing` is to be missing, as far as it is watched for that.

    Args:
        pagemap: of the process, whose program does not run.
        drop: pages that it has, and is not to have.
        register, unregister: watch, and watch no longer.

    Raises:
        OSError: EBUSY: pages come back that were dropped; what the functions raise.
    """
    for _ in range(_TRIES):
        drop(present(pagemap, missing))
        register()
        if not present(pagemap, missing):
            return
        # what is watched is not dropped before somebody has read of it
        unregister()
    raise OSError(errno.EBUSY, "pages come back that were dropped")


def check_here() -> None:
    """Whether this host answers page faults of any program.

    Raises:
        OSError: EACCES, ENOENT: see `pipeline.kernel.paging.open_device`; EPERM: see `begin` there.
    """
    device = paging.open_device()
    try:
        fd = paging.make(device)
        try:
            paging.begin(fd)
        finally:
            os.close(fd)
    finally:
        os.close(device)


def _descriptor(puppet: Puppet) -> LocalFd:
    fd = paging.make_in(puppet.pid, lambda device: puppet.send_fds([device])[0], puppet.syscall)
    try:
        paging.begin(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
