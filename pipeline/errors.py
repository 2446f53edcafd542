"""Every error a command can end with, and the exit code each one carries.

One small tree: what the user asked, what the peer did, what the kernel refused,
what the target is. A message says what happened, to which pid, descriptor,
mapping or map line, and what to do about it. `OSError` stays raw in
`pipeline.kernel` and is translated once, where the resource is known.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class PipelineError(Exception):
    """Base of all: the work failed, and the source runs as before (exit code 1)."""

    exit_code = 1


class UsageError(PipelineError):
    """The command or the call was wrong (exit code 2)."""

    exit_code = 2


#: so many mappings, or processes, are told of which the same is to be said
_ALIKE = 3


@dataclass(frozen=True, slots=True, order=True)
class Blocker:
    """One reason why a tree cannot be carried.

    Args:
        subject: what it is about: ``pid 12``, ``pid 12 fd 7``, ``pid 12 mapping 7f..-7f..``.
        reason: the kernel's fact.
        remedy: what the user can do; may be empty.
        transient: true where waiting a moment may remove it (a connection in flight).
        hinders_stop: true where the tree may not come to stand still as long as it lasts (a frozen cgroup).
    """

    subject: str
    reason: str
    remedy: str = ""
    transient: bool = False
    hinders_stop: bool = False

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


class Refused(PipelineError):
    """Refused before anything was touched (exit code 3). `blockers`: all; of those alike the text has some."""

    exit_code = 3

    def __init__(self, blockers: Iterable[Blocker]) -> None:
        self.blockers = tuple(sorted(set(blockers)))
        super().__init__("\n  ".join(["refused:", *_told(self.blockers)]))


def _told(blockers: Iterable[Blocker]) -> Iterator[str]:
    """A line for each; of what is alike for hundreds of processes or mappings, for the first ones."""
    alike: dict[tuple[str, str, str], list[Blocker]] = {}
    for blocker in blockers:
        alike.setdefault((_sort(blocker.subject), blocker.reason, blocker.remedy), []).append(blocker)
    for (sort, reason, _), group in alike.items():
        shown = group if len(group) <= _ALIKE + 1 else group[:_ALIKE]  # a line for one more can name it
        yield from map(str, shown)
        if more := len(group) - len(shown):
            yield f"and {more} more {sort}: {reason}"


def _sort(subject: str) -> str:
    """Of which there are many in a tree; another subject is one of its own."""
    if " mapping " in subject:
        return "mappings"
    return "processes" if re.fullmatch(r"pid \d+", subject) else subject


class InDoubt(PipelineError):
    """Which side may run the tree is not known here; the text says how to settle it (exit code 4)."""

    exit_code = 4


class TargetError(PipelineError):
    """The target changed or vanished under our hands; what is left of it runs on."""


class ImageError(PipelineError):
    """An image or stream is damaged, truncated, foreign or too new; the message says where."""


class LogError(PipelineError):
    """A log of events is damaged, foreign or too new; the message says in which line."""


class StorageError(PipelineError):
    """The place where an image is written to or read from failed."""


class PeerError(PipelineError):
    """The other side refused, lied, failed to prove itself or went away."""


class PeerRefused(PeerError):
    """The other side is well, and will not or cannot do it; its reason is in the text."""


class RebuildError(PipelineError):
    """The kernel refused a step of the rebuild; nothing of the half-built tree is left."""


class Exhausted(PipelineError):
    """This process or its host has run out of something; the text says of what, and how to get more."""


class ChildKilled(OSError):
    """A child that did something for this process was killed, mostly because no memory was left."""

    def __init__(self) -> None:
        super().__init__(0, "a child of this process was killed")

    def __str__(self) -> str:
        return str(self.strerror)


#: what there is only so much of, and what to do when it is at an end
_SCARCE = {
    errno.EMFILE: "this process has as many descriptors open as it may: raise `ulimit -n`",
    errno.ENFILE: "this host has as many files open as it may: raise the sysctl fs.file-max",
    errno.ENOMEM: "there is no memory left: free some",
    errno.EAGAIN: "no more processes or threads can be made: raise `ulimit -u`, or pids.max of the cgroup",
}
_NO_THREAD = "can't start new thread"


def exhausted(error: BaseException) -> Exhausted | None:
    """An error that says that something is at an end here, in words; None where it, or one of a group, does not.

    What a call in a task says (`pipeline.remote.calls.Call.check` names the error by its letters) is another matter: a
    limit of that task, mostly.
    """
    if isinstance(error, BaseExceptionGroup):
        told = [exhausted(one) for one in error.exceptions]
        return None if None in told else told[0]
    if isinstance(error, MemoryError):
        return Exhausted(_SCARCE[errno.ENOMEM])
    if isinstance(error, ChildKilled):
        return Exhausted(f"{error}: if there is no memory left (dmesg), free some")
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return Exhausted(_SCARCE[errno.EAGAIN])
    if isinstance(error, OSError) and error.errno in _SCARCE and not _is_of_a_task(error):
        return Exhausted(f"{_SCARCE[error.errno]} ({error})")
    return None


def _is_of_a_task(error: OSError) -> bool:
    return f"{errno.errorcode.get(error.errno or 0)}: " in str(error.strerror)


def raise_if_exhausted(error: OSError) -> None:
    """Raise an error again that is one of `exhausted`: with it nothing is known of what was looked at.

    Who makes a refusal of an error asks this first: it is not the tree that cannot be carried.
    """
    if exhausted(error):
        raise error


@contextmanager
def passed_over() -> Iterator[None]:
    """Pass over an OSError: what was asked for is not there, or not for us; but not over one of `exhausted`.

    With that it is not known whether it is there, and to go on would be to leave it out in silence.
    """
    try:
        yield
    except OSError as error:
        raise_if_exhausted(error)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Let an error that is alone in the exception group of a nursery come out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from None
