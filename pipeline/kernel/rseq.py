"""Restartable sequences: where a thread that was stopped inside one has to go on.

A thread that is preempted inside a restartable sequence must not finish it: on its way
back to user space the kernel sends it to the sequence's abort address. It looks at the
instruction pointer at that moment. A tracer that lets the thread run something else
first takes that moment away: the kernel sees a foreign address, forgets the sequence,
and the thread would later go on in the middle of it, on another processor. So whoever
borrows a stopped thread, or rebuilds it elsewhere, does what the kernel would have done:
it lets the thread go on at the abort address.

Source: include/uapi/linux/rseq.h, kernel/rseq.c (rseq_ip_fixup), rseq(2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from pipeline.kernel.arch.x86_64 import Registers

#: offset in `struct rseq` of the pointer to the sequence that is being run
_CS_OFFSET = 8
#: version, flags, start_ip, post_commit_offset, abort_ip
_CS = struct.Struct("<IIQQQ")


def settled(
    regs: Registers, area: tuple[int, int, int, int] | None, read: Callable[[int, int], bytes]
) -> Registers:
    """The registers with which a stopped thread goes on: outside of any restartable sequence.

    Args:
        regs: of the thread, as it was stopped.
        area: (address, size in bytes, signature, flags) of its registration, see `ptrace.get_rseq`.
        read: reads (address, size in bytes) of its memory.

    A sequence that the kernel would not take for one (unreadable, unknown version, wrong signature)
    changes nothing here: the kernel meets it again when the thread runs.
    """
    if area is None:
        return regs
    try:
        (descriptor,) = struct.unpack("<Q", read(area[0] + _CS_OFFSET, 8))
        if not descriptor:
            return regs
        version, _, start, length, abort = _CS.unpack(read(descriptor, _CS.size))
        (signature,) = struct.unpack("<I", read(abort - 4, 4))
    except (OSError, struct.error):
        return regs
    inside = 0 <= regs["rip"] - start < length
    if version or not inside or start <= abort < start + length or signature != area[2]:
        return regs
    return regs.replace(rip=abort)
