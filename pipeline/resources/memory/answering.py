"""What the userfaultfds of a program answer for: asked of a tree that stands still.

The kernel tells the features of a userfaultfd, and of a mapping that one watches it; neither whose memory it is, nor
which of several. So it is tried out:

* A page is mapped in one process after the other, where none has anything. In whose memory the descriptor was made, it
  can be registered.
* There the page is read from outside, as the kernel reads for a system call. Who answers only what user space does
  (UFFD_USER_MODE_ONLY) is not told of it, and the read fails; else it waits, until nobody answers any more.
* A mapping is registered once more, as it is: for whoever watches it that changes nothing, and all others are refused.

The pages of such memory are more than their content: whether one is missing, or write-protected, is what the program
is told, or not. A page of zeros is there.

Not seen are faults that were read already, and not answered yet: who waits runs into them again, and they are told
twice, as after any signal. Nothing is left of the page but if we are killed while it is there.

Sources: userfaultfd(2), ioctl_userfaultfd(2); userfaultfd_register() and handle_userfault() in fs/userfaultfd.c;
Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from typing import NamedTuple

from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.kernel import procfs, smaps, uffdio
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import PAGE_BYTES, Range, entries_of, merged, open_pagemap, subtract
from pipeline.kernel.smaps import Mapping
from pipeline.kernel.syscalls import process_vm_readv
from pipeline.kernel.uffdio import MODE
from pipeline.remote.live import LiveTask
from pipeline.resources.memory.classify import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE
from pipeline.resources.memory.rebuild import find_hole
from pipeline.resources.memory.scope import CannotCarry

#: by the VmFlags of `WATCHED`
_MODES = {"um": MODE.MISSING, "uw": MODE.WP, "ui": MODE.MINOR}
#: in the features, since they were chosen (UFFD_FEATURE_INITIALIZED)
_BEGUN = 1 << 31
_PROT_NONE, _PROT_READ = 0, 1
#: reads that wait for a page: how often it is looked whether they do
_LOOK_S = 0.0002


def _where(matches: Callable[[int], object]) -> re.Pattern[bytes]:
    """Runs of entries of pagemap, by the most significant byte of each.

    Present 0x80, swapped 0x40, guard 0x04, write-protected by a userfaultfd 0x02.
    """
    return re.compile(b"[" + re.escape(bytes(top for top in range(256) if matches(top))) + b"]+")


_THERE = _where(lambda top: top & 0x80 or top & 0x46 == 0x40)
_GUARD = _where(lambda top: top & 0x84 == 0x04)
_PROTECTED = _where(lambda top: top & 0x02)
#: swapped, if anything is; else the protection of a page that is missing, and a page that was poisoned
_MARKED = _where(lambda top: top & 0xC6 == 0x42)
_POISONED = _where(lambda top: top & 0xC6 == 0x40)


class Watched(NamedTuple):
    """A mapping, and what of it is answered for, as `MODE`."""

    start: int
    end: int
    modes: int


class Answered(NamedTuple):
    """What one userfaultfd answers for.

    `features`: UFFD_FEATURE_*. `missing`: of its mappings that are watched for missing pages, the pages that are;
    `protected`: the pages that are write-protected; `bare`: those of them where no page is. All ascending.
    """

    owner: HostPid
    features: int
    user_mode_only: bool
    watched: list[Watched]
    missing: list[Range]
    protected: list[Range]
    bare: list[Range]


class Answerer(NamedTuple):
    """A userfaultfd: our duplicate, and a process that has it."""

    fd: LocalFd
    holder: HostPid


def features_of(info: dict[str, list[str]]) -> int | None:
    """The features that fdinfo tells of a userfaultfd; None: they are not chosen yet."""
    features = int(info["API"][0].split(":")[1], 16)
    return features & ~_BEGUN if features & _BEGUN else None


def look(
    answerers: Sequence[Answerer],
    memories: Sequence[HostPid],
    inside: Callable[[HostPid], AbstractContextManager[LiveTask]],
    mappings_of: Callable[[HostPid], Sequence[Mapping]],
) -> list[Answered | CannotCarry]:
    """What each of `answerers` answers for, in their order; or why that cannot be carried.

    Args:
        answerers: of a tree that stands still.
        memories: its processes, one for each memory.
        inside: a thread of one of them, to run system calls in.
        mappings_of: its mappings, with flags.

    Raises:
        OSError: a process has no room for a page.
    """
    by_holders = sorted(memories, key=lambda pid: all(pid != one.holder for one in answerers))
    # waited for: who reads them meanwhile would see the page
    mappings = {pid: mappings_of(pid) for pid in memories}
    page = find_hole(mappings.values(), PAGE_BYTES)
    found: dict[LocalFd, tuple[HostPid, bool]] = {}
    for pid in by_holders:
        unknown = [one for one in answerers if one.fd not in found]
        if unknown:
            with inside(pid) as task:
                found |= _made_in(pid, task, page, unknown)
    return [_one(one, found.get(one.fd), mappings) for one in answerers]


def _one(
    answerer: Answerer,
    made: tuple[HostPid, bool] | None,
    mappings: dict[HostPid, Sequence[Mapping]],
) -> Answered | CannotCarry:
    features = features_of(procfs.fdinfo(HostPid(os.getpid()), answerer.fd))
    if features is None:
        return CannotCarry("it is being set up", "try again")
    if made is None:
        return CannotCarry("it answers for memory that no process of the tree has (any more)", "close it")
    try:
        return _answered(answerer.fd, *made, features, mappings[made[0]])
    except CannotCarry as refusal:
        return refusal


def _made_in(
    pid: HostPid, task: LiveTask, page: RemoteAddress, answerers: Sequence[Answerer]
) -> dict[LocalFd, tuple[HostPid, bool]]:
    """Those that were made in the memory of `pid`, and whether they answer for user space only."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    found: dict[LocalFd, tuple[HostPid, bool]] = {}
    for one in answerers:
        # without permissions, so that nothing is there either where all memory is locked
        task.syscall(NR.mmap, page, PAGE_BYTES, _PROT_NONE, flags, -1, 0)
        try:
            if _is_watched_by(one.fd, page, page + PAGE_BYTES, MODE.MISSING):
                try:
                    task.syscall(NR.mprotect, page, PAGE_BYTES, _PROT_READ)
                    found[one.fd] = (pid, not _is_told_of_the_kernel(one.fd, pid, page))
                finally:
                    uffdio.unregister(one.fd, page, page + PAGE_BYTES)
        finally:
            task.syscall(NR.munmap, page, PAGE_BYTES)
    return found


def _is_told_of_the_kernel(fd: LocalFd, pid: HostPid, page: int) -> bool:
    """Whether it is told of a page that the kernel touches, for which it does not answer any longer then."""

    def pending() -> int:
        return int(procfs.fdinfo(HostPid(os.getpid()), fd)["pending"][0])

    def read() -> bool:
        try:
            return process_vm_readv(pid, [(page, 1)], bytearray(1)) == 1
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return False

    before = pending()
    with ThreadPoolExecutor(1, "touch") as thread:
        reading = thread.submit(read)
        try:
            while not reading.done() and pending() <= before:
                time.sleep(_LOOK_S)
        finally:
            uffdio.unregister(fd, page, page + PAGE_BYTES)  # who waits finds zeros
        return reading.result()


def _answered(
    fd: LocalFd, owner: HostPid, user_mode_only: bool, features: int, mappings: Sequence[Mapping]
) -> Answered:
    watched: list[Watched] = []
    missing: list[Range] = []
    protected: list[Range] = []
    bare: list[Range] = []
    pagemap = open_pagemap(owner)
    try:
        for mapping in mappings:
            modes = sum(mode for flag, mode in _MODES.items() if flag in mapping.flags)
            if not modes or not _is_watched_by(fd, mapping.start, mapping.end, modes):
                continue
            _check(mapping, modes)
            watched.append(Watched(mapping.start, mapping.end, modes))
            runs = _Runs(owner, pagemap, mapping)
            if modes & MODE.MISSING:
                missing += runs.missing()
            if modes & MODE.WP:
                protected += runs.of(_PROTECTED)
                bare += runs.bare()
    finally:
        os.close(pagemap)
    return Answered(owner, features, user_mode_only, watched, merged(missing), merged(protected), bare)


def _is_watched_by(fd: LocalFd, start: int, end: int, modes: int) -> bool:
    """Whether it can watch the mapping at [start, end), which it does then."""
    try:
        uffdio.register(fd, start, end, modes)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOMEM):
            raise
        return False
    return True


def _check(mapping: Mapping, modes: int) -> None:
    if mapping.page_bytes != PAGE_BYTES:
        what = "huge pages of hugetlbfs"
    elif modes & MODE.MISSING and not (mapping.anonymous and not mapping.shared):
        what = "missing pages of shared memory"
    else:
        return
    where = f"{mapping.range_name}: {what}"
    raise CannotCarry(
        f"it answers for {where}, which cannot be made again", "use private memory of small pages"
    )


class _Runs:
    """Runs of pages of a mapping, by what pagemap says of them."""

    def __init__(self, pid: HostPid, pagemap: LocalFd, mapping: Mapping) -> None:
        self._pid = pid
        self._mapping = mapping
        self._parts = [
            (address, entries[7::8]) for address, entries in entries_of(pagemap, mapping.start, mapping.end)
        ]

    def of(self, pattern: re.Pattern[bytes]) -> list[Range]:
        """The pages whose entries it matches."""
        return merged(
            (address + match.start() * PAGE_BYTES, address + match.end() * PAGE_BYTES)
            for address, tops in self._parts
            for match in pattern.finditer(tops)
        )

    @cached_property
    def _is_swapped(self) -> bool:
        """Whether what looks so may be a page that is swapped out."""
        return smaps.swapped_bytes(self._pid) > 0

    def bare(self) -> list[Range]:
        """Protection where no page is; nothing where that cannot be told from pages."""
        marked = self.of(_MARKED)
        return [] if marked and self._is_swapped else marked

    def missing(self) -> list[Range]:
        """CannotCarry: that is not to be told."""
        where = f"it answers for {self._mapping.range_name}, of which pages"
        if self.of(_MARKED) and self._is_swapped:
            raise CannotCarry(
                f"{where} may be missing or swapped out", "let it lock its memory, or turn swap off"
            )
        if self.of(_POISONED) and not self._is_swapped:
            raise CannotCarry(f"{where} are poisoned", "end it")
        there = sorted([*self.of(_THERE), *self.of(_GUARD)])
        return subtract([(self._mapping.start, self._mapping.end)], merged(there))
