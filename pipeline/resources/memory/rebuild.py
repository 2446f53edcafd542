"""The system calls that make an address space again, in a puppet. Pure: records in, calls out.

Three steps, because the kernel wants them apart:

1. `create` (in an empty address space) or `inherit` (in one forked from the parent's):
   mappings with their final permissions. Pages are then written by the caller through
   /proc/PID/mem, which ignores permissions of private mappings.
2. the fill, and the birth of all children that are forked from this process.
3. `complete`: what would hinder the fill or the fork: advice (a DONTFORK mapping would
   be missing in a child), guards, locks, names, and seals as the very last.

Only MADV_HUGEPAGE and MADV_NOHUGEPAGE belong to step 1: they decide how pages are made.

Huge pages of hugetlbfs are the exception: in some kernels (6.2 to 6.13) nobody may write to them against the
permissions of their mapping, so what takes writing away is given in step 3; and they can only be dropped whole.

Not preserved: copy-on-write sharing of locked pages (mlock gives each process its own),
names of anonymous memory on a kernel without CONFIG_ANON_VMA_NAME.

Sources: mmap(2), madvise(2), mlock2(2), prctl(2) PR_SET_VMA, mseal(2), shmat(2).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from pipeline.errors import RebuildError
from pipeline.ids import RemoteAddress, RemoteFd
from pipeline.image.schema import AddressSpace, Index, Vma
from pipeline.kernel import hugetlb
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import PAGE_BYTES, Range, intersect, merged, subtract
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call
from pipeline.resources.memory.alike import HUGE_ADVICE, KERNEL_KINDS, huge_advice, ordinary, overlaps
from pipeline.resources.memory.classify import MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_SHARED
from pipeline.resources.memory.missing import RangeSet
from pipeline.resources.namespaces.ipc import Segment

_MADV_DONTNEED = 4
_MADV_GUARD_INSTALL = 102
_MLOCK_ONFAULT = 1
_PR_SET_VMA_ANON_NAME = 0
_SHM_RDONLY = 0o10000
_PROT_WRITE = 2
#: above the page of the puppet program
_LOWEST = 0x100_0000
#: a growing stack above a hole needs room (stack_guard_gap is 256 pages)
_GAP_BYTES = 256 * PAGE_BYTES


class Source(NamedTuple):
    """What a mapping needs a descriptor of in the puppet.

    Args:
        kind: ``file`` or ``shared``.
        number: index of a `MappedFile`, or space of a `SharedMemory`.
        read_only: opened read-only, so that a shared mapping can never become writable.
    """

    kind: str
    number: Index
    read_only: bool


#: System V segments of the process's ipc namespace, by space
Segments = Mapping[Index, Segment]
#: descriptors in the puppet
Sources = Mapping[Source, RemoteFd]


def source_of(vma: Vma) -> Source | None:
    """What `vma` needs a descriptor of; None for private anonymous memory and System V segments."""
    if vma.backing is None or vma.kind == "sysv":
        return None
    return Source(vma.kind, vma.backing, vma.readonly_file)


def sources(vmas: Iterable[Vma]) -> list[Source]:
    """All descriptors that `create` or `inherit` will ask for, each once, in order of address."""
    return list(dict.fromkeys(source for vma in vmas if (source := source_of(vma)) is not None))


# -- step 1 ------------------------------------------------------------------------------


def create(space: AddressSpace, fds: Sources, segments: Segments) -> list[Call]:
    """Make every mapping of `space` in an address space where their ranges are free."""
    vmas = ordinary(space.vmas)
    calls = [call for pieces in _attachments(vmas) for call in _attach(pieces, segments)]
    return calls + [call for vma in vmas for call in _map(vma, vma.start, vma.end, fds)]


def inherit(parent: AddressSpace, child: AddressSpace, fds: Sources, segments: Segments) -> list[Call]:
    """Turn the mappings of `parent`, before its step 3, into those of `child`, where they differ.

    `fds` needs only what `missing` names. Ranges of `child.dropped` are emptied.
    """
    calls: list[Call] = []
    if parent.vmas != child.vmas:
        alike = list(overlaps(parent.vmas, child.vmas))
        kept: list[Range] = [(o.start, o.end) for o in alike]
        had = [(vma.start, vma.end) for vma in ordinary(parent.vmas)]
        calls += [
            Call(NR.munmap, (a, b - a), name=f"munmap {a:x}-{b:x}")
            for a, b in subtract(merged(had), merged(kept))
        ]
        for pieces in _attachments(ordinary(child.vmas)):
            new = [vma for vma in pieces if subtract([(vma.start, vma.end)], kept)]
            if new and new != pieces:
                raise RebuildError(f"segment at {new[0].start:x}: the child has more of it than its parent")
            calls += _attach(new, segments)
        for vma, start, end in _outside(ordinary(child.vmas), kept):
            calls += _map(vma, start, end, fds)
        calls += [
            Call(
                NR.mprotect,
                (o.start, o.end - o.start, _prot_while_filled(o.child)),
                name=f"mprotect {o.start:x}-{o.end:x}",
            )
            for o in alike
            if _prot_while_filled(o.parent) != _prot_while_filled(o.child)
        ]
    calls += [
        Call(NR.madvise, (start, end - start, _MADV_DONTNEED), name=f"drop {start:x}-{end:x}")
        for start, end in _whole_pages(child.vmas, child.dropped)
    ]
    return calls


def _prot_while_filled(vma: Vma) -> int:
    """The permissions of a mapping between steps 1 and 3."""
    return vma.prot | _PROT_WRITE if _is_private_huge(vma) else vma.prot


def _is_private_huge(vma: Vma) -> bool:
    return bool(hugetlb.page_bytes(vma.flags)) and not vma.flags & MAP_SHARED


def _whole_pages(vmas: Sequence[Vma], ranges: Sequence[Range]) -> list[Range]:
    """Ranges in which nothing is any more, with all of the huge pages of which they are a part."""
    huge = [vma for vma in vmas if _is_private_huge(vma)]
    if not huge:
        return list(ranges)
    whole = RangeSet(ranges)
    for vma in huge:
        size = hugetlb.page_bytes(vma.flags)
        for start, end in intersect(ranges, [(vma.start, vma.end)]):
            whole.add(start - start % size, end + -end % size)
    return list(whole)


def missing(parent: AddressSpace, child: AddressSpace) -> list[Source]:
    """The descriptors that `inherit` will ask for."""
    if parent.vmas == child.vmas:
        return []
    kept: list[Range] = [(o.start, o.end) for o in overlaps(parent.vmas, child.vmas)]
    return sources(vma for vma, _, _ in _outside(ordinary(child.vmas), kept))


def _outside(vmas: Sequence[Vma], kept: Sequence[Range]) -> Iterator[tuple[Vma, int, int]]:
    """The pieces of mappings that are not in `kept`: of which one, start, end; all of them ascending."""
    starts = [vma.start for vma in vmas]
    for start, end in subtract([(vma.start, vma.end) for vma in vmas], kept):
        yield vmas[bisect_right(starts, start) - 1], start, end


def _attachments(vmas: Iterable[Vma]) -> list[list[Vma]]:
    """The mappings of System V segments, those together that one shmat(2) has made."""
    found: dict[tuple[Index | None, int], list[Vma]] = {}
    for vma in vmas:
        if vma.kind == "sysv":
            found.setdefault((vma.backing, vma.start - vma.offset), []).append(vma)
    return list(found.values())


def _attach(pieces: Sequence[Vma], segments: Segments) -> Iterator[Call]:
    """Attach a segment where its pieces are; what is not there any more is unmapped."""
    if not pieces:
        return
    first = pieces[0]
    start = first.start - first.offset
    if first.backing is None or first.backing not in segments:
        raise RebuildError(f"mapping {first.start:x}: its segment is not in the image")
    segment = segments[first.backing]
    end = start + segment.size_bytes + -segment.size_bytes % PAGE_BYTES
    flags, prot = (_SHM_RDONLY, 1) if first.readonly_file else (0, 3)
    yield Call(NR.shmat, (segment.id, start, flags), name=f"shmat {segment.id} at {start:x}")
    for a, b in subtract([(start, end)], [(vma.start, vma.end) for vma in pieces]):
        yield Call(NR.munmap, (a, b - a), name=f"munmap {a:x}-{b:x}")
    for vma in pieces:
        if vma.prot != prot:
            yield Call(
                NR.mprotect, (vma.start, vma.end - vma.start, vma.prot), name=f"mprotect {vma.start:x}"
            )


def _map(vma: Vma, start: int, end: int, fds: Sources) -> Iterator[Call]:
    if vma.kind == "sysv":
        return
    name = f"mmap {start:x}-{end:x}" + (" of huge pages" if hugetlb.page_bytes(vma.flags) else "")
    source = source_of(vma)
    prot = _prot_while_filled(vma)
    flags = vma.flags | MAP_FIXED_NOREPLACE
    # of small anonymous pages it means nothing
    offset = vma.offset + start - vma.start
    if source is None:
        yield Call(NR.mmap, (start, end - start, prot, flags | MAP_ANONYMOUS, -1, offset), name=name)
    else:
        if source not in fds:
            raise RebuildError(f"{name}: there is no descriptor of {source.kind} {source.number}")
        yield Call(NR.mmap, (start, end - start, prot, flags, fds[source], offset), name=name)
    for advice in huge_advice(vma):
        yield Call(NR.madvise, (start, end - start, advice), name=f"madvise {advice} {start:x}-{end:x}")


# -- step 3 ------------------------------------------------------------------------------


def complete(space: AddressSpace) -> list[Call]:
    """What is done when all pages are in, all children are born and all is mapped. Seals come last."""
    vmas = [vma for vma in space.vmas if vma.kind not in KERNEL_KINDS]
    calls = [call for vma in vmas for call in _finish(vma)]
    calls.extend(
        Call(NR.mseal, (vma.start, vma.end - vma.start, 0), name=f"mseal {vma.start:x}-{vma.end:x}")
        for vma in vmas
        if vma.sealed
    )
    return calls


def _finish(vma: Vma) -> Iterator[Call]:
    start, size = vma.start, vma.end - vma.start
    where = f"{start:x}-{vma.end:x}"
    if _prot_while_filled(vma) != vma.prot:
        yield Call(NR.mprotect, (start, size, vma.prot), name=f"mprotect {where}")
    for advice in vma.advice:
        if advice not in HUGE_ADVICE:
            yield Call(NR.madvise, (start, size, advice), name=f"madvise {advice} {where}")
    for guard, end in vma.guards:
        yield Call(NR.madvise, (guard, end - guard, _MADV_GUARD_INSTALL), name=f"guard {guard:x}-{end:x}")
    if vma.name:
        args = (PRCTL.SET_VMA, _PR_SET_VMA_ANON_NAME, start, size, vma.name + b"\0")
        yield Call(NR.prctl, args, may_fail=True, name=f"name {where}")
    if vma.locked:
        yield Call(NR.mlock2, (start, size, _MLOCK_ONFAULT), name=f"mlock {where}")
    if vma.locked == "now":
        # The lock itself was put on by the call above. This one also brings in the pages, and says
        # ENOMEM where there are none to bring (guards, PROT_NONE, behind the end of a file).
        yield Call(NR.mlock2, (start, size, 0), may_fail=True, name=f"mlock {where}")


# -- room --------------------------------------------------------------------------------


class Placed(Protocol):
    """A mapping, wherever it is told of."""

    @property
    def start(self) -> int:
        """Its first address."""

    @property
    def end(self) -> int:
        """The address behind it."""


def find_hole(layouts: Iterable[Iterable[Placed]], size_bytes: int) -> RemoteAddress:
    """An address where `size_bytes` are free in all layouts, with a gap around it.

    Raises:
        RebuildError: there is none.
    """
    used = sorted(
        (vma.start - _GAP_BYTES, vma.end + _GAP_BYTES)
        for vmas in layouts
        for vma in vmas
        if vma.start < arch.ADDRESS_END
    )
    at = _LOWEST
    for start, end in used:
        if start - at >= size_bytes:
            return RemoteAddress(at)
        at = max(at, end)
    if arch.ADDRESS_END - at >= size_bytes:
        return RemoteAddress(at)
    raise RebuildError(f"no {size_bytes} bytes of address space are free in all processes of the tree")


def leaves_free(hole: RemoteAddress, size_bytes: int, vmas: Iterable[Vma]) -> bool:
    """Whether a layout leaves a hole of `find_hole` free, with the gap around it."""
    return all(vma.end + _GAP_BYTES <= hole or hole + size_bytes <= vma.start - _GAP_BYTES for vma in vmas)
