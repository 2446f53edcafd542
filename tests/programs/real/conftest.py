"""The two hosts between which real programs move, made once for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.harness.hosts import Host
from tests.harness.tree import Workshop
from tests.programs.real.tree import RealTree, Stage

#: a host has terminals of its own: their numbers are exact
_TERMINALS = (
    "mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts"
    " && mount --bind /dev/pts/ptmx /dev/ptmx"
)


@pytest.fixture(scope="session")
def stage(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    secret = tmp_path_factory.mktemp("secret") / "secret"
    secret.write_text("a secret that is long enough for both sides\n")
    secret.chmod(0o600)
    # what a program has in /dev/shm is on both hosts, and goes with them
    shared = tempfile.mkdtemp(prefix="pipeline-tests-", dir="/dev/shm")
    os.chmod(shared, 0o1777)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, shared)
        hosts: list[Host] = []
        for _ in range(2):
            hosts.append(Host())
            stack.callback(hosts[-1].close)
            done = hosts[-1].run("sh", "-ec", f"{_TERMINALS}; mount --bind {shared} /dev/shm")
            assert done.returncode == 0, done.stderr
        yield Stage(workshop, hosts[0], hosts[1], secret)


@pytest.fixture
def launch(stage: Stage, nothing_left_behind: None) -> Iterator[Callable[..., RealTree]]:
    """`Stage.start`; whatever is left of a program is killed at the end."""
    with ExitStack() as stack:

        def launch(*args: object, **kwargs: object) -> RealTree:
            tree = stage.start(*args, **kwargs)  # type: ignore[arg-type]
            stack.callback(tree.kill)
            return tree

        yield launch
