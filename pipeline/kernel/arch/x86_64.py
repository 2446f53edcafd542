"""Everything that depends on the processor, for x86_64: registers, machine code, signal frame, ELF.

Another processor is one more file with the same names. Sources: the System V
x86-64 psABI, arch/x86/include/uapi/asm/sigcontext.h, asm/ptrace.h, elf(5).
"""

from __future__ import annotations

import struct

import msgspec

from pipeline.kernel.arch.x86_64_numbers import NR, call_name

__all__ = ["NR", "Registers", "call_name"]

MACHINE = "x86_64"
PAGE_BYTES = 4096
#: end of what user space may map without asking for 57-bit addresses
ADDRESS_END = 0x7FFF_FFFF_F000

#: Runs a table of system calls (see `pipeline.remote.calls`), then stops itself. On entry:
#: rbx = table, r12 = number of calls, r13 = signal to stop with, rsp = a `struct ucontext`
#: that continues the interrupted program if nobody is there to take the stop.
#:
#: loop:  mov (%rbx),%rax; mov 8(%rbx),%rdi; mov 16(%rbx),%rsi; mov 24(%rbx),%rdx
#:        mov 32(%rbx),%r10; mov 40(%rbx),%r8; mov 48(%rbx),%r9
#:        syscall; mov %rax,56(%rbx); add $64,%rbx; dec %r12; jne loop
#:        getpid -> rdi; gettid -> rsi; tgkill(rdi, rsi, r13); rt_sigreturn(); ud2
STUB = bytes.fromhex(
    "488b03488b7b08488b7310488b53184c8b53204c8b43284c8b4b300f05488943384883c34049ffcc75d6"
    "b8270000000f054889c7b8ba0000000f054889c64c89eab8ea0000000f05b80f0000000f050f0b"
)

#: The first process of a pid namespace that the tree itself has no first process for: waits
#: for any child, for ever; exits with the status of child rbp (128 + signal if killed).
#:
#: init:  wait4(-1, -16(%rsp), __WALL, 0); EINTR -> init; other error -> pause(); init
#:        rax != rbp -> init; exit_group(status)
INIT = bytes.fromhex(
    "b83d00000048c7c7ffffffff488d7424f0ba000000404531d20f054883f8fc74df4885c078284839e875d5"
    "8b7c24f089f883e07f750bc1ef0881e7ff000000eb068db880000000b8e70000000f05b8220000000f05eba9"
)

#: What a puppet does before it is taken: prctl(PR_SET_PDEATHSIG, SIGKILL), then read() of its channel, whose number
#: stands between the two parts, until that ends: who made it may be dead before it has come to its first line.
_IDLE = (
    bytes.fromhex("b89d000000bf01000000be090000000f05bf"),
    bytes.fromhex("4889e6ba0100000031c00f0585c075ebb8e700000031ff0f05"),
)

#: where the puppet program is loaded, and where its pieces are in it
PUPPET_BASE = 0x10000
_ELF_HEADER_BYTES = 64 + 56
PUPPET_STUB = PUPPET_BASE + 256
PUPPET_INIT = PUPPET_BASE + 512


def puppet_program(channel_fd: int) -> bytes:
    """A static ELF executable of one read-execute page: idles, and holds `STUB` and `INIT`.

    Args:
        channel_fd: the descriptor that it will have of its channel.
    """
    idle = _IDLE[0] + struct.pack("<I", channel_fd) + _IDLE[1]
    code = bytearray(1024 - _ELF_HEADER_BYTES)
    for address, piece in (
        (PUPPET_BASE + _ELF_HEADER_BYTES, idle),
        (PUPPET_STUB, STUB),
        (PUPPET_INIT, INIT),
    ):
        start = address - PUPPET_BASE - _ELF_HEADER_BYTES
        code[start : start + len(piece)] = piece
    size = _ELF_HEADER_BYTES + len(code)
    entry = PUPPET_BASE + _ELF_HEADER_BYTES
    identification = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = identification + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, PUPPET_BASE, PUPPET_BASE, size, size, PAGE_BYTES)
    # PT_GNU_STACK is left out on purpose: the stack of the puppet is thrown away.
    return header + program + bytes(code)


_NAMES = [
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
]
_INDEX = {name: index for index, name in enumerate(_NAMES)}
REGISTERS_BYTES = 8 * len(_NAMES)
_USER_CS = 0x33


class Registers:
    """`struct user_regs_struct`: read with ``regs["rip"]``, changed copies by `replace`."""

    __slots__ = ("_values",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != REGISTERS_BYTES:
            raise ValueError(f"{len(raw)} bytes of registers, expected {REGISTERS_BYTES} (a 32-bit program?)")
        self._values = struct.unpack("<27Q", raw)

    def __getitem__(self, name: str) -> int:
        value: int = self._values[_INDEX[name]]
        return value

    def replace(self, **changes: int) -> Registers:
        """A copy with some registers changed (unsigned or signed 64-bit values)."""
        values = list(self._values)
        for name, value in changes.items():
            values[_INDEX[name]] = value & 0xFFFF_FFFF_FFFF_FFFF
        return Registers(struct.pack("<27Q", *values))

    def pack(self) -> bytes:
        """The 216 bytes that PTRACE_SETREGSET takes."""
        return struct.pack("<27Q", *self._values)

    @property
    def is_64_bit(self) -> bool:
        """False for a task that runs 32-bit code."""
        return self["cs"] == _USER_CS

    @property
    def syscall_result(self) -> int:
        """rax as a signed number: -512.. for an interrupted system call."""
        value = self["rax"]
        return value - (1 << 64) if value >> 63 else value

    @property
    def in_syscall(self) -> bool:
        """Whether the stop interrupted a system call."""
        return self["orig_rax"] >> 63 == 0

    @property
    def syscall_args(self) -> tuple[int, ...]:
        """The six arguments of the interrupted system call."""
        return tuple(self[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))


ERESTARTSYS = -512
ERESTARTNOINTR = -513
ERESTARTNOHAND = -514
ERESTART_RESTARTBLOCK = -516
_EINTR = -4
_SYSCALL_BYTES = 2


def resumed_elsewhere(regs: Registers) -> Registers:
    """The registers with which the program goes on when the kernel no longer helps to restart.

    Does by hand what the kernel does on the way out of an interrupted system call
    without a signal handler: issue it again. A restart block (-516) is lost where
    registers are set by rt_sigreturn; the call is issued again with its arguments.
    """
    if not regs.in_syscall:
        return regs
    if regs.syscall_result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        return regs.replace(rax=regs["orig_rax"], rip=regs["rip"] - _SYSCALL_BYTES, orig_rax=-1)
    return regs.replace(orig_rax=-1)


class Frame(msgspec.Struct, frozen=True):
    """A signal frame to be put at `address` (64-byte aligned); the stub's rsp is `ucontext`."""

    image: bytes
    ucontext: int


_UC_FLAGS = 1 | 2 | 4  # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_SS_DISABLE = 2
_FP_XSTATE_MAGIC1 = 0x46505853
_FP_XSTATE_MAGIC2 = 0x46505845
_SW_RESERVED_OFFSET = 464
_SIGCONTEXT = [
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rdi",
    "rsi",
    "rbp",
    "rbx",
    "rdx",
    "rax",
    "rcx",
    "rsp",
    "rip",
    "eflags",
]


#: where in the frame rt_sigreturn finds the stack_t of the alternate signal stack. The caller lets
#: the stub's first call, sigaltstack(NULL, here), fill it: rt_sigreturn *sets* what it finds.
FRAME_ALTSTACK = 16


def signal_frame(address: int, regs: Registers, xstate: bytes, sigmask: int) -> Frame:
    """The frame from which rt_sigreturn continues a program with these registers and mask.

    Args:
        address: where the frame will be, 64-byte aligned.
        regs: the program's registers (restarts of system calls already applied).
        xstate: NT_X86_XSTATE content.
        sigmask: blocked signals.
    """
    sigcontext = struct.pack("<18Q", *(regs[name] for name in _SIGCONTEXT))
    sigcontext += struct.pack("<4H", regs["cs"], regs["gs"], regs["fs"], regs["ss"])
    sigcontext += bytes(4 * 8)  # err, trapno, oldmask, cr2
    xstate_offset = 512
    sigcontext += struct.pack("<Q", address + xstate_offset) + bytes(64)
    context = struct.pack("<QQ", _UC_FLAGS, 0) + struct.pack("<QiIQ", 0, _SS_DISABLE, 0, 0)
    context += sigcontext + struct.pack("<Q", sigmask)
    fp = bytearray(xstate)
    struct.pack_into(
        "<IIQI", fp, _SW_RESERVED_OFFSET, _FP_XSTATE_MAGIC1, len(fp) + 4, xfeatures(xstate), len(fp)
    )
    image = context.ljust(xstate_offset, b"\0") + bytes(fp) + struct.pack("<I", _FP_XSTATE_MAGIC2)
    return Frame(image, address)


def xfeatures(xstate: bytes) -> int:
    """XCR0, which the kernel keeps at byte 464: the extended states that this area has room for."""
    return int.from_bytes(xstate[_SW_RESERVED_OFFSET : _SW_RESERVED_OFFSET + 8], "little")
