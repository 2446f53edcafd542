"""Time namespaces: CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree go on where they stood.

A time namespace is two offsets to the clocks of the host, set once, before anything enters it.
Kept is not the offset but what the clocks *say* inside when the tree is captured: the
destination, whose own clocks say something else, sets the offsets with which they go on from
there. The time between the dump and the rebuild is not seen by these clocks; it is by
CLOCK_REALTIME, which belongs to no namespace.

A tree that shares the time namespace of its surroundings gets one made around it where these clocks would jump
(`pipeline.resources.namespaces.clocks_here`).

unshare(2) makes a time namespace for the *children* of its caller and leaves the caller where it
is. setns(2) moves both. So a process whose children are in another time namespace than itself
can only be made by letting it unshare again: the plan says when (`BeginTime`).

Sources: time_namespaces(7); kernel/time/namespace.c (timens_install, proc_timens_set_offset).
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import suppress
from typing import Annotated

import msgpack
from msgspec import Meta

from pipeline.errors import RebuildError
from pipeline.image.schema import Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support
from pipeline.userns.visit import Way, visit

SUPPORT = Support(
    "time",
    carried=(
        "clocks that go on from what they said; one for children only",
        "of a tree in its surroundings': CLOCK_MONOTONIC and BOOTTIME, by one made around it (--clocks)",
    ),
    refused=("children that would be born on the wrong side of one",),
    shown_by=("programs/clocks.py", "test_clocks.py"),
)

_OFFSETS = "/proc/self/timens_offsets"
_NS_IN_S = 1_000_000_000
_CLOCKS = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}

#: the kernel stops clocks short of half of what ktime_t holds
Clock = Annotated[int, Meta(ge=0, le=(1 << 62) - 1)]


class TimeState(Record, frozen=True, kw_only=True):
    """What the clocks said inside, in nanoseconds, when the tree was captured."""

    monotonic: Clock
    boottime: Clock


def capture(way: Way) -> TimeState:
    """The clocks, as a visitor reads them. A visitor that has joined a time namespace has one thread.

    Args:
        way: ends with the time namespace.
    """

    def look() -> bytes:
        packed: bytes = msgpack.packb([time.clock_gettime_ns(clock) for clock in _CLOCKS.values()])
        return packed

    monotonic, boottime = msgpack.unpackb(visit(way, look, alone=True))
    return TimeState(monotonic=monotonic, boottime=boottime)


def begin(state: TimeState, puppet: Puppet) -> dict[str, int]:
    """Let `puppet` make the namespace, for its children, with clocks that go on from `state`.

    Args:
        puppet: has CAP_SYS_ADMIN and CAP_SYS_TIME in its user namespace, which will own the new one.

    Returns:
        By how many nanoseconds its clocks are ahead of our own, by name.

    Raises:
        OSError: EPERM: a capability is missing.
        RebuildError: the clocks of this host cannot be set off that far.
    """
    puppet.syscall(NR.unshare, CLONE.NEWTIME)
    ours = own_offsets_ns()
    lines, ahead = [], {}
    for name, clock in _CLOCKS.items():
        ahead[name] = getattr(state, name) - time.clock_gettime_ns(clock)
        offset = ahead[name] + ours[name]
        lines.append(b"%s %d %d\n" % (name.encode(), offset // _NS_IN_S, offset % _NS_IN_S))
    fd = puppet.syscall(NR.openat, -100, _OFFSETS.encode() + b"\0", os.O_WRONLY | os.O_CLOEXEC, 0)
    text = b"".join(lines)
    try:
        puppet.syscall(NR.write, fd, text, len(text))
    except OSError as error:
        raise RebuildError(f"the clocks of a time namespace cannot be set off: {error}") from error
    finally:
        puppet.syscall(NR.close, fd)
    return ahead


@functools.cache
def boot_id() -> str:
    """Which boot of which host this is; empty where it is hidden, as from some containers."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip().decode()
    return ""


def own_offsets_ns() -> dict[str, int]:
    """How far our own clocks are off the host's: offsets are always said to the host's."""
    found = dict.fromkeys(_CLOCKS, 0)
    with (
        suppress(FileNotFoundError),
        open(_OFFSETS, "rb") as file,
    ):  # a kernel without time namespaces
        for line in file:
            name, seconds, nanoseconds = line.split()
            found[name.decode()] = int(seconds) * _NS_IN_S + int(nanoseconds)
    return found
