"""No descriptor, process or thread is left for us, at one place after the other: nothing stays, and nothing is lost.

What fails is our own call, not one that is run in a task: see test_every_call_refused.py. Each place in the code that
makes such a call is met once, by the functions around it.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import trio

import pipeline
from pipeline.errors import PipelineError, Refused, exhausted
from pipeline.image.codec import Image
from pipeline.kernel import syscalls
from pipeline.kernel.arch.x86_64 import NR
from pipeline.ledger import LEDGER
from pipeline.migrate import Mode
from pipeline.restore import RestoredTree
from tests.harness.settings import CONTAINER_2, DEPTH_0, DEPTH_1, Setting
from tests.harness.tree import Tree, dump, engine, family_of, reap, restore, said

pytestmark = pytest.mark.root

_NO_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
_NO_PROCESS = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
_NO_THREAD = RuntimeError("can't start new thread")
#: what may run out, where the functions for it are, and how they say so
_SCARCE: list[tuple[object, str, Exception]] = [
    *((os, name, _NO_FILES) for name in ("open", "dup", "pipe", "pipe2", "memfd_create", "pidfd_open")),
    *((os, name, _NO_FILES) for name in ("listdir", "scandir")),
    (socket, "socketpair", _NO_FILES),
    (os, "fork", _NO_PROCESS),
    (os, "posix_spawn", _NO_PROCESS),
    (threading.Thread, "start", _NO_THREAD),
]
#: system calls of ours that make descriptors
_MAKING = {NR.openat2, NR.pidfd_getfd, NR.userfaultfd, NR.open_tree, NR.fsopen, NR.fsmount}
#: so many functions around a call tell the place
_AROUND = 5


#: a function, and the lines that led to it
Place = tuple[object, ...]


class RunningOut:
    """Every call from one place fails."""

    def __init__(self) -> None:
        #: from where there were calls while nothing failed, in their order
        self.places: dict[Place, None] = {}
        self._at: Place | None = None
        self.has_failed = False

    @contextmanager
    def at(self, place: Place | None) -> Iterator[None]:
        """Within the block calls from there fail; None: none does, and the places are noted."""
        self._at, self.has_failed = place, False
        with pytest.MonkeyPatch.context() as patch:
            for home, name, error in _SCARCE:
                patch.setattr(home, name, self._watched(getattr(home, name), error, lambda _: True))
            making = self._watched(syscalls.syscall, _NO_FILES, lambda arguments: arguments[0] in _MAKING)
            patch.setattr(syscalls, "syscall", making)
            yield

    def ours(self) -> list[Place]:
        """The places, but for those of Trio itself."""
        return [place for place in self.places if not any("/trio/" in str(line) for line in place[1:3])]

    def _watched(
        self, function: Callable[..., Any], error: Exception, is_meant: Callable[[tuple[Any, ...]], bool]
    ) -> Callable[..., Any]:
        ours = os.getpid()

        def watched(*arguments: Any, **options: Any) -> Any:
            if os.getpid() == ours and is_meant(arguments):
                place = (function, *_around(sys._getframe(1)))
                if self._at is None:
                    self.places[place] = None
                elif place == self._at:
                    self.has_failed = True
                    raise error.with_traceback(None)  # it is the same each time, and would keep all frames
            return function(*arguments, **options)

        return watched


def _around(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    for _ in range(_AROUND):
        if frame is not None:
            yield frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back


def descriptors() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def what_it_says(recipe: Callable[[], Any]) -> Exception | None:
    try:
        trio.run(recipe)
    except Exception as error:  # noqa: BLE001 - told apart below
        told = error
    else:
        return None
    assert isinstance(told, PipelineError) or exhausted(told), told
    assert not isinstance(told, Refused), f"the tree could be carried: {told}"
    return told


def known(image: Image) -> bytes:
    """What a dump has found that does not change from one to the next."""
    return msgspec.json.encode([image.namespaces, image.user_namespaces, sorted(image.files)])


@pytest.mark.parametrize("program", ["files", "networks", "showing"])
def test_a_dump_that_runs_out_lets_the_tree_run(
    start: Callable[..., Tree], tmp_path: Path, program: str
) -> None:
    tree = start(program, DEPTH_1)
    family = tree.pids()
    number = 0

    async def attempt() -> None:
        await pipeline.dump(tree.pid, str(tmp_path / str(number)), mode="stop", leave="running")

    def image() -> bytes:
        return known(trio.run(pipeline.inspect, str(tmp_path / str(number))).image)

    tree.check()
    trio.run(attempt)
    whole = image()
    out = RunningOut()
    number = 1
    with out.at(None):
        trio.run(attempt)
    assert image() == whole
    before, others = descriptors(), set(family_of(os.getpid()))
    places = out.ours()
    assert len(places) > 50
    met = 0
    for place in places:
        number += 1
        with out.at(place):
            error = what_it_says(attempt)
        if not out.has_failed:
            continue  # it was not needed this time
        met += 1
        assert not LEDGER.held(), f"after {place}: {error}"
        assert descriptors() == before, f"after {place}: {error}"
        assert set(family_of(os.getpid())) == others, f"after {place}: {error}"
        assert (tmp_path / str(number) / "manifest").exists() == (error is None)
        if error is None:
            assert image() == whole, f"without {place} something was left out"
    assert met > 50
    tree.check()
    assert tree.pids() == family


def test_a_dump_whose_children_are_killed_says_so(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each in the moment in which it is there: as where no memory is left."""
    tree = start("networks", CONTAINER_2)
    fork, ours, born = os.fork, os.getpid(), 0

    def deadly() -> int:
        nonlocal born
        child = fork()
        if child and os.getpid() == ours:
            born += 1
            if born == victim:
                os.kill(child, signal.SIGKILL)
        return child

    async def attempt() -> None:
        await pipeline.dump(tree.pid, str(tmp_path / str(victim)), mode="stop", leave="running")

    monkeypatch.setattr(os, "fork", deadly)
    victim, told = 0, []
    trio.run(attempt)
    others, most = set(family_of(os.getpid())), born
    assert most > 2
    for victim in range(1, most + 1):
        born = 0
        error = what_it_says(attempt)
        assert not LEDGER.held(), f"after {victim}: {error}"
        assert set(family_of(os.getpid())) == others, f"after {victim}: {error}"
        assert (tmp_path / str(victim) / "manifest").exists() == (error is None)
        told += [str(exhausted(error))] if error is not None else []
        tree.check()
    assert told
    assert all("was killed: if there is no memory left" in text for text in told), told


def test_a_restore_that_runs_out_leaves_nothing(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("processes", CONTAINER_2)
    dump(tree, tmp_path / "image")

    async def attempt() -> None:
        restored = await pipeline.restore(str(tmp_path / "image"), detach=True, new_pidns=True)
        tree.pid = restored.root_pid
        restored.close()

    def is_well() -> None:
        tree.check()
        dump(tree, tmp_path / "again")
        (tmp_path / "image").rename(tmp_path / f"image.{tree.pid}")
        (tmp_path / "again").rename(tmp_path / "image")

    out = RunningOut()
    others = set(family_of(os.getpid()))
    with out.at(None):
        trio.run(attempt)
    is_well()
    before = descriptors()
    places = out.ours()
    assert len(places) > 30
    for place in places:
        with out.at(place):
            error = what_it_says(attempt)
        assert not LEDGER.held(), f"after {place}: {error}"
        assert descriptors() == before, f"after {place}: {error}"
        if error is None:
            is_well()
        assert not reap(sorted(set(family_of(os.getpid())) - others), 3.0), f"after {place}: {error}"
    trio.run(attempt)
    tree.check()


#: where the destination makes what it needs of its own when the tree runs
_DESTINATION = {"borrowing.py", "pager.py", "guard.py", "restore.py"}


async def _moved(tree: Tree, secret: Path, mode: Mode) -> tuple[list[RestoredTree], Exception | None]:
    """A migration within this host, into a pid namespace of its own; what was restored, and how it ended."""
    restored: list[RestoredTree] = []
    failed: Exception | None = None
    listening = trio.Event()
    ports: list[int] = []

    def told(_host: str, port: int, _secret: str | None) -> None:
        ports.append(port)
        listening.set()

    async with trio.open_nursery() as nursery:
        serve = partial(
            pipeline.serve,
            "127.0.0.1:0",
            secret_file=str(secret),
            new_pidns=True,
            on_listening=told,
            on_restored=restored.append,
        )
        nursery.start_soon(serve)
        await listening.wait()
        try:
            await pipeline.migrate(tree.pid, f"127.0.0.1:{ports[0]}", secret_file=str(secret), mode=mode)
        except Exception as error:  # noqa: BLE001 - the caller looks at it
            failed = error
        while failed is None and not restored:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return restored, failed


@pytest.mark.parametrize("mode", ["stop", "postcopy"])
def test_a_destination_that_runs_out_loses_no_tree(
    start: Callable[..., Tree], secret: Path, mode: Mode
) -> None:
    """Whatever it needs it has before the source ends its tree; else that runs on."""
    others = set(family_of(os.getpid()))

    def moved(place: Place | None) -> tuple[Tree, Exception | None]:
        tree = start("threads", CONTAINER_2)
        source = tree.pids()
        with out.at(place):
            restored, failed = trio.run(_moved, tree, secret, mode)
        for one in restored:
            tree.pid = one.root_pid
            one.close()
        assert len(restored) == (failed is None), f"after {place}: {failed}"
        if restored:
            assert not reap(source, 3.0), f"it runs twice after {place}"
        tree.check()
        return tree, failed

    out = RunningOut()
    moved(None)[0].kill()
    places = [
        place
        for place in out.ours()
        if _DESTINATION & {os.path.basename(str(line[0])) for line in place[1:] if isinstance(line, tuple)}
    ]
    assert len(places) > 1
    for place in places:
        tree, failed = moved(place)
        assert failed is not None, f"without {place} it runs"
        assert not LEDGER.held(), f"after {place}: {failed}"
        tree.kill()
        assert not reap(sorted(set(family_of(os.getpid())) - others), 3.0), f"after {place}: {failed}"


def with_descriptors(most: int) -> list[str]:
    """A command that may have so many open, and then executes the words behind it."""
    script = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))"
    return [sys.executable, "-c", f"{script}; os.execv(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize("most", [8, 16, 24])
def test_who_dumps_with_few_descriptors_is_told_so(
    start: Callable[..., Tree], tmp_path: Path, most: int
) -> None:
    tree = start("processes", DEPTH_1)
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", within=with_descriptors(most))
    assert done.returncode == 1, said(done)
    assert "dump: this process has as many descriptors open as it may: raise `ulimit -n`" in done.stderr
    assert "Traceback" not in done.stderr
    tree.check()


def test_who_restores_with_few_descriptors_is_told_so(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("processes", DEPTH_1)
    for pid in tree.pids():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, 100))
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", within=with_descriptors(150))
    assert done.returncode == 1, said(done)
    assert "this restorer may have 150 descriptors open, and needs numbers up to 202" in done.stderr
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, CONTAINER_2], ids=lambda setting: setting.name)
def test_who_may_have_no_more_descriptors_than_the_tree_builds_it(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    """Some programs have theirs just below the limit; that of who restores them may be the same."""
    tree = start("highest", setting)
    for pid in tree.pids():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (512, 512))
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", within=with_descriptors(512))
    assert done.returncode == 0, said(done)
    tree.check()
