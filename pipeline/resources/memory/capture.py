"""The address space of one process, looked at from outside.

Works on a frozen process and, for `check`, on one that runs: nothing in it is touched.
What /proc does not tell (the current program break, whether it may be dumped, whether
THP is off) was asked inside and is passed in.

Captured: every mapping with what `pipeline.resources.memory.classify` lists, guard
regions, the bounds of prctl_mm_map, the auxiliary vector, the core dump filter.
Not preserved: MCL_FUTURE of mlockall(2), which the kernel tells nobody.

Sources: proc_pid_smaps(5), proc_pid_stat(5), prctl(2) PR_SET_MM_MAP.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from pipeline.errors import Blocker
from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import AddressSpace, AioRing, Index, Vma
from pipeline.kernel import procfs, smaps
from pipeline.kernel.hugetlb import MAP_HUGETLB
from pipeline.kernel.pagemap import (
    Populated,
    Range,
    intersect,
    merged,
    open_pagemap,
    populated,
    subtract,
    union,
)
from pipeline.kernel.smaps import Mapping
from pipeline.resources.memory import aio
from pipeline.resources.memory.alike import KERNEL_KINDS, LATE_KINDS
from pipeline.resources.memory.answering import Answered, Watched
from pipeline.resources.memory.classify import WATCHED, Shape, classify
from pipeline.resources.memory.objects import MemoryObjects, Place, place_of
from pipeline.resources.memory.scope import CannotCarry

#: a mapping above all addresses of a process
_NOT_ITS_OWN = b"[vsyscall]"
_WITHOUT_PAGES = KERNEL_KINDS | LATE_KINDS
#: what smaps says of memory whose writes are tracked
_TRACKED = frozenset({"uw"})
#: of which kinds its page faults may be answered
_WATCHED_FOR = {"um": "missing pages", "uw": "write protection", "ui": "minor faults"}
#: the address behind all
_END = 1 << 64
_CHANGED = "changed while it was looked at"
_SECOND_NODE = "/sys/devices/system/node/node1"


class Captured(msgspec.Struct, frozen=True):
    """An address space: its record, and the page runs to save of it ([start, end), ascending).

    `untouched`: those of `runs` that were not written since the writes to them were tracked last. If there are
    `blockers`, record and runs are incomplete and not to be used.
    """

    space: AddressSpace
    runs: list[Range]
    untouched: list[Range]
    blockers: list[Blocker]


class Seen(NamedTuple):
    """What the kernel tells of an address space: what there is of pages (`scanned`), and its mappings, with flags."""

    pages: Populated
    mappings: Sequence[Mapping]


def scanned(pid: HostPid, mappings: Sequence[Mapping]) -> Populated:
    """What there is of pages in all mappings of a process, whatever these are.

    Raises as `capture_address_space` does.
    """
    own = [mapping for mapping in mappings if mapping.name != _NOT_ITS_OWN]
    fd = open_pagemap(pid)
    try:
        return populated(
            fd,
            [(mapping.start, mapping.end) for mapping in own],
            [(mapping.start, mapping.end) for mapping in own if mapping.anonymous],
        )
    finally:
        os.close(fd)


def capture_address_space(
    pid: HostPid,
    objects: MemoryObjects,
    *,
    brk: RemoteAddress,
    dumpable: int = 1,
    thp_disable: int = 0,
    contexts: Collection[int] | None = None,
    tracked: bool = False,
    answered: Sequence[Answered] = (),
    seen: Seen | None = None,
    stat: procfs.Stat | None = None,
) -> Captured:
    """Capture the memory of process `pid`.

    Args:
        pid: in the pipeline's pid namespace; frozen, or only for its blockers.
        objects: where files and shared memory are registered.
        brk: its program break.
        dumpable: PR_GET_DUMPABLE.
        thp_disable: PR_GET_THP_DISABLE.
        contexts: where contexts of asynchronous I/O have their rings; None: every ring that is mapped is taken for one.
        tracked: the writes to it are tracked by the pipeline itself (`pipeline.resources.memory.tracking`).
        answered: what userfaultfds of the tree answer for in it.
        seen, stat: what the kernel tells of it, where that was asked already; the stat may be a thread's.

    Raises:
        ProcessGone: there is no such process (any more).
        OSError: EACCES, EPERM: it may not be traced.
    """
    blockers: list[Blocker] = []
    found: list[tuple[Mapping, Shape, Index | None]] = []
    rings: list[AioRing] = []
    place = place_of(pid)
    seen = seen or Seen(scanned(pid, smaps.maps(pid)), smaps.smaps(pid))
    watched = _watched(answered)
    for mapping in seen.mappings:
        try:
            if mapping.flags & WATCHED and not (tracked and mapping.flags & WATCHED == _TRACKED):
                _refuse_watched(mapping, watched)
            shape = classify(mapping)
            if shape.kind == "aio":
                if contexts is None or mapping.start in contexts:
                    rings.append(aio.capture(pid, mapping))
                else:
                    shape = replace(shape, kind="shared", backing="anon_shared")
            found.append((mapping, shape, _backing(pid, mapping, shape, objects, place)))
        except CannotCarry as refusal:
            blockers.append(refusal.blocker(subject(pid, mapping)))
        except FileNotFoundError:
            blockers.append(Blocker(subject(pid, mapping), _CHANGED, transient=True))
    blockers.extend(_numa_blockers(pid))
    exe = 0
    try:
        exe = objects.executable(pid, place)
    except CannotCarry as refusal:
        blockers.append(refusal.blocker(f"pid {pid} executable"))
    runs, guards, untouched = _carried(seen.pages, found)
    for one in answered:
        runs = subtract(runs, union(one.missing, one.bare))
    # what others protect says nothing of when it was written
    untouched = subtract(untouched, watched)
    stat = stat or procfs.thread_stat(pid)
    space = AddressSpace(
        space=objects.scope.space_of(("memory", pid)),
        vmas=list(_records(found, guards)),
        exe=exe,
        layout=[
            stat.startcode,
            stat.endcode,
            stat.start_data,
            stat.end_data,
            stat.start_brk,
            brk,
            stat.startstack,
            stat.arg_start,
            stat.arg_end,
            stat.env_start,
            stat.env_end,
        ],
        auxv=procfs.auxv(pid),
        dumpable=dumpable,
        thp_disable=thp_disable,
        coredump_filter=procfs.coredump_filter(pid),
        answers=bool(answered),
        rings=rings,
    )
    return Captured(space, runs, untouched if tracked else [], blockers)


def check_address_space(pid: HostPid, objects: MemoryObjects, answered: bool) -> list[Blocker]:
    """Everything about the memory of `pid` that stops it from being carried; also while it runs.

    A mapping that is gone by then is in no way.

    Args:
        answered: there are userfaultfds in the tree: for what is asked when it stands still.

    Raises as `capture_address_space` does.
    """
    anything = [Answered(pid, 0, False, [Watched(0, _END, 0)], [], [], [])] if answered else ()
    found = capture_address_space(pid, objects, brk=RemoteAddress(0), answered=anything).blockers
    return [blocker for blocker in found if blocker.reason != _CHANGED]


def watched_by_others(
    pid: HostPid,
    unwatched: Sequence[Range],
    may_watch: Callable[[int, int], bool],
    answered: Sequence[Answered],
) -> list[Blocker]:
    """What of the memory of a stopped process could not be watched because somebody outside the tree does.

    Args:
        unwatched: where the pipeline could not watch when it looked last; the process has run since.
        may_watch: tries again, for a mapping.
        answered: what userfaultfds of the tree answer for in it.
    """
    blockers = []
    watched = _watched(answered)
    for mapping in smaps.smaps(pid) if unwatched else ():
        if intersect([(mapping.start, mapping.end)], unwatched) and not may_watch(mapping.start, mapping.end):
            try:
                _refuse_watched(mapping, watched)
            except CannotCarry as refusal:
                blockers.append(refusal.blocker(subject(pid, mapping)))
    return blockers


def _watched(answered: Sequence[Answered]) -> list[Range]:
    return merged(sorted((one.start, one.end) for each in answered for one in each.watched))


def _refuse_watched(mapping: Mapping, answered: Sequence[Range]) -> None:
    """CannotCarry: its page faults are answered by somebody outside the tree."""
    if mapping.flags & WATCHED and subtract([(mapping.start, mapping.end)], answered):
        what = ", ".join(name for flag, name in _WATCHED_FOR.items() if flag in mapping.flags)
        raise CannotCarry(
            f"is watched by a userfaultfd ({what}) that no process of the tree has",
            "wait for the dump or migration that is under way, or end who handles its page faults",
        )


def subject(pid: HostPid, mapping: Mapping) -> str:
    """How a message names a mapping."""
    name = f" ({os.fsdecode(mapping.name)})" if mapping.name else ""
    return f"pid {pid} mapping {mapping.range_name}{name}"


def _backing(
    pid: HostPid, mapping: Mapping, shape: Shape, objects: MemoryObjects, place: Place
) -> Index | None:
    match shape.backing:
        case "none":
            return None
        case "file":
            return objects.mapped_file(pid, mapping, not shape.private and shape.may_write, place)
        case "sysv":
            return objects.scope.segment(pid, mapping.inode)
        case _:
            return objects.shared_mapping(pid, mapping, shape.backing)


def _carried(pages: Populated, found: Sequence[tuple[Mapping, Shape, Index | None]]) -> Populated:
    """Page runs to save and guard pages; untouched are those in mappings that are watched."""
    carried = [(mapping, shape) for mapping, shape, _ in found if shape.kind not in _WITHOUT_PAGES]
    private = [(mapping.start, mapping.end) for mapping, shape in carried if shape.private]
    watched = [
        (mapping.start, mapping.end)
        for mapping, shape in carried
        if shape.private and mapping.flags & _TRACKED
    ]
    return Populated(
        intersect(pages.pages, private),
        intersect(pages.guards, [(mapping.start, mapping.end) for mapping, _ in carried]),
        intersect(pages.untouched, watched),
    )


def _records(found: Sequence[tuple[Mapping, Shape, Index | None]], guards: Sequence[Range]) -> Iterator[Vma]:
    starts = [mapping.start for mapping, _, _ in found]
    inside: dict[int, list[Range]] = {}
    for start, end in guards:
        at = bisect_right(starts, start) - 1
        while at < len(found) and found[at][0].start < end:
            mapping = found[at][0]
            inside.setdefault(at, []).append((max(start, mapping.start), min(end, mapping.end)))
            at += 1
    for at, (mapping, shape, backing) in enumerate(found):
        yield Vma(
            start=mapping.start,
            end=mapping.end,
            kind=shape.kind,
            prot=mapping.prot,
            flags=shape.flags,
            # huge pages without a path lie in a file of their own, which maps shows
            offset=mapping.offset if backing is not None or shape.flags & MAP_HUGETLB else 0,
            backing=backing,
            name=shape.name,
            advice=shape.advice,
            locked=shape.locked,
            sealed=shape.sealed,
            guards=inside.get(at, []),
            readonly_file=not shape.private and not shape.may_write,
        )


def _numa_blockers(pid: HostPid) -> Iterator[Blocker]:
    """Memory policies (mbind(2)) mean something only where there are several nodes."""
    if not os.path.exists(_SECOND_NODE):
        return
    for line in procfs.read_file(pid, "numa_maps").splitlines():
        start, policy = line.split(None, 2)[:2]
        if policy != b"default":
            name = f"pid {pid} mapping {start.decode()}-"
            yield Blocker(name, f"has NUMA policy {os.fsdecode(policy)}", "start the program without numactl")
