"""Where the image of a tree may be: one for each place, in what outlives the tree; and what fails last is no image."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline import blocking
from pipeline.errors import StorageError
from pipeline.ledger import LEDGER
from pipeline.transport import storage
from pipeline.transport.manifest import Manifest
from pipeline.transport.storage import MANIFEST, DirectoryStorage, Storage
from tests.harness.carry import unharmed
from tests.harness.settings import DEPTH_0, DEPTH_2, Setting
from tests.harness.tree import ROOT, Tree, engine, reap, restore, said

pytestmark = pytest.mark.root

#: the function has its name
MODULE = importlib.import_module("pipeline.dump")


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda one: one.name)
@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_of_two_dumps_to_one_place_one_is_refused(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, mode: str
) -> None:
    """The other one has found the place free; its tree is not touched, and what the first has written stays."""
    tree, other = start("anonymous", setting), start("anonymous", setting)
    image = tmp_path / "image"
    genuine = MODULE.write_manifest

    async def free(_: DirectoryStorage) -> None:
        """It was, when it was asked."""

    async def written(place: Storage, manifest: Manifest) -> None:
        with pytest.raises(pipeline.UsageError, match="another dump is writing an image there"):
            await pipeline.dump(other.pid, str(image), mode=mode)
        await genuine(place, manifest)

    monkeypatch.setattr(DirectoryStorage, "require_free", free)
    monkeypatch.setattr(MODULE, "write_manifest", written)
    with unharmed(tree), unharmed(other):
        family = tree.pids()
        trio.run(lambda: pipeline.dump(tree.pid, str(image), mode=mode))
        with pytest.raises(pipeline.UsageError, match="holds an image already"):
            blocking.dump(other.pid, str(image), mode=mode)
        assert not reap(family), "its pids are to be free"
        restore(tree, image)
    assert not LEDGER.held()


def test_a_place_where_a_dump_was_killed_is_refused(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet")
    (tmp_path / storage.CLAIM).touch()
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path)
    assert done.returncode == 2, said(done)
    assert f"{tmp_path}: another dump is writing an image there" in done.stderr
    assert "if it was killed, remove what it has left (writing" in done.stderr
    tree.check()


def test_a_manifest_that_fails_at_its_very_end_leaves_no_image(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its name by then; without it there is no image, and nobody takes one for whole."""
    tree = start("anonymous")
    image = tmp_path / "image"

    def sync(_: Path) -> None:
        if (image / MANIFEST).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "_sync_directory", sync)
    with unharmed(tree), pytest.raises(StorageError, match="Input/output error"):
        blocking.dump(tree.pid, str(image))
    assert not image.exists()
    assert not LEDGER.held()


#: mounts a tmpfs that nobody else sees, and an overlay of it
_MOUNTING = """
set -e
mount -t tmpfs none "$1"
cd "$1"
mkdir lower upper work over
mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" none over
cd /
touch "$1/ready"
exec sleep 1000
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that has mounted file systems for itself, and where in its mount namespace."""
    point = tmp_path / "mounted"
    point.mkdir()
    alone = ["unshare", "--map-root-user", "--mount", "--propagation=private"]
    command = [*alone, "sh", "-c", _MOUNTING, "sh", str(point)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            while not os.path.exists(f"/proc/{process.pid}/root{point}/ready"):
                assert process.poll() is None
                time.sleep(0.01)
            yield process.pid, point
        finally:
            process.kill()


@pytest.mark.parametrize("place", ["image", "over/image", "over"])
def test_an_image_does_not_go_where_it_would_end_with_its_tree(mounted: tuple[int, Path], place: str) -> None:
    pid, point = mounted
    where = Path(f"/proc/{pid}/root{point}/{place}")
    done = engine("dump", "--pid", pid, "--to", where, "--leave-running")
    assert done.returncode == 2, said(done)
    assert f"{where} is in a file system that only the tree has mounted" in done.stderr
    assert not where.exists() or not list(where.iterdir())


@pytest.mark.parametrize("stays", [True, False])
def test_who_dumps_from_within_may_if_somebody_stays_there(mounted: tuple[int, Path], stays: bool) -> None:
    """Somebody who is not of the tree, and not the command itself: a shell."""
    pid, point = mounted
    dump = f"{sys.executable} -m pipeline dump --pid {pid} --to {point}/image --leave-running"
    shell = f"cd {ROOT}; {dump}; exit $?" if stays else f"cd {ROOT}; exec {dump}"
    done = subprocess.run(
        ["nsenter", f"--target={pid}", "--mount", "sh", "-c", shell],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if stays else 2), done.stderr
    assert ("only the tree has mounted" in done.stderr) != stays
    assert os.path.exists(f"/proc/{pid}/root{point}/image/manifest") == stays
