"""A tree of which somebody kills a process while it stands still, as the kernel does for want of memory.

Whoever looks at it looks again; when its pages are read it is too late for that. What is left of it runs on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import pipeline
from pipeline import blocking
from pipeline.errors import TargetError
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.stages import freeze
from tests.harness.hosts import Host, inner_pid, serving
from tests.harness.killing import killed
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, reap, said

pytestmark = pytest.mark.root


@pytest.fixture
def family(start: Callable[..., Tree]) -> Iterator[list[HostPid]]:
    """A tree of several processes that only sleep."""
    tree = start("processes", DEPTH_1)
    pids = [HostPid(pid) for pid in tree.pids()]
    yield pids
    for pid in pids:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, 9)


def _running(pids: Sequence[HostPid]) -> list[HostPid]:
    return [pid for pid in pids if not procfs.is_exiting(pid) and procfs.stat(pid).state in "SR"]


@pytest.mark.parametrize("step", ["look", "seen"])
@pytest.mark.parametrize(("mode", "time_of_it"), [("stop", 1), ("precopy", 1), ("precopy", 2)])
def test_who_is_looked_at(
    family: list[HostPid], tmp_path: Path, mode: pipeline.Mode, time_of_it: int, step: str
) -> None:
    """Also where the look at it was over, and nothing has failed."""
    before = _running(family)
    with killed(step, "last", time_of_it):
        done = blocking.dump(family[0], str(tmp_path / "image"), leave="running", mode=mode)
    assert done.processes == len(family)
    assert len(_running(family)) == len(before) - 1
    restored = blocking.restore(str(tmp_path / "image"), detach=True, new_pidns=True)
    try:
        again = [HostPid(pid) for pid in freeze.walk(HostPid(restored.root_pid))]
        assert (len(again), len(_running(again))) == (len(family), len(before) - 1)
    finally:
        restored.send_signal(signal.SIGKILL)
        restored.wait()
        restored.close()


@pytest.mark.parametrize(("mode", "time_of_it"), [("stop", 1), ("precopy", 2)])
@pytest.mark.parametrize("leave", ["end", "running"])
def test_whose_pages_are_read(
    family: list[HostPid], tmp_path: Path, mode: pipeline.Mode, time_of_it: int, leave: pipeline.Leave
) -> None:
    before = _running(family)
    with (
        killed("read", "last", time_of_it),
        pytest.raises(TargetError, match=r"was killed while|was a process of it killed"),
    ):
        blocking.dump(family[0], str(tmp_path / "image"), leave=leave, mode=mode)
    assert not (tmp_path / "image" / "manifest").exists()
    assert len(_running(family)) == len(before) - 1


def test_who_is_tracked(family: list[HostPid], tmp_path: Path) -> None:
    """It is dumped in one stop."""
    with killed("read", "last"):
        done = blocking.dump(family[0], str(tmp_path / "image"), leave="running", mode="precopy")
    assert [note for note in done.notes if "was killed while it stood still" in note]
    assert done.processes == len(family)


@pytest.mark.parametrize("mode", ["stop", "precopy", "postcopy"])
def test_who_is_moved(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], mode: str
) -> None:
    source, destination = hosts
    tree = start_on(source, "processes", DEPTH_1)
    root, pids = inner_pid(tree.pid), [HostPid(pid) for pid in tree.pids()]
    before = _running(pids)
    with serving(destination, secret) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        tool = (sys.executable, "-m", "tests.harness.killing", "look", "last")
        done = source.run(*tool, "migrate", "--pid", str(root), *options)
        assert done.returncode == 0, said(done)
        assert not reap(pids)
        tree.pid = destination.outer_pid(root)
        assert len(_running(freeze.walk(HostPid(tree.pid)))) == len(before) - 1
