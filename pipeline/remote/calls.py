"""Descriptions of system calls to run inside another process. Pure data: no kernel here.

A `Call` names a system call and its arguments. An argument is a number, bytes
(copied into the other process, the call gets a pointer), an `Out` (room the call
writes to, read back afterwards) or an `In` (a structure that itself holds pointers).
`lay_out` turns a list of them into the table that the machine-code stub walks and
the data behind it; both go to one piece of memory of the other process.

The table has 64 bytes a call: number, six arguments, result (see
`pipeline.kernel.arch`). Results are raw: negative errno on failure.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pipeline.ids import RemoteAddress
from pipeline.kernel.arch.x86_64_numbers import call_name

CALL_BYTES = 64
_ALIGN_BYTES = 16
#: number and arguments stand before it
_RESULT = struct.Struct("<56xq")
#: arguments that are not there, and the result
_ZEROS = (0,) * 7
_MASK = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(eq=False)
class Out:
    """Room of `size_bytes` that the call fills; `data` holds what it wrote. `initial` is its content before."""

    size_bytes: int
    initial: bytes = b""
    data: bytes = b""


@dataclass(eq=False)
class In:
    """A structure: bytes as they are, numbers as 8 bytes, `Out`/`In` as 8-byte pointers to them."""

    parts: Sequence[bytes | int | Out | In]


Argument = int | bytes | Out | In


@dataclass(eq=False)
class Call:
    """One system call. `result` is set by running it: the raw return value, -errno on failure.

    `check` raises for the negative ones; set `may_fail` for calls whose failure is an answer.
    """

    number: int
    args: Sequence[Argument] = ()
    may_fail: bool = False
    #: what a failure message calls it
    name: str = ""
    result: int = field(default=0, init=False)

    def check(self) -> int:
        """Return the result or raise OSError with the call's errno."""
        if self.result < 0 and not self.may_fail:
            code = -self.result
            what = self.name or call_name(self.number)
            raise OSError(code, f"{what}: {errno.errorcode.get(code, code)}: {os.strerror(code)}")
        return self.result


class Remote(Protocol):
    """A stopped task that runs system calls for us: a live target's thread or a puppet."""

    def run(self, calls: Sequence[Call]) -> None:
        """Run the calls in order; results and `Out` data are filled in.

        Does not raise for failing calls (use `Call.check`). Live targets: only calls that change nothing.
        """

    def syscall(self, number: int, *args: Argument) -> int:
        """Run one call; OSError with its errno if it fails."""


class Layout(msgspec.Struct, frozen=True):
    """Memory image of a batch: `image` goes to the base address, each `Out` is at its offset."""

    image: bytes
    outs: Sequence[tuple[int, Out]]


def lay_out(calls: Sequence[Call], base: RemoteAddress) -> Layout:
    """Place the call table at `base` and the data behind it; pointers are absolute.

    In the pause of a tree each of its tasks is asked some ninety things by it.
    """
    outs: list[tuple[int, Out]] = []
    contents: list[tuple[int, bytes]] = []
    placed: dict[int, int] = {}
    size = CALL_BYTES * len(calls)

    def place(arg: bytes | Out | In) -> int:
        nonlocal size
        if (there := placed.get(id(arg))) is not None:
            return there
        content = b""
        if isinstance(arg, Out):
            content, room = arg.initial, arg.size_bytes
        else:
            content = arg if isinstance(arg, bytes) else b"".join(map(packed, arg.parts))
            room = len(content)
        at = -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        size = at + room
        if content:
            contents.append((at, content))
        if isinstance(arg, Out):
            outs.append((at, arg))
        if not isinstance(arg, bytes):  # the kernel may write into what it is given: each call has its own
            placed[id(arg)] = base + at
        return base + at

    def packed(part: Argument) -> bytes:
        if isinstance(part, bytes):
            return part
        return struct.pack("<Q", part & _MASK if isinstance(part, int) else place(part))

    table: list[int] = []
    for call in calls:
        args = call.args
        if len(args) > 6:
            raise ValueError(f"a system call takes six arguments, not {len(args)}")
        table.append(call.number)
        for arg in args:
            table.append(arg & _MASK if isinstance(arg, int) else place(arg))  # noqa: PERF401 (half as long again)
        table += _ZEROS[len(args) :]
    image = bytearray(size)
    struct.pack_into(f"<{len(table)}Q", image, 0, *table)
    for at, content in contents:
        image[at : at + len(content)] = content
    return Layout(bytes(image), outs)


def take_results(calls: Sequence[Call], layout: Layout, image: bytes) -> None:
    """Fill in results and `Out` data from the memory image read back after the run."""
    for call, (result,) in zip(
        calls, _RESULT.iter_unpack(memoryview(image)[: CALL_BYTES * len(calls)]), strict=True
    ):
        call.result = result
    for offset, out in layout.outs:
        out.data = image[offset : offset + out.size_bytes]
