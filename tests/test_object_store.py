"""Images in an object store: whole trees go there and come back, and what fails on the way leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count

import pytest

from tests.harness.carry import unharmed
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, reap, restore, said
from tests.harness.wire import Wire

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("s3_server")]

#: descriptors, mappings, MiB of a sparse mapping, MiB of memory: several parts of an upload
LARGE = ("30", "20", "64", "40")
NUMBERS = count()


@pytest.fixture
def image(s3: str) -> str:
    """A place for an image."""
    return f"s3://images/whole{next(NUMBERS)}"


def objects(image: str) -> list[str]:
    """What is there, uploads that are not complete left out."""
    import obstore  # late, as in the harness
    from obstore.store import from_url

    store = from_url("s3://images", client_options={"allow_http": True})
    prefix = image.removeprefix("s3://images/")
    return sorted(
        item["path"].rpartition("/")[2] for batch in obstore.list(store, f"{prefix}/") for item in batch
    )


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


@pytest.mark.parametrize(("mode", "phase"), [("stop", "memory"), ("precopy", "round 0")])
def test_a_dump_that_is_cancelled_leaves_nothing(
    start: Callable[..., Tree], s3: str, image: str, mode: str, phase: str
) -> None:
    tree = start("large", DEPTH_2, LARGE)
    with Wire(s3.removeprefix("http://"), 8e6) as wire, unharmed(tree):
        environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://{wire.address}"}
        command = ["dump", "--pid", str(tree.pid), "--to", image, "--mode", mode, "--progress", "json"]
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if f'"{phase}"' in line:
                    break
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(60) == 130, rest
        assert objects(image) == []
