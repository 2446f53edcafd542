"""Dumps and restores that are disturbed: the command, or a process that it works by, is interrupted, killed or stopped.

When all has settled the tree runs, and everything in it is right; or it has ended, and its image is complete and
brings it back. Nobody traces it or watches its memory any more, and nothing else is left in the host.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.transport.storage import CLAIM, MANIFEST
from tests.harness import object_store
from tests.harness.disturbing import DISTURBANCES, ROOT_PID, START_S, Scene, holds, strangers
from tests.harness.hosts import Host
from tests.harness.tree import Tree

_POLL_S = 0.05
#: until then a disturbed command has come to its end, and what it leaves behind is gone
_PATIENCE_S = 30.0
#: userfaultfds that watch memory, in VmFlags of smaps
_WATCHED = {b"um", b"uw", b"ui"}
#: what can disturb a command that has no other side, which would grow impatient
NAMES = [
    name
    for name in DISTURBANCES
    if not any(word in name for word in ("nothing", "server", "network", "for long"))
]

T = TypeVar("T")
Outcome = Literal["runs on", "was dumped", "ended and was dumped", "was not restored"]


class Shelf:
    """A tree in a host that is dumped and restored, and disturbed.

    Args:
        place: a directory, or the URL of a prefix, in which the images come to be.
    """

    def __init__(self, host: Host, tree: Tree, place: str) -> None:
        self._host, self._tree, self._place = host, tree, place
        #: how long commands take if nothing disturbs them
        self._usual_s = {"dump": 0.5, "restore": 0.5}
        self._number = 0
        #: the image made last, if it is complete
        self._last: str | None = None

    def go(self) -> None:
        """Dump it, and restore it; nothing disturbs it."""
        self._dump("nothing", [], 0, random.Random())
        self._restore("nothing", [], 0, random.Random())

    def disturb(self, dice: random.Random, names: Sequence[str]) -> Outcome:
        """Dump it, or restore it if it has ended; which one of these disturbs.

        Raises:
            AssertionError: anything but one of the outcomes.
        """
        if self._holds():
            options = [*dice.choice(([], ["--leave-running"])), "--mode", dice.choice(("stop", "precopy"))]
            if "precopy" in options and self._last is not None and dice.random() < 0.5:
                options += ["--parent", self._last]
            return self._dump(*self._chosen("dump", dice, names, options))
        assert self._last is not None, "it has ended without an image"
        return self._restore(*self._chosen("restore", dice, names, dice.choice(([], ["--lazy"]))))

    def _chosen(
        self, command: str, dice: random.Random, names: Sequence[str], options: Sequence[str]
    ) -> tuple[str, Sequence[str], float, random.Random]:
        return dice.choice(names), options, dice.uniform(START_S, self._usual_s[command]), dice

    def _dump(self, name: str, options: Sequence[str], after_s: float, dice: random.Random) -> Outcome:
        image = self._next_image(keep="--parent" in options)
        words = ["dump", "--pid", str(ROOT_PID), "--to", image, *options]
        code, said = self._run(words, name, after_s, dice)

        def judge() -> Outcome:
            complete = MANIFEST in _objects(image)
            if complete:
                self._last = image
            if name == "nothing" or code == 0:
                assert code == 0, "the dump has failed"
                assert complete, "there is no image"
                assert self._holds() == ("--leave-running" in options), "it runs on, or not, unlike asked for"
            if not self._holds():
                assert complete, "the tree is lost"
                assert "--leave-running" not in options, "the tree has ended, and was not to"
                return "ended and was dumped"
            self._is_whole()
            if code in {1, 3, 130, 143}:
                assert not complete, "it says that it has failed, and there is an image"
                assert not _objects(image), "something is left of the image"
            return "was dumped" if complete else "runs on"

        told = f"{words}, {name} after {after_s:.3f} s: {code}; {said}"
        outcome = self._judged(judge, told)
        if name == "source killed":
            self._judged(partial(self._clean, image), told)
        return outcome

    def _restore(self, name: str, options: Sequence[str], after_s: float, dice: random.Random) -> Outcome:
        assert self._last is not None
        self._host.go_on_from(ROOT_PID + 3000)
        words = ["restore", "--from", self._last, "--detach", *options]
        code, said = self._run(words, name, after_s, dice)

        def judge() -> Outcome:
            if self._holds():
                self._is_whole()
                return "runs on"
            assert name != "nothing", "it was not restored"
            # who brings its pages may have been killed behind that
            assert code != 0 or "--lazy" in options, "it says that the tree is there"
            return "was not restored"

        return self._judged(judge, f"{words}, {name} after {after_s:.3f} s: {code}; {said}")

    def _clean(self, image: str) -> None:
        """`clean` takes away what a dump has left that was killed, and leaves an image that is complete."""
        before = _objects(image)
        done = subprocess.run(
            self._host.command(sys.executable, "-m", "pipeline", "clean"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "kept" not in done.stdout, done.stdout
        if "://" not in image:
            assert _objects(image) == ([one for one in before if one != CLAIM] if MANIFEST in before else [])

    def _next_image(self, keep: bool) -> str:
        """A place for an image; those before it are removed, but for the last one, unless it may need them."""
        if not keep:
            for number in range(1, self._number + 1):
                if f"{self._place}/{number}" != self._last:
                    _remove(f"{self._place}/{number}")
        self._number += 1
        return f"{self._place}/{self._number}"

    def _run(self, words: Sequence[str], name: str, after_s: float, dice: random.Random) -> tuple[int, str]:
        """Run a command, and let something happen so long behind its begin; its exit code, and what it said."""
        begin = time.monotonic()
        command = subprocess.Popen(
            self._host.command(sys.executable, "-m", "pipeline", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if name != "nothing":
            time.sleep(after_s)
            DISTURBANCES[name](Scene(dice, command))
        try:
            _, said = command.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            left = self._strangers()
            command.kill()
            raise AssertionError(f"{words} does not end, {name} after {after_s:.3f} s: {left}") from None
        if name == "nothing":
            self._usual_s[words[0]] = time.monotonic() - begin
        return command.returncode, said

    def _judged(self, judge: Callable[[], T], told: str) -> T:
        try:
            self._settle()
            return judge()
        except AssertionError as error:
            error.add_note(told)
            raise

    def _settle(self) -> None:
        """Wait until nobody else is in the host: who brings pages of a tree is, for a while."""
        until = time.monotonic() + _PATIENCE_S
        while left := self._strangers():
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(_POLL_S)

    def _is_whole(self) -> None:
        self._tree.pid = self._host.outer_pid(ROOT_PID)
        self._tree.check()
        for pid in self._tree.pids():
            with suppress(FileNotFoundError, ProcessLookupError):  # a child of a moment
                status = Path(f"/proc/{pid}/status").read_bytes()
                assert b"TracerPid:\t0\n" in status, f"{pid} is traced"
                flags = [
                    line.split()[1:]
                    for line in Path(f"/proc/{pid}/smaps").read_bytes().splitlines()
                    if line.startswith(b"VmFlags:")
                ]
                assert not any(_WATCHED & set(words) for words in flags), f"the memory of {pid} is watched"

    def _holds(self) -> bool:
        return holds(self._host)

    def _strangers(self) -> list[str]:
        with suppress(ProcessLookupError):
            self._tree.pid = self._host.outer_pid(ROOT_PID)
        return strangers(self._host, self._tree)


def _objects(place: str) -> list[str]:
    """The names of what is in a directory, or below a prefix; of what is there not."""
    if "://" in place:
        return object_store.objects(place)
    return os.listdir(place) if os.path.exists(place) else []


def _remove(place: str) -> None:
    if "://" in place:
        object_store.remove(place)
    else:
        shutil.rmtree(place, ignore_errors=True)
