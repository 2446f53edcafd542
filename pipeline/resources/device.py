"""Character devices that have no state: null, zero, full, random, urandom, kmsg for writing, loop-control.

The kernel holds a device number and flags; reads and writes leave nothing behind (what
was written into the random pools stays the host's). Kept: which device, by number, and
its name. At the destination the node of that name is opened if it is that device;
where it is missing or may not be opened (a mount with ``nodev``) the host's own node
does as well, since all nodes of one number are the same device.

Terminals are in `pipeline.resources.pty`; every other device is refused.
Source: null(4), random(4), the kernel's devices.txt.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import U32, OpenFile, PathRef, Record
from pipeline.resources import locks
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.paths import describe, reopen
from pipeline.resources.steps import CompleteOnceCreated

#: device number -> name under /dev
_STATELESS = {
    (1, 3): "null",
    (1, 5): "zero",
    (1, 7): "full",
    (1, 8): "random",
    (1, 9): "urandom",
    (1, 11): "kmsg",
    (10, 237): "loop-control",
}
#: who reads it has a place in it
_FOR_WRITING_ONLY = (1, 11)


class DeviceState(Record, frozen=True, kw_only=True):
    """Which device: `major` and `minor`."""

    path: PathRef
    minor: U32
    major: U32 = 1


def _number(found: os.stat_result) -> tuple[int, int] | None:
    """The number of a device without state; None for every other file."""
    number = os.major(found.st_rdev), os.minor(found.st_rdev)
    return number if stat.S_ISCHR(found.st_mode) and number in _STATELESS else None


def _is_stateless(number: tuple[int, int], flags: int) -> bool:
    """Whether a device of this number that is open with these flags has no state."""
    return number in _STATELESS and (number != _FOR_WRITING_ONLY or flags & os.O_ACCMODE == os.O_WRONLY)


class Device(CompleteOnceCreated):
    """See the module."""

    name = "device"
    record: type[DeviceState] = DeviceState
    carried: Sequence[str] = (
        "/dev/null, zero, full, random, urandom, loop-control, kmsg for writing, by whatever name",
    )
    refused: Sequence[str] = ("every other device but terminals",)
    shown_by: Sequence[str] = ("programs/files.py", "resources/test_places.py")

    def matches(self, view: FdView) -> bool:
        """By device number."""
        number = _number(view.stat)
        return number is not None and not view.flags & os.O_PATH and _is_stateless(number, view.flags)

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Locks on a device are not carried."""
        yield from locks.check(view, scope, carried=False)

    def capture(self, view: FdView, scope: CaptureScope) -> DeviceState:
        """Its name and number."""
        return DeviceState(
            path=scope.path(view.namer, view.link),
            major=os.major(view.stat.st_rdev),
            minor=os.minor(view.stat.st_rdev),
        )

    def create(self, file: OpenFile, record: DeviceState, scope: CreateScope) -> LocalFd:
        """Open the node of that name, or the host's.

        Raises:
            RebuildError: it is none without state, or not even the host's node can be opened.
        """
        if not _is_stateless((record.major, record.minor), file.flags):
            raise RebuildError(
                f"{describe(file, record.path)}: device {record.major}:{record.minor} is not one without state"
            )
        try:
            fd = reopen(file, record.path, file.flags, scope)
        except RebuildError:
            return self._own(file, record)
        if _number(os.fstat(fd)) == (record.major, record.minor):
            return fd
        os.close(fd)
        return self._own(file, record)

    def _own(self, file: OpenFile, record: DeviceState) -> LocalFd:
        number = record.major, record.minor
        name = _STATELESS[number]
        try:
            fd = LocalFd(os.open(f"/dev/{name}", file.flags & os.O_ACCMODE | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise RebuildError(f"{describe(file, record.path)} cannot be opened: {error.strerror}") from error
        if _number(os.fstat(fd)) != number:
            os.close(fd)
            raise RebuildError(f"{describe(file, record.path)}: /dev/{name} is another device here")
        return fd


KIND = Device()
