"""What one mapping is: the line of smaps, its flags and its name, turned into the fields of a `Vma`.

Pure: nothing is read here. Whatever is not known to be carried is refused by name,
an unknown flag too. Not preserved: NUMA policy (refused elsewhere on machines with
several nodes), accounting (`ac`), soft-dirty state, the name of a heap or stack.

Sources: proc_pid_smaps(5) VmFlags; show_smap_vma_flags in fs/proc/task_mmu.c;
get_vma_name there; mmap(2), madvise(2).
"""

from __future__ import annotations

import functools
import os
from typing import Literal

import msgspec

from pipeline.image.schema import VmaKind
from pipeline.kernel import hugetlb
from pipeline.kernel.smaps import Mapping
from pipeline.resources.memory.scope import CannotCarry
from pipeline.resources.support import Support

MAP_SHARED = 0x1
MAP_PRIVATE = 0x2
MAP_DROPPABLE = 0x8
MAP_ANONYMOUS = 0x20
MAP_GROWSDOWN = 0x100
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000

MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15

#: VmFlags that madvise(2) gives back: flag -> advice
ADVICE = {
    "rr": 1,  # MADV_RANDOM
    "sr": 2,  # MADV_SEQUENTIAL
    "dc": 10,  # MADV_DONTFORK
    "mg": 12,  # MADV_MERGEABLE
    "hg": MADV_HUGEPAGE,
    "nh": MADV_NOHUGEPAGE,
    "dd": 16,  # MADV_DONTDUMP
    "wf": 18,  # MADV_WIPEONFORK
}
#: VmFlags of memory that a userfaultfd watches: for missing pages, writes, minor faults; by whom is asked elsewhere
WATCHED = frozenset({"um", "uw", "ui"})
#: what huge pages of the kernel's own file systems set by themselves
_HUGE_BRINGS = frozenset({"ht", "de"})
#: what MAP_DROPPABLE sets by itself
_DROPPABLE_BRINGS = {"wf", "dd", "nr"}
#: flags that are carried, or that follow from what is carried
_CARRIED = frozenset(
    {
        "rd",
        "wr",
        "ex",
        "sh",
        "mr",
        "mw",
        "me",
        "ms",
        "gd",
        "lo",
        "lf",
        "ac",
        "nr",
        "sd",
        "sl",
        "dp",
        "gu",
        *WATCHED,
    }
) | set(ADVICE)
_REFUSED = {
    "ht": ("maps a file of hugetlbfs", "use huge pages without a file (MAP_ANONYMOUS, or a memfd)"),
    "pf": ("maps device memory or the kernel's own (VM_PFNMAP)", "close the device"),
    "io": ("maps device memory (VM_IO)", "close the device"),
    "mm": ("maps pages of a driver (VM_MIXEDMAP)", "close the device"),
    "ar": ("has a caching attribute of a device driver (VM_PAT)", "close the device"),
    "de": ("was made by a driver (VM_DONTEXPAND)", "close the device"),
    "ss": ("is a shadow stack", "start the program without it (GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK)"),
    "sf": ("maps persistent memory with MAP_SYNC", "map the file without MAP_SYNC"),
}
_SPECIAL: dict[bytes, VmaKind] = {
    b"[vdso]": "vdso",
    b"[vvar]": "vvar",
    b"[vvar_vclock]": "vvar_vclock",
    b"[vsyscall]": "vsyscall",
}
_DELETED = b" (deleted)"
_NOTHING: frozenset[str] = frozenset()
#: forks have the same mappings, and a second look at a process finds most of them as they were
_KEPT_SHAPES = 1 << 14
_RING = b"/[aio] (deleted)"

SUPPORT = (
    Support(
        kind="anonymous memory",
        carried=(
            "private pages, shared copy-on-write with the parent where they were; heap, growing stacks, names",
            "shared memory (MAP_SHARED, memfd, System V) with holes; guard regions, droppable memory",
            "huge pages of hugetlbfs without a file: private, shared, memfd",
        ),
        refused=(
            "files of hugetlbfs, System V segments of huge pages; secret memory; memory of drivers",
            "a policy for NUMA nodes, of several",
        ),
        shown_by=(
            "programs/mappings.py",
            "programs/sharing.py",
            "programs/sysv.py",
            "programs/huge_pages.py",
        ),
    ),
    Support(
        kind="mapped files",
        carried=("private and shared mappings, changed pages; files without a name, with their bytes",),
        refused=("a file that has another name only; devices; rings of io_uring, perf, packet sockets",),
        shown_by=("programs/mappings.py", "programs/sharing.py", "resources/test_memory_capture.py"),
    ),
    Support(
        kind="properties of mappings",
        carried=(
            "protection, madvise, locks (mlock, on fault), seals (mseal), bounds of the program, vdso, auxv",
        ),
        refused=("protection keys; shadow stacks; MAP_SYNC; whatever is not known here",),
        shown_by=("programs/mappings.py", "programs/stack.c", "resources/test_memory_rebuild.py"),
    ),
)


#: What is behind a mapping. ``device``: /dev/zero mapped privately.
Backing = Literal["none", "file", "anon_shared", "memfd", "sysv"]


class Shape(msgspec.Struct, frozen=True):
    """What a mapping is, as far as its line in smaps tells.

    `name` is the name that PR_SET_VMA gave it; `backing` says where to look next.
    """

    kind: VmaKind
    backing: Backing
    flags: int
    advice: list[int]
    locked: Literal["", "now", "onfault"]
    sealed: bool
    name: bytes = b""
    #: opened read-write (a shared mapping that may become writable)
    may_write: bool = True

    @property
    def private(self) -> bool:
        """Whether pages written here belong to this address space alone."""
        return not self.flags & MAP_SHARED


@functools.cache
def kernel_shmem_device() -> int:
    """st_dev of the kernel's internal tmpfs, where memfds, shared anonymous memory and SysV segments live."""
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


@functools.lru_cache(_KEPT_SHAPES)
def classify(mapping: Mapping) -> Shape:
    """Say what `mapping` is; whoever asks again is given the same object.

    Raises:
        CannotCarry: it is refused; says why.
    """
    kind: VmaKind
    backing: Backing
    special = _SPECIAL.get(mapping.name) if mapping.inode == 0 else None
    if special is not None:
        return Shape(special, "none", MAP_PRIVATE, [], "", False)
    huge_page_bytes = hugetlb.devices().get(mapping.device, 0)
    if is_ring(mapping):
        kind, backing, name = "aio", "none", b""
        _refuse_flags(mapping.flags - {"de"})
    else:
        kind, backing, name = _behind(mapping)
        _refuse_flags(mapping.flags - (_HUGE_BRINGS if huge_page_bytes else _NOTHING))
    if mapping.pkey:
        raise CannotCarry(f"is under memory protection key {mapping.pkey}", "free the key (pkey_free)")
    flags = MAP_SHARED if mapping.shared else MAP_PRIVATE
    implied: set[str] = set()
    if "dp" in mapping.flags:
        flags, implied = MAP_DROPPABLE, _DROPPABLE_BRINGS
    if "gd" in mapping.flags:
        flags |= MAP_GROWSDOWN
    if "nr" in mapping.flags and "nr" not in implied:
        flags |= MAP_NORESERVE
    if huge_page_bytes:
        flags |= hugetlb.mapping_flags(huge_page_bytes)
    return Shape(
        kind=kind,
        backing=backing,
        flags=flags,
        advice=[value for flag, value in ADVICE.items() if flag in mapping.flags and flag not in implied],
        locked="onfault" if "lf" in mapping.flags else "now" if "lo" in mapping.flags else "",
        sealed="sl" in mapping.flags,
        name=name,
        may_write="mw" in mapping.flags,
    )


def is_ring(mapping: Mapping) -> bool:
    """Whether it is the ring of a context of asynchronous I/O; a file of that name can be extended."""
    return mapping.name == _RING and "de" in mapping.flags


def _refuse_flags(flags: frozenset[str]) -> None:
    if flags <= _CARRIED:
        return
    for flag, (reason, remedy) in _REFUSED.items():
        if flag in flags:
            raise CannotCarry(reason, remedy)
    raise CannotCarry(
        f"has properties that are not known here (VmFlags {' '.join(sorted(flags - _CARRIED))})"
    )


def _behind(mapping: Mapping) -> tuple[VmaKind, Backing, bytes]:
    """Kind, what is behind it, and its given name."""
    name = mapping.name
    if mapping.inode == 0 and mapping.device == 0:
        if name in (b"", b"[heap]", b"[stack]"):
            return "anon", "none", b""
        if name.startswith(b"[anon:") and name.endswith(b"]"):
            return "anon", "none", name[6:-1]
        if name == b"[uprobes]":
            raise CannotCarry("holds probes that a tracer put into the program", "remove the uprobes")
        raise CannotCarry(f"is of an unknown kind, {os.fsdecode(name)}")
    if name.startswith(b"[anon_shmem:") and name.endswith(b"]"):
        return "shared", "anon_shared", name[12:-1]
    if mapping.device == kernel_shmem_device():
        return _on_kernel_shmem(name)
    if mapping.device in hugetlb.devices():
        return _on_kernel_hugetlbfs(name, mapping.shared)
    _refuse_name(name)
    return "file", "file", b""


def _on_kernel_shmem(name: bytes) -> tuple[VmaKind, Backing, bytes]:
    if name == b"/dev/zero" + _DELETED:
        return "shared", "anon_shared", b""
    if name.startswith(b"/memfd:") and name.endswith(_DELETED):
        return "shared", "memfd", b""
    if name.startswith(b"/SYSV"):
        return "sysv", "sysv", b""
    raise CannotCarry(f"is memory of a kernel driver, {os.fsdecode(name)}", "close the device")


def _on_kernel_hugetlbfs(name: bytes, shared: bool) -> tuple[VmaKind, Backing, bytes]:
    if name == b"/anon_hugepage" + _DELETED:
        return ("shared", "anon_shared", b"") if shared else ("anon", "none", b"")
    if name.startswith(b"/memfd:") and name.endswith(_DELETED):
        return "shared", "memfd", b""
    if name.startswith(b"/SYSV"):
        raise CannotCarry("is a System V segment of huge pages", "use huge pages of mmap or of a memfd")
    raise CannotCarry(f"is memory of a kernel driver, {os.fsdecode(name)}", "close the device")


_REFUSED_NAMES = {
    b"anon_inode:[io_uring]": ("is the ring of an io_uring", "start the program without io_uring"),
    b"anon_inode:[perf_event]": ("is the ring of a perf event", "stop the measurement"),
    b"/secretmem": ("is secret memory (memfd_secret), which nobody else can read", ""),
    b"anon_inode:": ("belongs to a driver", "close the device"),
    b"socket:": ("is the ring of a packet socket", "close the socket"),
}


def _refuse_name(name: bytes) -> None:
    for prefix, (reason, remedy) in _REFUSED_NAMES.items():
        if name.startswith(prefix) and (not prefix.startswith(b"/") or name == prefix + _DELETED):
            raise CannotCarry(reason, remedy)
    if not name.startswith(b"/"):
        raise CannotCarry(f"maps something that has no path, {os.fsdecode(name)}")
