"""A tree in a network that somebody else keeps: external at the dump, another one takes its place at the restore."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.networks import network, start_in
from tests.harness.settings import DEPTH_0, DEPTH_1, Setting
from tests.harness.tree import Tree, engine, reap, said

pytestmark = pytest.mark.root


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1], ids=lambda s: s.name)
def test_a_network_of_others_is_given_on_both_sides(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    with ExitStack() as stack:
        here, there = (stack.enter_context(network()) for _ in range(2))
        tree = start_in(here, start, "sockets", setting)
        tree.check()
        family = tree.pids()
        image, pidfile = tmp_path / "image", tmp_path / "pid"
        done = engine("dump", "--pid", str(tree.pid), "--to", image, "--external", f"net={here}")
        assert done.returncode == 0, said(done)
        assert not reap(family)
        options = ["--detach", "--pidfile", pidfile, "--external", f"net={there}"]
        done = engine("restore", "--from", image, *options)
        assert done.returncode == 0, said(done)
        for pid in tree.pids():
            assert os.path.samefile(f"/proc/{pid}/ns/net", there)
        tree.check()
        tree.end()


def test_what_is_no_namespace_is_said(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet")
    for external, words in (
        ("net", "say KIND=PATH"),
        ("mnt=/proc/self/ns/mnt", "say KIND=PATH"),
        ("net=/proc/self/ns/uts", "no net namespace"),
        ("net=/dev/null", "net=/dev/null"),
        ("net=/nowhere", "No such file"),
    ):
        done = engine("dump", "--pid", str(tree.pid), "--to", tmp_path / "image", "--external", external)
        assert done.returncode == 2, said(done)
        assert words in done.stderr
    tree.check()
