"""The two hosts between which real programs move, made once for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.hosts import two_hosts
from tests.harness.tree import Workshop
from tests.programs.real.tree import RealTree, Stage

#: a host has terminals of its own: their numbers are exact
_TERMINALS = (
    "mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts"
    " && mount --bind /dev/pts/ptmx /dev/ptmx"
)


@pytest.fixture(scope="session")
def stage(workshop: Workshop, secret: Path) -> Iterator[Stage]:
    # what a program has in /dev/shm is on both hosts, and goes with them
    shared = tempfile.mkdtemp(prefix="pipeline-tests-", dir="/dev/shm")
    os.chmod(shared, 0o1777)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, shared)
        hosts = stack.enter_context(two_hosts())
        for host in hosts:
            done = host.run("sh", "-ec", f"{_TERMINALS}; mount --bind {shared} /dev/shm")
            assert done.returncode == 0, done.stderr
        yield Stage(workshop, *hosts, secret)


@pytest.fixture
def launch(stage: Stage, nothing_left_behind: None) -> Iterator[Callable[..., RealTree]]:
    """`Stage.start`; whatever is left of a program is killed at the end."""
    with ExitStack() as stack:

        def launch(*args: object, **kwargs: object) -> RealTree:
            tree = stage.start(*args, **kwargs)  # type: ignore[arg-type]
            stack.callback(tree.kill)
            return tree

        yield launch
