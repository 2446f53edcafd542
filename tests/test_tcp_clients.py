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
from tests.harness.hosts import serving, terminate, two_hosts
from tests.harness.leaks import sweep
from tests.harness.networks import (
    THEIRS,
    THEIRS_6,
    bridged_network,
    engine_in,
    network,
    plug,
    shell,
    start_in,
    within,
)
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.talkers import talkers
from tests.harness.tree import ROOT, Tree, Workshop, family_of, reap, said
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


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda s: s.name)
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
    workshop: Workshop, around: str, secret: Path, setting: Setting
) -> None:
    there = ["nsenter", f"--net={around}"]
    with ExitStack() as stack:
        source, destination = stack.enter_context(two_hosts())
        tree = within(around, lambda: source.start(workshop, "talking", setting, 20_000))
        stack.callback(tree.kill)
        plug(around, tree, "source1")
        with talkers(around, CLIENTS) as clients:
            options = ("--once", "--external", "veth:eth0=new1@br0")
            server = stack.enter_context(serving(destination, secret, *options, within=there))
            family = tree.pids()
            command = ["migrate", "--pid", "20000", "--to", server.address, "--secret-file", str(secret)]
            done = subprocess.run(
                [*there, *source.command(sys.executable, "-m", "pipeline", *command)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, said(done) + str(terminate(server.process))
            assert "note" not in done.stderr, done.stderr
            _, err = server.has_served()
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
    sweep()


#: the command line, with connections that stay in repair mode until it was killed; says when they are
HELD_IN_REPAIR = """
import functools, os, sys, time
from pipeline.__main__ import main
from pipeline.resources import tcp_read

look, pipeline = tcp_read._look, os.getpid()

@functools.cache
def output():  # of the command: whoever reads has another
    return os.open(f"/proc/{pipeline}/fd/1", os.O_WRONLY)

def state():
    return open(f"/proc/{pipeline}/stat").read().rpartition(")")[2].split()[0]

def slowly(sock):
    os.write(output(), b"in repair\\n")
    while state() != "Z":
        time.sleep(0.001)
    time.sleep(0.1)
    return look(sock)

tcp_read._look = slowly
main()
"""


def test_a_dump_killed_while_it_reads_a_connection_lets_clients_go_on(
    start: Callable[..., Tree], around: str, tmp_path: Path
) -> None:
    tree = start_in(around, start, "talking", DEPTH_1)
    plug(around, tree)
    command = [
        sys.executable,
        "-c",
        HELD_IN_REPAIR,
        "dump",
        "--pid",
        str(tree.pid),
        "--to",
        tmp_path / "image",
    ]
    with talkers(around, CLIENTS) as clients:
        with subprocess.Popen(
            ["nsenter", f"--net={around}", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as dumper:
            assert dumper.stdout is not None
            assert dumper.stdout.readline() == b"in repair\n"
            dumper.kill()
            dumper.stdout.read()  # the child that reads has opened it, too
        clients.go_on()
        no_locks(tree)
    tree.check()
    sweep()
    assert not (tmp_path / "image").exists()


#: one connection to the address and port that are given: each number has to come back
ASK = """
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
number = 0
while True:
    number += 1
    sock.sendall(b"%08d" % number)
    found = b""
    while len(found) < 8:
        piece = sock.recv(8 - len(found))
        assert piece, "it has ended"
        found += piece
    assert found == b"%08d" % number, found
    print(number, flush=True)
    time.sleep(0.005)
"""
#: who answers, and tells its port
ANSWER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
while text := sock.recv(8):
    sock.sendall(text)
"""


@pytest.mark.parametrize("policy", ["established", "close", "refuse"])
def test_a_connection_in_the_network_around(tmp_path: Path, policy: str, nothing_left_behind: None) -> None:
    """It waits, locked, for its tree, which is restored on the same host; or it is treated as was decided."""
    with network() as path, ExitStack() as stack:
        there = ["nsenter", f"--net={path}", sys.executable, "-u", "-c"]
        answering = subprocess.Popen(
            [*there, ANSWER], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        stack.callback(answering.wait)
        stack.callback(answering.kill)
        assert answering.stdout is not None
        stack.callback(answering.stdout.close)
        port = answering.stdout.readline().strip()
        output = tmp_path / "output"
        with output.open("wb") as file:
            asking = subprocess.Popen(
                [*there, ASK, "127.0.0.1", port],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

        def end() -> None:
            for pid in family_of(asking.pid):
                os.kill(pid, signal.SIGKILL)
            asking.wait()
            reap([asking.pid])

        stack.callback(end)

        def grows() -> None:
            size, deadline = output.stat().st_size, time.monotonic() + 60
            while output.stat().st_size <= size:
                assert time.monotonic() < deadline, f"it stands still: {output.read_text()[-500:]}"
                time.sleep(0.01)

        grows()
        image = tmp_path / "image"
        done = engine_in(path, "dump", "--pid", str(asking.pid), "--to", image, "--tcp", policy)
        if policy == "refuse":
            assert done.returncode == 3, said(done)
            assert "--tcp refuse was given" in done.stderr
            grows()
            return
        assert done.returncode == 0, said(done)
        asking.wait()
        tables = shell(path, "nft list tables")
        if policy == "established":
            assert "pipeline-kept-" in tables
            done = engine_in(path, "clean")
            assert f"its connections wait for the restore of {image}" in done.stdout
            assert shell(path, "nft list tables") == tables
        else:
            assert tables == ""
            answering.wait(10)  # it was told, in whatever way
        done = engine_in(path, "restore", "--from", image, "--detach")
        assert done.returncode == 0, said(done)
        assert shell(path, "nft list tables") == ""
        if policy == "close":
            deadline = time.monotonic() + 60
            while "ConnectionResetError" not in output.read_text():
                assert time.monotonic() < deadline, output.read_text()[-500:]
                time.sleep(0.01)
        else:
            grows()
            assert "nftables" not in engine_in(path, "clean").stdout


def test_a_lock_that_no_image_waits_for_is_cleaned_away() -> None:
    with network() as path:
        shell(path, "nft add table inet pipeline-kept-0123456789abcdef && nft add table inet other")
        done = engine_in(path, "clean")
        assert "removed nftables table pipeline-kept-0123456789abcdef" in done.stdout, said(done)
        assert shell(path, "nft list tables") == "table inet other\n"
