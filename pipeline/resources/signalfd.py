"""signalfd(2) descriptors.

The kernel holds nothing but a signal mask and flags: which signals are read depends on
the reader. Both are kept. Pending signals belong to the processes. Registrations with
epoll are made from inside (`pipeline.resources.epoll`), since they watch the signals of
the process that made them. Source: signalfd(2), fs/signalfd.c.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.ids import LocalFd
from pipeline.image.schema import U64, OpenFile, Record
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.steps import CompleteOnceCreated

_MASK_BYTES = 8


class SignalfdState(Record, frozen=True, kw_only=True):
    """`mask`: bit n-1 for signal n."""

    mask: U64


class Signalfd(CompleteOnceCreated):
    """See the module."""

    name = "signalfd"
    record: type[SignalfdState] = SignalfdState
    carried: Sequence[str] = ("mask, flags",)
    refused: Sequence[str] = ()
    shown_by: Sequence[str] = (
        "programs/anonymous.py",
        "resources/test_anonymous.py",
    )

    def matches(self, view: FdView) -> bool:
        """By link."""
        return view.link == b"anon_inode:[signalfd]"

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Nothing stops it: what it reads are the reader's own signals."""
        yield from ()

    def capture(self, view: FdView, scope: CaptureScope) -> SignalfdState:
        """From fdinfo."""
        return SignalfdState(mask=int(view.info["sigmask"][0], 16))

    def create(self, file: OpenFile, record: SignalfdState, scope: CreateScope) -> LocalFd:
        """A new one with the same mask; O_CLOEXEC and O_NONBLOCK have the values that signalfd4 wants."""
        mask = record.mask.to_bytes(_MASK_BYTES, "little")
        return LocalFd(syscall(NR.signalfd4, -1, mask, _MASK_BYTES, os.O_CLOEXEC | os.O_NONBLOCK))


KIND = Signalfd()
