"""Acting with other ids than the pipeline's, where the kernel remembers who did something.

Ids belong to a thread: a throw-away one takes on others, acts, and ends.

Source: setresuid(2), credentials(7); kernel/cred.c on what makes a process undumpable.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import PRCTL, prctl, syscall

T = TypeVar("T")
UNCHANGED = 0xFFFF_FFFF


def in_thread(act: Callable[[], T]) -> T:
    """Run `act` in a thread of its own and return or raise what it did."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def in_changed_thread(act: Callable[[], T]) -> T:
    """`in_thread`, for what changes ids: that makes the whole process undumpable, which is undone."""
    dumpable = prctl(PRCTL.GET_DUMPABLE)
    try:
        return in_thread(act)
    finally:
        prctl(PRCTL.SET_DUMPABLE, dumpable)


def acting_as(
    act: Callable[[], T],
    *,
    uid: int = UNCHANGED,
    euid: int,
    egid: int = UNCHANGED,
    groups: Sequence[int] | None = None,
) -> T:
    """Run `act` with other ids, as numbers of the pipeline's user namespace; `groups`: None to keep those it has.

    Where this process may not take on those ids it runs as it is.
    """

    def change_and_act() -> T:
        if groups is not None:
            with suppress(PermissionError):
                syscall(NR.setgroups, len(groups), struct.pack(f"<{len(groups)}I", *groups))
        with suppress(PermissionError):
            syscall(NR.setresgid, UNCHANGED, egid, UNCHANGED)
            syscall(NR.setresuid, uid, euid, UNCHANGED)
        return act()

    return in_changed_thread(change_and_act)
