"""A tree that is looked at while it runs, and changes."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import Blocker, PipelineError, Refused, TargetError
from pipeline.ids import HostPid
from pipeline.resources.memory import capture
from pipeline.stages import examine, freeze
from pipeline.stages.capture import Capture
from pipeline.stages.freeze import FrozenTree
from tests.harness.tree import Tree


@pytest.mark.parametrize(("denied", "blockers"), [(0, 0), (1, 0), (3, 0), (99, 1)])
def test_a_number_that_is_somebody_elses_by_now_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, denied: int, blockers: int
) -> None:
    looks = iter(range(200))

    def look(_pid: int, *_: object) -> Iterator[Blocker]:
        if next(looks) < denied:
            raise PermissionError(13, "Permission denied", "/proc/8883/ns/user")
        yield from ()

    monkeypatch.setattr(examine, "_look", look)
    found = examine.early_blockers(os.getpid())
    assert len(found) == blockers
    assert all("/proc/8883/ns/user" in blocker.reason for blocker in found)


@pytest.mark.root
@pytest.mark.parametrize(
    "error",
    [TargetError("pid 7 does not stop"), Refused([Blocker("pid 7", "does not stop")])],
    ids=["long", "at once"],
)
def test_of_a_tree_that_cannot_be_stopped_what_shows_is_told_with_that(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, error: PipelineError
) -> None:
    tree = start("quiet")
    shown = Blocker("pid 7", "shows while it runs")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Capture, "blockers_besides_files", lambda _: [shown])
    monkeypatch.setattr(freeze, "freeze", fails)
    found = examine.tree_blockers(tree.pid)
    assert found[0] == shown
    assert "pid 7 does not stop" in f"{found[1].subject} {found[1].reason}"
    assert len(found) == 2


def _hinders_stop(reason: str) -> Blocker:
    return Blocker("pid 7", reason, transient=True, hinders_stop=True)


_FROZEN = _hinders_stop("its cgroup is frozen")
_VFORKS = [_hinders_stop(f"waits for its vfork child, pid {child}") for child in (8, 9)]
_SEGMENT = Blocker("pid 7", "its segment is attached once more", transient=True)


@pytest.mark.root
@pytest.mark.parametrize(
    "looks",
    [[[_FROZEN], [_FROZEN], []], [[_VFORKS[0]], [_VFORKS[1]]], [[_SEGMENT]]],
    ids=["it lasts", "one behind the other", "it hinders nobody"],
)
def test_a_tree_is_not_stopped_as_long_as_something_lasts_that_hinders_that(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, looks: list[list[Blocker]]
) -> None:
    """A program that vforks all the time does so at each look."""
    tree = start("quiet")
    looks = list(looks)
    monkeypatch.setattr(Capture, "blockers_besides_files", lambda _: looks.pop(0))
    stopped: list[int] = []
    stops = freeze.freeze

    def counted(root: HostPid, suspend_seccomp: bool) -> FrozenTree:
        stopped.append(len(looks))
        return stops(root, suspend_seccomp)

    monkeypatch.setattr(freeze, "freeze", counted)
    assert examine.tree_blockers(tree.pid) == []
    assert stopped == [0]
    tree.check()


@pytest.mark.root
def test_who_is_killed_while_it_is_looked_at_is_named(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = start("quiet")

    def blockers(capture: Capture) -> Iterator[Blocker]:
        os.kill(tree.pid, signal.SIGKILL)
        while not freeze.leaders.has_ended(HostPid(tree.pid)):
            time.sleep(0.001)
        raise ProcessLookupError(3, "No such process")
        yield from ()

    monkeypatch.setattr(Capture, "blockers", blockers)
    found = examine._look_at_stopped(tree.pid, None, None, [])
    assert [(one.subject, one.reason) for one in found] == [
        (f"pid {tree.pid}", "was killed while it was looked at")
    ]


@pytest.mark.root
def test_a_mapping_that_is_gone_when_it_is_looked_at_is_in_no_way(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that maps and unmaps all the time does that whenever it is looked at."""
    tree = start("quiet")

    def is_gone(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(capture, "_backing", is_gone)
    assert examine.early_blockers(tree.pid) == []
    assert examine.tree_blockers(tree.pid) == []
