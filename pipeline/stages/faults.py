"""Which page faults a stopped tree answers itself, and what of that stops it from being carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import Blocker
from pipeline.ids import HostPid, LocalFd
from pipeline.resources.kinds import FdView
from pipeline.resources.memory.answering import Answered, Answerer, look
from pipeline.resources.memory.scope import CannotCarry
from pipeline.stages.ahead import MappingsAhead
from pipeline.stages.asking import inside


def answered(
    views: Sequence[FdView], memories: Mapping[HostPid, Sequence[HostPid]], mappings: MappingsAhead
) -> tuple[dict[LocalFd, Answered], list[Blocker]]:
    """What the userfaultfds of a tree answer for, by our duplicates of them.

    Args:
        views: the userfaultfds.
        memories: the processes, one for each memory, by the thread that each is looked at by; their threads.
        mappings: of them, with flags.
    """
    try:
        found = look(
            [Answerer(view.local, view.pid) for view in views],
            list(memories),
            lambda pid: inside(pid, sorted(memories[pid], key=lambda tid: tid != pid)),
            mappings.of,
        )
    except OSError as error:
        why = f"it cannot be asked which page faults it answers: {error.strerror}"
        return {}, [Blocker(views[0].subject, why, "free memory")]
    pairs = list(zip(views, found, strict=True))
    return (
        {view.local: one for view, one in pairs if isinstance(one, Answered)},
        [one.blocker(view.subject) for view, one in pairs if isinstance(one, CannotCarry)],
    )
