"""Images in an object store: whole trees go there and come back, and what fails on the way leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count

import pytest

from tests.harness.carry import unharmed
from tests.harness.object_store import objects
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, reap, restore, said
from tests.harness.valve import Valve
from tests.harness.wire import Wire

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("s3_server")]

#: descriptors, mappings, MiB of a sparse mapping, MiB of memory: several parts of an upload
LARGE = ("30", "20", "64", "40")
NUMBERS = count()


@pytest.fixture
def image(s3: str) -> str:
    """A place for an image."""
    return f"s3://images/whole{next(NUMBERS)}"


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_tree_goes_to_the_store_and_comes_back(
    start: Callable[..., Tree], image: str, setting: Setting, codec: str
) -> None:
    tree = start("large", setting, LARGE)
    family = tree.pids()
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", image, "--compress", codec)
        assert done.returncode == 0, said(done)
        assert not reap(family), "the dump left it running"
        assert objects(image) == ["image", "index", "manifest", "pages", "pages.index"]
        looked = engine("inspect", image)
        assert looked.returncode == 0, said(looked)
        restore(tree, image)


@pytest.mark.parametrize("program", ["processes", "sharing", "threads", "pipes"])
def test_trees_of_many_kinds(start: Callable[..., Tree], image: str, program: str) -> None:
    tree = start(program, DEPTH_2)
    with unharmed(tree):
        dump(tree, image)
        restore(tree, image)


def test_a_place_that_is_taken_is_refused(start: Callable[..., Tree], image: str) -> None:
    tree = start("anonymous", DEPTH_1)
    for code in (0, 2):
        done = engine("dump", "--pid", tree.pid, "--to", image, "--leave-running")
        assert done.returncode == code, said(done)
    assert "holds an image already" in done.stderr
    tree.check()


@contextmanager
def running(address: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has just begun, whose store is behind an address (HOST:PORT)."""
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=ROOT,
        env={**os.environ, "AWS_ENDPOINT_URL": f"http://{address}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def dumping(
    tree: Tree, image: str, address: str, *options: str
) -> AbstractContextManager[subprocess.Popen[str]]:
    """A dump to a store behind an address."""
    return running(address, "dump", "--pid", str(tree.pid), "--to", image, *options)


def wait_for(process: subprocess.Popen[str], phase: str) -> None:
    """Until a command that says its progress as JSON is in this phase."""
    assert process.stderr is not None
    assert any(f'"{phase}"' in line for line in process.stderr), f"it has ended before {phase}"


@pytest.mark.parametrize(("mode", "phase"), [("stop", "memory"), ("precopy", "round 0")])
def test_a_dump_that_is_cancelled_leaves_nothing(
    start: Callable[..., Tree], s3: str, image: str, mode: str, phase: str
) -> None:
    tree = start("large", DEPTH_2, LARGE)
    with Wire(s3.removeprefix("http://"), 8e6) as wire, unharmed(tree):
        with dumping(tree, image, wire.address, "--mode", mode, "--progress", "json") as process:
            wait_for(process, phase)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert objects(image) == []


@pytest.mark.parametrize(("mode", "left"), [("stop", "image"), ("precopy", "pages")])
def test_a_store_that_does_not_answer_keeps_nobody(
    start: Callable[..., Tree], s3: str, image: str, mode: str, left: str
) -> None:
    """The tree runs on at once, and the command ends soon, and says what may be left."""
    tree = start("large", DEPTH_2, LARGE)
    with Valve(s3.removeprefix("http://"), 4 << 20) as valve, unharmed(tree):
        with dumping(tree, image, valve.address, "--mode", mode) as process:
            valve.wait_until_shut()
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None
            tree.check()  # while the command still waits
            _, told = process.communicate(timeout=30)
        assert process.returncode == 1, told
        assert f"cancelled; {image} could not be tidied up, and may keep " in told
        assert left in told.rpartition("may keep ")[2]


@pytest.mark.parametrize("command", ["dump", "restore", "inspect"])
def test_a_store_that_answers_nothing_is_not_waited_for(
    start: Callable[..., Tree], image: str, command: str
) -> None:
    tree = start("anonymous", DEPTH_1)
    words = {
        "dump": ["dump", "--pid", str(tree.pid), "--to", image],
        "restore": ["restore", "--from", image],
        "inspect": ["inspect", image],
    }
    with socket.create_server(("127.0.0.1", 0)) as store, unharmed(tree):
        with running(f"127.0.0.1:{store.getsockname()[1]}", *words[command]) as process:
            connection, _ = store.accept()
            with connection:
                assert connection.recv(1), "it asks for something"
                process.send_signal(signal.SIGINT)
                _, told = process.communicate(timeout=10)
        assert process.returncode == 130, told


def test_a_store_that_is_gone_lets_the_tree_go(start: Callable[..., Tree], s3: str, image: str) -> None:
    tree = start("large", DEPTH_2, LARGE)
    with Wire(s3.removeprefix("http://"), 8e6) as wire, unharmed(tree):
        with dumping(tree, image, wire.address, "--mode", "stop", "--progress", "json") as process:
            wait_for(process, "memory")
            wire.cut()
            _, told = process.communicate(timeout=90)
        assert process.returncode == 1, told
        assert f"{image}/i" in told.partition("could not be")[0], "the image, or its index"
        assert f"; {image} could not be tidied up, and may keep image" in told
        assert "Traceback" not in told
