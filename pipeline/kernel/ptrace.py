"""ptrace(2), one function a request. All of them must come from the thread that seized the task.

Stops are read with `wait`, which never reaps anything but what it was asked for.
Sources: ptrace(2); include/uapi/linux/ptrace.h for the numbers newer than the man page.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from enum import IntEnum, IntFlag

import msgspec

from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall


class PTRACE(IntEnum):
    """Requests."""

    CONT = 7
    KILL = 8
    SINGLESTEP = 9
    DETACH = 17
    SYSCALL = 24
    SETOPTIONS = 0x4200
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    SETSIGINFO = 0x4203
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    LISTEN = 0x4208
    PEEKSIGINFO = 0x4209
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    SECCOMP_GET_FILTER = 0x420C
    SECCOMP_GET_METADATA = 0x420D
    GET_RSEQ_CONFIGURATION = 0x420F
    GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211


class OPTION(IntFlag):
    """PTRACE_O_* options."""

    TRACEFORK = 1 << 1
    TRACEVFORK = 1 << 2
    TRACECLONE = 1 << 3
    TRACEEXEC = 1 << 4
    TRACEEXIT = 1 << 6
    EXITKILL = 1 << 20
    SUSPEND_SECCOMP = 1 << 21


class EVENT(IntEnum):
    """PTRACE_EVENT_* numbers, in the upper half of a stop's status."""

    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    STOP = 128


NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202
WALL = 0x4000_0000
_PEEK_SHARED = 1
_XSTATE_MAX_BYTES = 1 << 14


class Stop(msgspec.Struct, frozen=True):
    """What `wait` saw. Exactly one of the three: exited (wait status), event, or signal delivery."""

    status: int

    @property
    def exited(self) -> bool:
        """The task is gone; `status` is its wait status."""
        return not os.WIFSTOPPED(self.status)

    @property
    def event(self) -> int:
        """EVENT number of an event stop, else 0."""
        return self.status >> 16

    @property
    def signal(self) -> int:
        """The signal of the stop: delivered, or the stopping one of a group stop."""
        return (self.status >> 8) & 0xFF

    @property
    def group_stop(self) -> bool:
        """An EVENT_STOP because of job control, not because of PTRACE_INTERRUPT."""
        return self.event == EVENT.STOP and self.signal != signal.SIGTRAP


def _request(
    request: PTRACE, tid: int, address: int = 0, data: int | bytes | ctypes.Array[ctypes.c_char] = 0
) -> int:
    return syscall(NR.ptrace, request, tid, address, data)


def seize(tid: int, options: int = 0) -> None:
    """PTRACE_SEIZE: become the tracer without stopping the task. EPERM if traced or not allowed."""
    _request(PTRACE.SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """PTRACE_INTERRUPT: ask for an EVENT_STOP."""
    _request(PTRACE.INTERRUPT, tid)


def set_options(tid: int, options: int) -> None:
    """PTRACE_SETOPTIONS; the task must be stopped."""
    _request(PTRACE.SETOPTIONS, tid, 0, options)


def cont(tid: int, deliver: int = 0) -> None:
    """PTRACE_CONT, delivering signal `deliver` (0 none)."""
    _request(PTRACE.CONT, tid, 0, deliver)


def cont_to_syscall(tid: int) -> None:
    """PTRACE_SYSCALL: go on to the next entry into or exit from a system call."""
    _request(PTRACE.SYSCALL, tid)


def detach(tid: int, deliver: int = 0) -> None:
    """PTRACE_DETACH; the task must be stopped."""
    _request(PTRACE.DETACH, tid, 0, deliver)


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG: the new task's pid after a fork or clone event."""
    value = ctypes.create_string_buffer(8)
    _request(PTRACE.GETEVENTMSG, tid, 0, value)
    return int.from_bytes(value.raw, "little")


def wait(tid: int, nohang: bool = False) -> Stop | None:
    """Wait for the next stop or the end of `tid`; None only with `nohang` when there is none.

    Raises:
        ChildProcessError: not our tracee or child (any more).
    """
    while True:
        try:
            pid, status = os.waitpid(tid, WALL | (os.WNOHANG if nohang else 0))
        except InterruptedError:
            continue
        return Stop(status) if pid else None


def is_stopped(tid: int) -> bool:
    """Whether a task is our tracee and in a ptrace stop, reported or not."""
    try:
        event_message(tid)
    except ProcessLookupError:
        return False
    return True


def take_end(tid: int) -> bool:
    """Collect a tracee if it has ended; takes no stop of it.

    Raises:
        ChildProcessError: not our tracee or child (any more).
    """
    options = os.WEXITED | os.WNOHANG | WALL
    # a tracee's stops are reported whether they are asked for or not, so this looks first
    found = os.waitid(os.P_PID, tid, options | os.WNOWAIT)
    if found is None or found.si_code not in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
        return False
    return os.waitid(os.P_PID, tid, options) is not None


def _regset(tid: int, kind: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    iov = ctypes.create_string_buffer(struct.pack("<2Q", ctypes.addressof(buffer), len(buffer)), 16)
    _request(PTRACE.GETREGSET, tid, kind, iov)
    return int.from_bytes(iov.raw[8:], "little")


def _set_regset(tid: int, kind: int, content: bytes) -> None:
    buffer = ctypes.create_string_buffer(content, len(content))
    iov = struct.pack("<2Q", ctypes.addressof(buffer), len(content))
    _request(PTRACE.SETREGSET, tid, kind, iov)


def get_regs(tid: int) -> bytes:
    """General registers as `struct user_regs_struct` (see `pipeline.kernel.arch.x86_64.Registers`)."""
    buffer = ctypes.create_string_buffer(512)
    size_bytes = _regset(tid, NT_PRSTATUS, buffer)
    return buffer.raw[:size_bytes]


def set_regs(tid: int, registers: bytes) -> None:
    """Set the general registers."""
    _set_regset(tid, NT_PRSTATUS, registers)


def get_xstate(tid: int) -> bytes:
    """The whole extended state (x87, SSE, AVX, AVX-512, PKRU ...) in XSAVE format."""
    buffer = ctypes.create_string_buffer(_XSTATE_MAX_BYTES)
    size_bytes = _regset(tid, NT_X86_XSTATE, buffer)
    return buffer.raw[:size_bytes]


def set_xstate(tid: int, xstate: bytes) -> None:
    """Set the extended state."""
    _set_regset(tid, NT_X86_XSTATE, xstate)


def get_sigmask(tid: int) -> int:
    """Blocked signals as a bit set, bit 0 is signal 1."""
    buffer = ctypes.create_string_buffer(8)
    _request(PTRACE.GETSIGMASK, tid, 8, buffer)
    return int.from_bytes(buffer.raw, "little")


def set_sigmask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    _request(PTRACE.SETSIGMASK, tid, 8, mask.to_bytes(8, "little"))


def peek_siginfo(tid: int, shared: bool) -> list[bytes]:
    """All queued signals of the thread, or of its process: 128 bytes of siginfo_t each, oldest first."""
    result: list[bytes] = []
    chunk = 32
    buffer = ctypes.create_string_buffer(128 * chunk)
    while True:
        args = struct.pack("<QIi", len(result), _PEEK_SHARED if shared else 0, chunk)
        count = syscall(NR.ptrace, PTRACE.PEEKSIGINFO, tid, args, buffer)
        result.extend(buffer.raw[128 * i : 128 * (i + 1)] for i in range(count))
        if count < chunk:
            return result


def get_rseq(tid: int) -> tuple[int, int, int, int] | None:
    """Registered rseq area: (address, size in bytes, signature, flags); None if none or not knowable."""
    buffer = ctypes.create_string_buffer(24)
    try:
        _request(PTRACE.GET_RSEQ_CONFIGURATION, tid, 24, buffer)
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return None
        raise
    address, size, signature, flags, _ = struct.unpack("<QIIII", buffer.raw)
    return (address, size, signature, flags) if address else None


def seccomp_get_filter(tid: int, index: int) -> bytes | None:
    """Seccomp filter number `index`, oldest first, 8 bytes an instruction; None behind the last.

    (ptrace(2) says newest first; the kernel's get_nth_filter counts from the oldest.)

    Raises:
        OSError: EACCES without CAP_SYS_ADMIN in the initial namespace, EMEDIUMTYPE (not cBPF).
    """
    try:
        count = _request(PTRACE.SECCOMP_GET_FILTER, tid, index, 0)
    except FileNotFoundError:
        return None
    buffer = ctypes.create_string_buffer(8 * count)
    _request(PTRACE.SECCOMP_GET_FILTER, tid, index, buffer)
    return buffer.raw


def seccomp_get_flags(tid: int, index: int) -> int:
    """SECCOMP_FILTER_FLAG_* of filter number `index`, oldest first (PTRACE_SECCOMP_GET_METADATA)."""
    buffer = ctypes.create_string_buffer(struct.pack("<QQ", index, 0), 16)
    _request(PTRACE.SECCOMP_GET_METADATA, tid, 16, buffer)
    return int.from_bytes(buffer.raw[8:], "little")


def get_syscall_user_dispatch(tid: int) -> tuple[int, int, int, int] | None:
    """PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: mode, selector, offset, length; mode 0 is off.

    Returns:
        None where the kernel cannot tell (before 6.4).
    """
    buffer = ctypes.create_string_buffer(32)
    try:
        _request(PTRACE.GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, buffer)
    except OSError as error:
        if error.errno != errno.EIO:  # of a request that there is not
            raise
        return None
    return struct.unpack("<4Q", buffer.raw)
