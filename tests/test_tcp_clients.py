"""Connections between a tree and clients outside: they go on through everything that happens to the tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import pipeline
from pipeline.ledger import LEDGER
from tests.harness.hosts import Host, terminate
from tests.harness.networks import THEIRS, THEIRS_6, bridged_network, engine_in, plug, shell, start_in, within
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.talkers import talkers
from tests.harness.tree import ROOT, Tree, Workshop, reap, said
from tests.test_faults import moments, run_cancelled

pytestmark = pytest.mark.root

CLIENTS = [THEIRS, THEIRS_6] * 4


@pytest.fixture
def around() -> Iterator[str]:
    with bridged_network() as path:
        yield path


def no_locks(tree: Tree) -> None:
    inside = f"/proc/{tree.pids()[-1]}/ns/net"
    assert shell(inside, "nft list tables") == ""


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_clients_outside_stay_connected(
    start: Callable[..., Tree], around: str, tmp_path: Path, setting: Setting
) -> None:
    tree = start_in(around, start, "talking", setting)
    plug(around, tree)
    with talkers(around, CLIENTS) as clients:
        done = engine_in(
            around, "dump", "--pid", str(tree.pid), "--to", tmp_path / "running", "--leave-running"
        )
        assert done.returncode == 0, said(done)
        clients.go_on()
        no_locks(tree)
        family = tree.pids()
        done = engine_in(around, "dump", "--pid", str(tree.pid), "--to", tmp_path / "image")
        assert done.returncode == 0, said(done)
        assert not reap(family)
        time.sleep(0.3)
        options = ["--detach", "--external", "veth:eth0=out2@br0"]
        done = engine_in(around, "restore", "--from", tmp_path / "image", *options)
        assert done.returncode == 0, said(done)
        assert "note" not in done.stderr, done.stderr
        clients.go_on()
        no_locks(tree)
    tree.check()
    assert tree.end() == 0


@pytest.mark.parametrize("setting", [DEPTH_1], ids=lambda s: s.name)
def test_clients_outside_stay_connected_through_a_migration(
    workshop: Workshop, around: str, tmp_path: Path, setting: Setting
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("between the two of us, and long enough")
    secret.chmod(0o600)
    engine = [sys.executable, "-m", "pipeline"]
    there = ["nsenter", f"--net={around}"]
    with ExitStack() as stack:
        source, destination = (Host() for _ in range(2))
        for host in (source, destination):
            stack.callback(host.close)
        tree = within(around, lambda: source.start(workshop, "talking", setting, 20_000))
        stack.callback(tree.kill)
        plug(around, tree, "source1")
        with talkers(around, CLIENTS) as clients:
            serve = [*engine, "serve", "--listen", "127.0.0.1:0", "--once", "--secret-file", secret]
            server = subprocess.Popen(
                [*there, *destination.command(*serve, "--external", "veth:eth0=new1@br0")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(terminate, server)
            assert server.stdout is not None
            to = server.stdout.readline().split()[-1]
            family = tree.pids()
            options = ["--pid", "20000", "--to", to, "--secret-file", str(secret)]
            done = subprocess.run(
                [*there, *source.command(*engine, "migrate", *options)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, said(done) + str(terminate(server))
            assert "note" not in done.stderr, done.stderr
            _, err = server.communicate(timeout=20)
            assert "note" not in err, err
            assert not reap(family)
            tree.pid = destination.outer_pid(20_000)
            clients.go_on()
        tree.check()


def test_a_dump_cancelled_anywhere_lets_clients_go_on(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    tree = start_in(around, start, "talking", DEPTH_1)
    plug(around, tree)
    image = tmp_path / "image"

    async def recipe() -> None:
        await pipeline.dump(tree.pid, str(image), leave="running", externals={"net": around})

    with talkers(around, CLIENTS) as clients:
        steps, _ = run_cancelled(recipe, None)
        for step in moments(steps)[::2]:
            subprocess.run(["rm", "-rf", str(image)], check=True)
            run_cancelled(recipe, step)
            assert not LEDGER.held(), f"after a cancel at step {step} of {steps}"
            no_locks(tree)
            clients.go_on()
    tree.check()


def test_a_dump_killed_at_random_lets_clients_go_on(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    tree = start_in(around, start, "talking", DEPTH_1)
    plug(around, tree)
    command = ["nsenter", f"--net={around}", sys.executable, "-m", "pipeline", "dump", "--pid", str(tree.pid)]
    with talkers(around, CLIENTS) as clients:
        begin = time.monotonic()
        subprocess.run(
            [*command, "--to", tmp_path / "whole", "--leave-running"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        whole = time.monotonic() - begin
        for n in range(8):
            dumper = subprocess.Popen(
                [*command, "--to", tmp_path / f"image{n}", "--leave-running"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(whole * (0.5 + n / 16))
            os.kill(dumper.pid, signal.SIGKILL)
            dumper.wait()
            clients.go_on()
            no_locks(tree)
    tree.check()
