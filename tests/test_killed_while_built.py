"""A tree of which somebody kills a part while it is built, or when it is about to run: the kernel, for want of memory.

Nothing of it is left, it is said, and who served it goes on. Its source runs on unless it has ended its tree by then.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import blocking
from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.stages import finish
from tests.harness.hosts import Host, Server, inner_pid, serving, terminate
from tests.harness.killing import MISTAKE, PARTS, killed
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, dump, reap, restore, said

pytestmark = pytest.mark.root

_WHY = {
    "fill": r"its pages cannot be written: No such process|was killed while it was built",
    "complete": "was killed while it was built",
    "thaw": "was ended when it was about to run",
}


@pytest.mark.parametrize("options", [{}, {"lazy": True}, {"new_pidns": True}], ids=["whole", "lazy", "pidns"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("step", _WHY)
def test_a_restore(
    start: Callable[..., Tree], tmp_path: Path, step: str, part: str, options: dict[str, bool]
) -> None:
    tree = start("processes", DEPTH_1)
    family = tree.pids()
    dump(tree, tmp_path / "image")
    with killed(step, part), pytest.raises(RebuildError, match=_WHY[step]):
        blocking.restore(str(tmp_path / "image"), detach=True, **options)
    assert not reap(family)
    assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")]
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.parametrize("threads", [0, 3], ids=["another", "itself"])
def test_who_runs_may_end_others(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """As a supervisor does whose time was over when it was dumped, some moments before its children run.

    Or a thread, which may be the first of all that run, ends its process.
    """
    tree = start("crowd", DEPTH_1, [str(threads), "3"])
    root, *others = family = tree.pids()
    dump(tree, tmp_path / "image")
    assert not reap(family)
    victim = root if threads else others[0]
    detach, freed = ptrace.detach, []

    def detached(tid: int) -> None:
        detach(tid)
        freed.append(tid)
        if len(freed) == 1:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(ptrace, "detach", detached)
    blocking.restore(str(tmp_path / "image"), detach=True).close()
    assert procfs.stat(HostPid(victim)).state == "Z"
    statuses = [procfs.status(HostPid(pid)) for pid in family if pid != victim]
    assert not any(status.state in "ZX" or status.tracer_pid for status in statuses)
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    assert not reap(family)


def test_who_was_to_end_is_not_blamed(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zombies of the tree are dead by then."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    tree = start("processes", DEPTH_1)
    family = tree.pids()
    dump(tree, tmp_path / "image")
    monkeypatch.setattr(finish, "put_on", full)
    with pytest.raises(RebuildError, match=r"a step of the rebuild failed: .*no room"):
        blocking.restore(str(tmp_path / "image"), detach=True)
    assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")]


def _goes_on(server: Server, source: Host, destination: Host, tree: Tree, *options: str) -> None:
    """The tree can be moved to a destination by the same `serve`."""
    assert server.process.poll() is None
    root, family = inner_pid(tree.pid), tree.pids()
    done = source.engine("migrate", "--pid", str(root), *options)
    assert done.returncode == 0, said(done)
    assert not reap(family)
    tree.pid = destination.outer_pid(root)
    tree.check()


@pytest.mark.parametrize("mode", ["stop", "precopy", "postcopy"])
@pytest.mark.parametrize("part", ["first", "last"])
def test_a_migration_that_is_decided(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], part: str, mode: str
) -> None:
    source, destination = hosts
    lost = start_on(source, "processes", DEPTH_1)
    family = lost.pids()
    with serving(destination, secret, tool=("tests.harness.killing", "thaw", part)) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        done = source.engine("migrate", "--pid", str(inner_pid(lost.pid)), *options)
        assert done.returncode == 4, said(done)
        assert "the tree is ended here, and does not run there" in done.stderr
        assert _WHY["thaw"] in done.stderr
        assert not reap(family)
        _goes_on(server, source, destination, start_on(source, "threads", DEPTH_1), *options)


@pytest.mark.parametrize(
    ("mode", "step", "program"),
    [
        ("stop", "complete", "processes"),
        ("precopy", "equip_early", "processes"),
        ("precopy", "complete", "relays"),
        ("hybrid", "change", "relays"),
        ("postcopy", "complete", "processes"),
    ],
)
@pytest.mark.parametrize("part", ["first", "last"])
def test_a_migration_that_is_not(
    hosts: tuple[Host, Host],
    secret: Path,
    start_on: Callable[..., Tree],
    part: str,
    mode: str,
    step: str,
    program: str,
) -> None:
    source, destination = hosts
    tree = start_on(source, program, DEPTH_1)
    with serving(destination, secret, tool=("tests.harness.killing", step, part)) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", mode)
        done = source.engine("migrate", "--pid", str(inner_pid(tree.pid)), *options)
        assert done.returncode == 1, said(done)
        assert re.search(_WHY["fill"], done.stderr)
        _goes_on(server, source, destination, tree, *options)


@pytest.mark.parametrize("part", ["first", "last"])
def test_a_draft_that_is_not_is_sent_anew(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], part: str
) -> None:
    """The tree runs on meanwhile; nothing is left of what was half built."""
    source, destination = hosts
    tree = start_on(source, "relays", DEPTH_1)
    root, family = inner_pid(tree.pid), tree.pids()
    with serving(destination, secret, tool=("tests.harness.killing", "make_threads", part)) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--mode", "precopy")
        done = source.engine("migrate", "--pid", str(root), *options)
        assert done.returncode == 0, said(done)
        assert re.search(f"sent anew: .*({_WHY['fill']})", done.stderr)
    assert not reap(family)
    tree.pid = destination.outer_pid(root)
    tree.check()


@pytest.mark.parametrize(("step", "code"), [("complete", 1), ("thaw", 4)])
def test_a_mistake_of_ours_ends_no_server(
    hosts: tuple[Host, Host], secret: Path, start_on: Callable[..., Tree], step: str, code: int
) -> None:
    """It is told as such, on both sides."""
    source, destination = hosts
    tree = start_on(source, "threads", DEPTH_1)
    family = tree.pids()
    with serving(destination, secret, tool=("tests.harness.killing", step, "nothing")) as server:
        options = ("--to", server.address, "--secret-file", str(secret))
        done = source.engine("migrate", "--pid", str(inner_pid(tree.pid)), *options)
        assert done.returncode == code, said(done)
        assert "an error of `serve`" in done.stderr
        assert MISTAKE in done.stderr
        if code == 4:
            assert not reap(family)
            tree = start_on(source, "threads", DEPTH_1)
        _goes_on(server, source, destination, tree, *options)
        _, err = terminate(server.process)
        assert "Traceback" in err
