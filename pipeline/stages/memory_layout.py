"""Turning the address space of a fresh puppet into an empty one with the right bounds.

Order (seen to be the one the kernel accepts): unmap everything but the scratch mapping
and the kernel's own [vvar], [vvar_vclock] and [vdso]; move those three to where the
tree's code expects them, by way of a place where nothing overlaps; then set the bounds
with PR_SET_MM_MAP *now*, since the exe link can only be changed while nothing of the
old executable is mapped.

Source: prctl(2) PR_SET_MM; kernel/sys.c prctl_set_mm_map.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import AddressSpace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PR_SET_MM_MAP, PRCTL, read_memory
from pipeline.remote.calls import Call, In
from pipeline.remote.puppet import SCRATCH_BYTES, Puppet

_KERNEL_MAPPINGS = ("vvar", "vvar_vclock", "vdso")
#: room behind the scratch mapping where the kernel's mappings wait while they are moved
_TRANSIT_BYTES = 256 * 1024
#: what `pipeline.resources.memory` must find free in every layout
HOLE_BYTES = SCRATCH_BYTES + _TRANSIT_BYTES
_MREMAP_MAYMOVE_FIXED = 1 | 2
_USER_START = 0x10000
_MM_MAP_BYTES = 104


def kernel_mappings(pid: int) -> dict[str, tuple[int, int]]:
    """Where [vvar], [vvar_vclock] and [vdso] of a process are: name -> (start, end)."""
    found = {}
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file.read().splitlines():
            name = line.split(None, 5)[-1] if b" [v" in line else b""
            if name.startswith(b"[") and name[1:-1].decode() in _KERNEL_MAPPINGS:
                start, end = line.split(None, 1)[0].split(b"-")
                found[name[1:-1].decode()] = (int(start, 16), int(end, 16))
    return found


def vdso_digest(pid: HostPid, at: tuple[int, int] | None) -> bytes:
    """SHA-256 of a process's vdso, without what `pipeline.remote.live` may have left in it.

    Args:
        at: its [start, end); None: it has none, and the digest is zeros.
    """
    if at is None:
        return bytes(hashlib.sha256().digest_size)
    code = read_memory(pid, RemoteAddress(at[0]), at[1] - at[0])
    return hashlib.sha256(code.replace(arch.STUB, bytes(len(arch.STUB)))).digest()


def _gaps(kept: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = _USER_START
    for start, end in sorted(kept):
        if start > at:
            yield at, start
        at = end
    if at < arch.ADDRESS_END:
        yield at, arch.ADDRESS_END


def empty(puppet: Puppet, space: AddressSpace) -> None:
    """Leave nothing in the puppet's address space but scratch and the kernel's mappings, in their final place.

    Raises:
        RebuildError: this kernel's vdso has another shape than the source's.
    """
    here = kernel_mappings(puppet.pid)
    wanted: dict[str, tuple[int, int]] = {
        vma.kind: (vma.start, vma.end) for vma in space.vmas if vma.kind in _KERNEL_MAPPINGS
    }
    for name, (start, end) in wanted.items():
        if name not in here or here[name][1] - here[name][0] != end - start:
            raise RebuildError(
                f"[{name}] has another size on this kernel; the tree's code points into the old one"
            )
    scratch = puppet.stage.scratch
    kept = [(scratch, scratch + SCRATCH_BYTES), *here.values()]
    calls = [Call(NR.munmap, (start, end - start), name="munmap") for start, end in _gaps(kept)]
    transit = scratch + SCRATCH_BYTES
    arrivals = []
    for name, (start, end) in here.items():
        size = end - start
        if name in wanted:
            calls.append(
                Call(NR.mremap, (start, size, size, _MREMAP_MAYMOVE_FIXED, transit), name=f"move [{name}]")
            )
            arrivals.append(
                Call(
                    NR.mremap,
                    (transit, size, size, _MREMAP_MAYMOVE_FIXED, wanted[name][0]),
                    name=f"move [{name}]",
                )
            )
            transit += size
        else:
            calls.append(Call(NR.munmap, (start, size), name=f"unmap [{name}]"))
    puppet.run_checked(calls + arrivals)


def set_bounds(puppet: Puppet, space: AddressSpace, exe_fd: int) -> None:
    """Set code, data, heap, stack, argument and environment bounds, the auxiliary vector and the exe link.

    Args:
        exe_fd: descriptor *in the puppet* of the executable; -1 leaves the link as it is.
    """
    tail = struct.pack("<Ii", len(space.auxv), exe_fd)
    bounds = In([*space.layout, In([space.auxv]), tail])
    puppet.syscall(NR.prctl, PRCTL.SET_MM, PR_SET_MM_MAP, bounds, _MM_MAP_BYTES, 0)
