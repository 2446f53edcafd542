"""Images whose trees run before their memory is there: in a directory, and in an object store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import trio

from pipeline.transport.storage import IMAGE, INDEX, LAYER, MANIFEST, open_storage
from tests.harness import made_images
from tests.harness.carry import unharmed
from tests.harness.hosts import terminate
from tests.harness.running import Running
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, reap, restore, said
from tests.harness.wire import Wire

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("s3_server")]

LARGE = ("0", "20", "64", "64")
#: slow enough that the pages take some seconds
SLOW = 4e6
NUMBERS = count()


@pytest.fixture
def stored(s3: str) -> str:
    """A place for an image in an object store."""
    return f"s3://images/lazy{next(NUMBERS)}"


@pytest.fixture(params=["directory", "s3"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for an image."""
    return str(tmp_path / "image") if request.param == "directory" else request.getfixturevalue("stored")


def content_of(image: str, name: str) -> bytes:
    async def read() -> bytes:
        got, view = bytearray(), memoryview(bytearray(1 << 20))
        async with open_storage(image).open(name) as source:
            while size := await source.read_into(view):
                got += view[:size]
        return bytes(got)

    return trio.run(read)


def replace(image: str, name: str, content: bytes | None) -> None:
    """Let an object of the image be this one, or none."""

    async def write() -> None:
        storage = open_storage(image)
        await storage.discard(name)
        if content is not None:
            async with storage.create(name) as sink:
                await sink.write(content)

    trio.run(write)


def damaged(content: bytes) -> bytes:
    """One bit in the middle of it is another one."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


@contextmanager
def restoring(image: str, directory: Path) -> Iterator[Running]:
    """A lazy restore under way; what it says on stderr is in `directory`."""
    events = directory / "events"
    command = [
        *(sys.executable, "-m", "pipeline", "restore", "--from", image, "--lazy"),
        *("--detach", "--json", "--events", str(events)),
    ]
    process = subprocess.Popen(
        ["unshare", "--fork", *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(process, events)
    finally:
        terminate(process)


@pytest.fixture
def wire(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A slow way to the object store, which is taken by what is started from now on."""
    with Wire(s3.removeprefix("http://"), SLOW) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{wire.address}")
        yield wire


@pytest.mark.parametrize(
    ("setting", "codec"),
    [(DEPTH_0, "none"), (DEPTH_1, "none"), (DEPTH_2, "none"), (CONTAINER_2, "none"), (CONTAINER_2, "zstd")],
    ids=lambda value: value.name if isinstance(value, Setting) else value,
)
def test_a_large_memory_comes_behind(
    start: Callable[..., Tree], image: str, setting: Setting, codec: str
) -> None:
    tree = start("large", setting, LARGE)
    family = tree.pids()
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", image, "--compress", codec)
        assert done.returncode == 0, said(done)
        assert not reap(family), "the dump left it running"
        restore(tree, image, "--lazy")


@pytest.mark.parametrize("program", ["rewriting", "processes", "sharing", "threads", "answering"])
def test_a_tree_that_never_rests_has_every_page(
    start: Callable[..., Tree], tmp_path: Path, stored: str, program: str
) -> None:
    tree = start(program, DEPTH_2)
    for image in (str(tmp_path / "0"), stored, str(tmp_path / "1")):
        dump(tree, image)
        restore(tree, image, "--lazy")
        tree.check()


def test_it_runs_before_its_memory_is_there(start: Callable[..., Tree], image: str, tmp_path: Path) -> None:
    tree = start("large", DEPTH_1, LARGE)
    dump(tree, image)
    done = engine("restore", "--from", image, "--detach", "--lazy", "--json", "--events", tmp_path / "events")
    assert done.returncode == 0, said(done)
    found = json.loads(done.stdout)
    tree.pid = found["root_pid"]
    tree.check()
    assert found["figures"]["start-time"] <= found["figures"]["total-time"]
    names = [json.loads(line).get("name") for line in (tmp_path / "events").read_text().splitlines()]
    assert names.index("thaw") < names.index("postcopy")


def test_a_tree_whose_image_is_damaged_is_ended(start: Callable[..., Tree], image: str) -> None:
    """The damage is among the pages that come when it runs already."""
    tree = start("large", DEPTH_1, LARGE)
    family = tree.pids()
    dump(tree, image)
    replace(image, LAYER, damaged(content_of(image, LAYER)))
    done = engine("restore", "--from", image, "--detach", "--lazy")
    assert done.returncode == 1, said(done)
    assert "the checksum does not fit" in done.stderr
    assert not reap(family), "it runs on with pages missing"


@pytest.mark.parametrize("name", [IMAGE, INDEX])
def test_what_is_cut_or_of_another_image_is_refused_before_anything_is_made(
    start: Callable[..., Tree], image: str, name: str
) -> None:
    tree = start("large", DEPTH_1, ("0", "20", "64", "8"))
    family = tree.pids()
    dump(tree, image)
    right = content_of(image, name)
    other = dict(
        zip((IMAGE, INDEX), trio.run(made_images.made, [made_images.run(0, b"x" * 4096)]), strict=True)
    )
    for wrong in (right[:-1], bytes(other[name].raw)):
        replace(image, name, wrong)
        done = engine("restore", "--from", image, "--detach", "--lazy")
        assert done.returncode == 1, said(done)
        assert f"{image}/{name}: " in done.stderr, said(done)
        assert not reap(family)
    looked = engine("inspect", image)
    assert looked.returncode == 1, said(looked)
    replace(image, name, right)
    restore(tree, image, "--lazy")
    tree.check()


@pytest.mark.parametrize("wrong", ["damaged", "missing"])
def test_who_does_not_need_the_index_does_not_read_it(
    start: Callable[..., Tree], image: str, wrong: str
) -> None:
    tree = start("anonymous", DEPTH_1)
    dump(tree, image, "--mode", "stop")
    replace(image, INDEX, damaged(content_of(image, INDEX)) if wrong == "damaged" else None)
    done = engine("restore", "--from", image, "--detach", "--lazy")
    assert done.returncode == 1, said(done)
    assert "only --lazy needs it" in done.stderr
    restore(tree, image)
    tree.check()


def test_an_image_that_was_made_without_an_index(start: Callable[..., Tree], image: str) -> None:
    """A directory is read for what the index would say; of an object store that would be all of the image."""
    tree = start("large", DEPTH_1, LARGE)
    dump(tree, image, "--mode", "stop")
    manifest = json.loads(content_of(image, MANIFEST))
    assert manifest.pop("index_bytes") == len(content_of(image, INDEX))
    replace(image, INDEX, None)
    replace(image, MANIFEST, json.dumps(manifest).encode())
    looked = engine("inspect", image, "--json")
    assert looked.returncode == 0, said(looked)
    assert json.loads(looked.stdout)["index-bytes"] == 0
    if image.startswith("s3:"):
        done = engine("restore", "--from", image, "--detach", "--lazy")
        assert done.returncode == 1, said(done)
        assert "the image has no index" in done.stderr
        restore(tree, image)
    else:
        restore(tree, image, "--lazy")
    tree.check()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_a_tree_waits_while_the_store_is_away(
    start: Callable[..., Tree], stored: str, wire: Wire, tmp_path: Path, setting: Setting
) -> None:
    tree = start("large", setting, LARGE)
    family = tree.pids()
    wire.bytes_per_s = 1e9
    dump(tree, stored)
    wire.bytes_per_s = SLOW
    with restoring(stored, tmp_path) as command:
        for times in (1, 2):
            command.wait_for("postcopy", times)
            wire.cut()
            command.wait_for("postcopy-paused", times)
            assert tree.pids() == family
            wire.mend()
        wire.bytes_per_s = 1e9
        command.ends_well()
    tree.check()
    text = [json.loads(line).get("text", "") for line in (tmp_path / "events").read_text().splitlines()]
    assert any(f"{stored}/pages: " in line and "the tree waits for its pages" in line for line in text)


def test_who_does_not_want_to_wait_for_the_store_gives_the_tree_up(
    start: Callable[..., Tree], stored: str, wire: Wire, tmp_path: Path
) -> None:
    tree = start("large", DEPTH_2, LARGE)
    family = tree.pids()
    dump(tree, stored)
    with restoring(stored, tmp_path) as command:
        command.wait_for("postcopy")
        wire.cut()
        command.wait_for("postcopy-paused")
        (inside,) = map(
            int, Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children").read_text().split()
        )
        os.kill(inside, signal.SIGINT)
        _, err = command.process.communicate(timeout=20)
        assert command.process.returncode == 130, err
    assert not reap(family), "it runs on with pages missing"
    wire.mend()
    wire.bytes_per_s = 1e9
    restore(tree, stored, "--lazy")
    tree.check()


@pytest.mark.parametrize("becomes", ["another", "none"])
def test_a_tree_whose_image_is_replaced_or_removed_is_ended(
    start: Callable[..., Tree], s3: str, stored: str, wire: Wire, tmp_path: Path, becomes: str
) -> None:
    tree = start("large", DEPTH_1, LARGE)
    family = tree.pids()
    wire.bytes_per_s = 1e9
    dump(tree, stored)
    content = content_of(stored, LAYER)
    wire.bytes_per_s = SLOW
    with restoring(stored, tmp_path) as command:
        command.wait_for("postcopy")
        os.environ["AWS_ENDPOINT_URL"] = s3
        replace(stored, LAYER, content[: 1 << 20] if becomes == "another" else None)
        _, err = command.process.communicate(timeout=40)
        assert command.process.returncode == 1, err
    assert "while it was read" in err
    assert not reap(family), "it runs on with pages missing"


def test_a_stream_is_not_read_in_any_order() -> None:
    done = engine("restore", "--from", "-", "--lazy")
    assert done.returncode == 2, said(done)
    assert "in a directory or in an object store" in done.stderr


def test_who_cannot_answer_page_faults_is_told(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("anonymous", DEPTH_1)
    image = tmp_path / "image"
    dump(tree, image)
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/userfaultfd && exec "$@"', "-"]
    done = engine("restore", "--from", image, "--detach", "--lazy", within=hidden)
    assert done.returncode == 1, said(done)
    assert "page faults of programs cannot be answered here" in done.stderr
    restore(tree, image)
    tree.check()
