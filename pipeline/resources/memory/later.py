"""Which pages may come when their program runs elsewhere already. Pure.

Only pages that userfaultfd(2) can answer for: private, anonymous, of mappings that do not grow downwards. Of those the
ones are left out whose absence would be seen, or would do harm:

* locked memory: nobody who locks memory expects to wait for it; sealed memory: what is there cannot be dropped;
* MADV_WIPEONFORK: a child has zeros there, whatever its parent lacks;
* what the kernel touches by itself when a thread begins to run (its restartable-sequences area, the top of its stack,
  thread-local storage), and what the arguments of its system call point to: one that sleeps is begun anew before the
  tree runs (`pipeline.resources.tasks.interrupted`);
* memory whose program answers for page faults, or may at any time: nobody else can then;
* the arguments and environment of the program, which `ps` reads.

Source: vma_can_userfault() in include/linux/userfaultfd_k.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, Thread, Vma
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.hugetlb import MAP_HUGETLB
from pipeline.kernel.pagemap import PAGE_BYTES, Range, merged, subtract
from pipeline.resources.memory.missing import RangeSet

#: MAP_TYPE, MAP_GROWSDOWN: of what is left only MAP_PRIVATE will do (MAP_DROPPABLE is a type, too)
_TELLING, _MAP_PRIVATE = 0xF | 0x100 | MAP_HUGETLB, 0x2
_MADV_WIPEONFORK = 18
#: arg_start and env_end of `AddressSpace.layout`
_ARG_START, _ENV_END = 7, 10
#: where system calls have their arguments
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_POLLFD_BYTES = 8
#: of a stack, from its pointer on
_STACK_BYTES = 4 * PAGE_BYTES


def may_wait(image: Image, space: AddressSpace) -> list[Range]:
    """Ranges of `space` whose pages may come later: none where the program answers for missing pages itself."""
    if space.answers:
        return []
    threads = [
        thread
        for process in image.processes.values()
        if process.space == space.space
        for thread in process.threads
    ]
    hot = RangeSet(_around(at, size) for at, size in _hot(space, threads))
    return subtract(merged(mappings(space)), list(hot))


def mappings(space: AddressSpace) -> list[Range]:
    """The mappings of `space` in which the kernel lets missing pages be answered for."""
    return [(vma.start, vma.end) for vma in space.vmas if _may_wait(vma)]


def _may_wait(vma: Vma) -> bool:
    return (
        vma.kind == "anon"
        and vma.flags & _TELLING == _MAP_PRIVATE
        and not vma.locked
        and not vma.sealed
        and _MADV_WIPEONFORK not in vma.advice
    )


def _hot(space: AddressSpace, threads: Sequence[Thread]) -> Iterator[tuple[int, int]]:
    start, end = space.layout[_ARG_START], space.layout[_ENV_END]
    if start < end:
        yield start, end - start
    for thread in threads:
        registers = arch.Registers(thread.registers)
        yield registers["rsp"] - PAGE_BYTES, PAGE_BYTES + _STACK_BYTES
        yield registers["rip"], 1
        yield registers["fs_base"] - PAGE_BYTES, 2 * PAGE_BYTES
        yield from ((registers[name], PAGE_BYTES) for name in _ARGUMENTS)
        if registers["orig_rax"] == NR.poll:
            yield registers["rdi"], registers["rsi"] * _POLLFD_BYTES
        yield thread.tid_address, 8
        yield thread.robust_list[0], thread.robust_list[1]
        if thread.rseq is not None:
            yield thread.rseq.address, thread.rseq.size_bytes


def _around(address: int, size_bytes: int) -> Range:
    """The pages of a range."""
    start = max(0, address)
    end = address + size_bytes
    return start - start % PAGE_BYTES, end + -end % PAGE_BYTES


def is_copied(image: Image, space: int) -> bool:
    """Whether a child is forked with the pages of `space`, which are shared copy-on-write only if they are there."""
    return any(other.copy_of == space for other in image.spaces.values())
