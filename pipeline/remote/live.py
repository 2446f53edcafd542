"""Running system calls inside a live target, so that it survives whatever happens to us.

The target is somebody's program, stopped for a moment. What we borrow from it:

* The stub (`pipeline.kernel.arch.x86_64.STUB`) goes into bytes behind the end of the
  code of an executable mapping, the vdso first: nobody runs or reads them.
* A signal frame and the table of calls go into dead stack: below the stack pointer
  and the red zone of a thread whose stack has room. What stood there is put back.

The stub ends by sending its own thread a signal whose default is to be ignored and
that the program does not catch, and then rt_sigreturn on the frame. While we live, the
signal is a ptrace stop: we read the results and set the original registers; the
program never runs a changed instruction, and an interrupted system call keeps its
restart block. If we are killed at any moment, the stub runs to its end, the signal is
ignored, and rt_sigreturn continues the program exactly where it was.

All other signals are blocked while the stub runs, and the frame holds the true mask,
so a signal that arrives meanwhile is neither lost nor taken early.

Not preserved when we are killed in that window: the restart block of a relative
sleep (the call is issued again with its original arguments). A program with a seccomp
filter runs its calls with the filter suspended; killed in the window, the calls that
are left are filtered.
"""

from __future__ import annotations

import os
import signal
import struct
from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from pipeline.errors import TargetError
from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel import ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.smaps import Mapping
from pipeline.remote.calls import Argument, Call, lay_out, take_results

_RED_ZONE_BYTES = 128
_BATCH_CALLS = 96
#: frame (about 3.3 KiB with AVX-512), table and the answers of a batch
AREA_BYTES = 32 * 1024
_CANDIDATES = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT)


class Places(msgspec.Struct, frozen=True):
    """Where a process lends us room: `stub` for the code, `area` for `AREA_BYTES` of data."""

    stub: RemoteAddress
    area: RemoteAddress


def find_places(
    pid: HostPid, mappings: Sequence[Mapping], stack_pointers: Sequence[int], memory: int
) -> Places:
    """Find room for the stub and the data in `pid`.

    Args:
        pid: the process, all of its threads stopped.
        mappings: all of its own, ascending.
        stack_pointers: rsp of every thread, the leader's first.
        memory: descriptor of /proc/PID/mem.

    Raises:
        TargetError: there is no room.
    """
    for mapping in sorted(filter(_holds_code, mappings), key=lambda one: one.name != b"[vdso]"):
        stub = RemoteAddress(mapping.end - len(arch.STUB) - 8)
        tail = os.pread(memory, len(arch.STUB) + 16, stub - 8)
        # a stub that is there already was left by somebody who was killed; its bytes are the same
        if tail[:8] + tail[-8:] == bytes(16) and tail[8:-8] in (bytes(len(arch.STUB)), arch.STUB):
            break
    else:
        raise TargetError(f"pid {pid}: no unused bytes in any executable mapping for the stub")
    starts = [mapping.start for mapping in mappings]
    for pointer in stack_pointers:
        mapping = mappings[bisect_right(starts, pointer) - 1]
        top = (pointer - _RED_ZONE_BYTES) & ~63
        if (
            _holds_data(mapping)
            and mapping.start <= pointer < mapping.end
            and top - mapping.start >= AREA_BYTES
        ):
            return Places(stub, RemoteAddress(top - AREA_BYTES))
    for mapping in filter(_holds_data, mappings):
        # the leader is on a stack of its own making: the far end of its first stack is dead
        if mapping.name == b"[stack]" and mapping.end - mapping.start >= 2 * AREA_BYTES:
            return Places(stub, RemoteAddress(mapping.start))
    raise TargetError(f"pid {pid}: no thread has {AREA_BYTES} bytes of unused stack")


def _holds_code(mapping: Mapping) -> bool:
    return mapping.executable and mapping.readable and not mapping.shared and mapping.name != b"[vsyscall]"


def _holds_data(mapping: Mapping) -> bool:
    return mapping.readable and mapping.writable and not mapping.shared


class LiveTask:
    """A stopped thread of a live target that runs (read-only) system calls for us. See `Remote`.

    Args:
        tid: the thread, seized and stopped by the calling thread.
        places: where its process lends us room.
        memory: descriptor of /proc/PID/mem.
        uncaught: signals that the process does not catch, as a bit set (bit 0 is signal 1).
    """

    def __init__(self, tid: HostPid, places: Places, memory: int, uncaught: int) -> None:
        self._tid = tid
        self._places = places
        self._memory = memory
        self._uncaught = uncaught
        #: system calls run so far
        self.injected_calls = 0

    def syscall(self, number: int, *args: Argument) -> int:
        """Run one call; OSError with its errno if it fails."""
        call = Call(number, args)
        self.run([call])
        return call.check()

    def run(self, calls: Sequence[Call]) -> None:
        """Run the calls in order, in batches; see `Remote.run`."""
        for start in range(0, len(calls), _BATCH_CALLS):
            self._run_batch(calls[start : start + _BATCH_CALLS])

    def _stop_signal(self) -> int:
        pending = 0
        for shared in (False, True):
            for info in ptrace.peek_siginfo(self._tid, shared):
                pending |= 1 << (struct.unpack_from("<i", info)[0] - 1)
        for candidate in _CANDIDATES:
            if self._uncaught >> (candidate - 1) & 1 and not pending >> (candidate - 1) & 1:
                return candidate
        raise TargetError(f"pid {self._tid}: catches or has pending every signal that is ignored by default")

    def _run_batch(self, calls: Sequence[Call]) -> None:
        tid, area = self._tid, self._places.area
        original = ptrace.get_regs(tid)
        mask = ptrace.get_sigmask(tid)
        stop_signal = self._stop_signal()
        regs = arch.Registers(original)
        frame = arch.signal_frame(area, arch.resumed_elsewhere(regs), ptrace.get_xstate(tid), mask)
        table = RemoteAddress((area + len(frame.image) + 63) & ~63)
        keep_altstack = Call(arch.NR.sigaltstack, (0, frame.ucontext + arch.FRAME_ALTSTACK))
        batch = [keep_altstack, *calls]
        layout = lay_out(batch, table)
        image = frame.image.ljust(table - area, b"\0") + layout.image
        if len(image) > AREA_BYTES:
            raise ValueError(f"a batch of {len(image)} bytes does not fit into {AREA_BYTES}")
        changed = regs.replace(
            rip=self._places.stub, rbx=table, r12=len(batch), r13=stop_signal, rsp=frame.ucontext, orig_rax=-1
        )
        saved_stub = os.pread(self._memory, len(arch.STUB), self._places.stub)
        saved_area = os.pread(self._memory, len(image), area)
        os.pwrite(self._memory, arch.STUB, self._places.stub)
        os.pwrite(self._memory, image, area)
        # From here on the target can only go on through the frame. Registers first, then the
        # mask: whatever we are killed between, the frame holds the true one.
        ptrace.set_regs(tid, changed.pack())
        ptrace.set_sigmask(tid, ~(1 << (stop_signal - 1)) & 0xFFFF_FFFF_FFFF_FFFF)
        ptrace.cont(tid)
        self._await(stop_signal)
        answer = os.pread(self._memory, len(layout.image), table)
        ptrace.set_sigmask(tid, mask)
        ptrace.set_regs(tid, original)
        os.pwrite(self._memory, saved_area, area)
        os.pwrite(self._memory, saved_stub, self._places.stub)
        take_results(batch, layout, answer)
        self.injected_calls += len(batch)

    def _await(self, stop_signal: int) -> None:
        while True:
            stop = ptrace.wait(self._tid)
            if stop is None or stop.exited:
                raise TargetError(f"pid {self._tid} ended while it was looked at")
            if not stop.event and stop.signal == stop_signal:
                return
            # an EVENT_STOP left from the freeze; a signal cannot be: all others are blocked
            ptrace.cont(self._tid, 0 if stop.event else stop.signal)
