"""inotify: what is refused, how names are found, and what a bad image meets."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.kernel.syscalls import CLONE, mount, unshare
from pipeline.policy import DumpPolicy
from pipeline.resources import watched
from pipeline.resources.watched import Watched
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, engine, reap, restore, said
from tests.resources.fdharness import Capture, Rebuilt, subject

IN_MODIFY, IN_CREATE, IN_OPEN = 0x2, 0x100, 0x20
_PRIVATE_RECURSIVE = 0x40000 | 0x4000
_libc = ctypes.CDLL(None, use_errno=True)


def watching(*paths: str, mask: int = IN_MODIFY | IN_CREATE) -> int:
    fd: int = _libc.inotify_init1(os.O_NONBLOCK)
    for path in paths:
        assert _libc.inotify_add_watch(fd, os.fsencode(path), mask) > 0, path
    return fd


def test_unread_events_are_waited_for(tmp_path: Path) -> None:
    with subject(partial(watching, str(tmp_path))) as child:
        with Capture(child.pid) as capture:
            assert capture.blockers(child.result) == []
        (tmp_path / "new").touch()
        with Capture(child.pid) as capture:
            (blocker,) = capture.blockers(child.result)
            assert blocker.transient
            assert "not read" in blocker.reason
            assert "--file-events drop" in blocker.remedy
        with Capture(child.pid, policy=DumpPolicy(file_events="drop")) as capture, Rebuilt(capture) as new:
            with pytest.raises(BlockingIOError):
                os.read(new.fd(child.result), 4096)
            assert len(new.info(child.result)["inotify"]) == 1
        assert os.path.exists(tmp_path / "new")
        assert child.call(partial(os.read, child.result, 4096))[16:19] == b"new"
        with Capture(child.pid) as capture:
            assert capture.blockers(child.result) == []


def test_a_deleted_file_is_watched_only_where_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    keep = os.open(path, os.O_RDONLY)

    def setup() -> int:
        return watching(str(path))

    try:
        with subject(setup) as child:
            path.unlink()
            with Capture(child.pid) as capture:
                assert "no name is found" in capture.reasons(child.result)
    finally:
        os.close(keep)


def test_an_instance_of_outside_is_refused(tmp_path: Path) -> None:
    def setup() -> int:
        fd = watching(str(tmp_path))
        if os.fork() == 0:
            signal.pause()
        return fd

    with subject(setup) as child, Capture(child.pid) as capture:
        assert "outside the tree" in capture.reasons(child.result)


@pytest.fixture
def lost(tmp_path: Path) -> Watched:
    """A file in a directory of a directory, as if the kernel gave no handle of it."""
    (tmp_path / "one" / "two").mkdir(parents=True)
    path = tmp_path / "one" / "two" / "file"
    path.touch()
    found = path.stat()
    return Watched(found.st_dev, found.st_ino, b"")


def test_a_name_is_searched_for_from_the_working_directory(
    lost: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "_known", {})
    with subject(partial(os.chdir, tmp_path / "one")) as child:
        with Capture(child.pid) as capture:
            found = watched.name_of(child.pid, lost, capture)
            assert found == os.fsencode(tmp_path / "one" / "two" / "file")
        monkeypatch.setattr(watched, "SEARCH_S", 0.0)
        with Capture(child.pid) as capture:
            assert watched.name_of(child.pid, lost, capture) is not None  # known from before
            (tmp_path / "one" / "two" / "file").rename(tmp_path / "moved")
            assert watched.name_of(child.pid, lost, capture) is None


def test_many_names_are_found_in_one_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_known", {})
    monkeypatch.setattr(watched, "_by_handle", lambda *_: os.readlink(b"/not/permitted"))
    names = [str(tmp_path / f"directory{n}") for n in range(400)]
    for name in names:
        os.mkdir(name)

    def setup() -> int:
        os.chdir(tmp_path)
        return watching(*names)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert capture.blockers(child.result) == []
        (state,) = (file.state for file in capture.records() if file.kind == "inotify")
        assert [os.fsdecode(watch[4][1]) for watch in state["watches"]] == names


def test_the_name_of_a_file_in_the_way_is_not_taken(lost: Watched) -> None:
    """A file of the same inode number on another device."""
    elsewhere = Watched(lost.device + 1, lost.inode, b"")
    with Capture() as capture:
        assert watched.name_of(HostPid(os.getpid()), elsewhere, capture) is None


@pytest.mark.root
def test_names_on_overlay_of_two_filesystems(tmp_path: Path) -> None:
    """There, a directory and a file have one number, and stat(2) tells of devices that no mount has."""
    merged = f"{tmp_path}/merged"
    names = [f"{merged}/{name}" for name in ("one", "one/file", "two", "two/file", "")]

    def setup() -> int:
        unshare(CLONE.NEWNS)
        mount(None, b"/", None, _PRIVATE_RECURSIVE)
        for name in ("lower1", "lower2", "upper", "merged"):
            os.mkdir(tmp_path / name)
            if name != "merged":
                mount(b"tmpfs", os.fsencode(tmp_path / name), b"tmpfs", 0)
        for name in ("upper/up", "upper/work", "lower1/one", "lower2/two"):
            os.mkdir(tmp_path / name)
        (tmp_path / "lower1/one/file").touch()
        (tmp_path / "lower2/two/file").touch()
        layers = f"lowerdir={tmp_path}/lower1:{tmp_path}/lower2"
        layers += f",upperdir={tmp_path}/upper/up,workdir={tmp_path}/upper/work"
        mount(b"overlay", os.fsencode(merged), b"overlay", 0, layers.encode())
        return watching(*names)

    with subject(setup) as child, Capture(child.pid) as capture:
        assert capture.blockers(child.result) == []
        (state,) = (file.state for file in capture.records() if file.kind == "inotify")
        assert [os.fsdecode(watch[4][1]) for watch in state["watches"]] == [
            name.rstrip("/") for name in names
        ]


def _changed(change: Callable[[dict[str, Any]], None], capture: Capture) -> list[Any]:
    records = capture.records()
    (record,) = (record for record in records if record.kind == "inotify")
    change(record.state["watches"][0])
    return records


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (1, 0, "impossible mask"),
        (1, 0x2000_0000 | IN_OPEN, "impossible mask"),
        (2, 0o100000, "another type"),
        (4, [0, b"/does/not/exist"], "No such file"),
    ],
)
def test_a_watch_of_a_bad_image_is_named(tmp_path: Path, place: int, value: Any, says: str) -> None:
    with subject(partial(watching, str(tmp_path))) as child, Capture(child.pid) as capture:

        def change(watch: Any) -> None:
            watch[place] = value

        records = _changed(change, capture)
        with pytest.raises(RebuildError, match=says), Rebuilt(capture, records):
            pass


def test_two_watches_of_one_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with (
        subject(partial(watching, str(tmp_path), str(tmp_path / "one"))) as child,
        Capture(child.pid) as capture,
    ):
        records = capture.records()
        (record,) = (record for record in records if record.kind == "inotify")
        record.state["watches"][1][4] = record.state["watches"][0][4]
        with pytest.raises(RebuildError, match="already"), Rebuilt(capture, records):
            pass


def test_many_watches_far_apart(tmp_path: Path) -> None:
    def setup() -> int:
        fd: int = _libc.inotify_init1(os.O_NONBLOCK)
        for n in range(200):
            (tmp_path / str(n)).mkdir()
            wd = _libc.inotify_add_watch(fd, os.fsencode(tmp_path / str(n)), IN_CREATE)
            if n % 40:
                _libc.inotify_rm_watch(fd, wd)
        os.read(fd, 65536)
        return fd

    with subject(setup) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        lines = new.info(child.result)["inotify"]
        assert sorted(int(line.split()[0][3:], 16) for line in lines) == [1, 41, 81, 121, 161]
        assert msgspec.to_builtins(new.files)


@pytest.mark.root
def test_events_are_dropped_on_demand(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("watching", DEPTH_1)
    (tree.directory / "watched" / "quiet" / "another").touch()
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image")
    assert done.returncode == 3
    assert "events of inotify that the program has not read" in done.stderr, said(done)
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", "--file-events", "drop")
    assert done.returncode == 0, said(done)
    assert not reap([tree.pid])
    restore(tree, tmp_path / "image")
    tree.check()
    assert tree.end() == 0
