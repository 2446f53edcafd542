"""Migrations that are disturbed: either side is interrupted, killed or stopped, or the network is cut, at some moment.

When all has settled the tree runs in exactly one place and everything in it is right, and nothing else is left in
either host. A tree that only a side could have completed that was killed may be lost, if the other one says that it is.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tests.harness.hosts import Host, Server, inside, kill_inside, serving, terminate
from tests.harness.tree import Tree, family_of
from tests.harness.wire import Wire

ROOT_PID = 5000
#: the source gives a destination up within a minute, and tells it for some seconds that it has
_PATIENCE_S = 150.0
_POLL_S = 0.05
#: until then a command has not begun to work
START_S = 0.15
#: faster than any loopback; and so slow that a tree runs for a while without its pages
_FAST, _SLOW = 1e12, 2e7

Outcome = Literal["here", "there", "lost"]
Side = Literal["source", "server"]


class Scene(NamedTuple):
    """What there is to disturb, and dice; a command by itself is the source."""

    dice: random.Random
    source: subprocess.Popen[str]
    server: Server | None = None
    wire: Wire | None = None

    def command_of(self, side: Side) -> subprocess.Popen[str]:
        if side == "source":
            return self.source
        assert self.server is not None
        return self.server.process

    def network(self) -> Wire:
        assert self.wire is not None
        return self.wire


def _signal(side: Side, number: int) -> Callable[[Scene], None]:
    def send(scene: Scene) -> None:
        with suppress(ProcessLookupError, ValueError, FileNotFoundError):  # it has ended
            kill_inside(scene.command_of(side), number)

    return send


def _kill_a_helper(side: Side) -> Callable[[Scene], None]:
    """One of the processes that it works by, which are its own forks, if there are any just now."""

    def kill(scene: Scene) -> None:
        with suppress(ProcessLookupError, ValueError, FileNotFoundError):
            command = inside(scene.command_of(side))
            program = os.readlink(f"/proc/{command}/exe")
            below = [pid for pid in family_of(command)[1:] if os.readlink(f"/proc/{pid}/exe") == program]
            if below:
                os.kill(scene.dice.choice(below), signal.SIGKILL)

    return kill


def _cut_for(seconds: float) -> Callable[[Scene], None]:
    def cut(scene: Scene) -> None:
        scene.network().cut()
        time.sleep(seconds)
        scene.network().mend()

    return cut


def _stop_for(side: Side, seconds: float) -> Callable[[Scene], None]:
    """It does nothing at all for so long, as on a host that has no time for it."""

    def stop(scene: Scene) -> None:
        _signal(side, signal.SIGSTOP)(scene)
        time.sleep(seconds)
        _signal(side, signal.SIGCONT)(scene)
        scene.command_of(side).send_signal(signal.SIGCONT)  # nsenter(1) has stopped with its child

    return stop


DISTURBANCES: dict[str, Callable[[Scene], None]] = {
    "nothing": lambda _: None,
    "source interrupted": _signal("source", signal.SIGINT),
    "source terminated": _signal("source", signal.SIGTERM),
    "source killed": _signal("source", signal.SIGKILL),
    "server interrupted": _signal("server", signal.SIGINT),
    "server killed": _signal("server", signal.SIGKILL),
    "helper of the source killed": _kill_a_helper("source"),
    "helper of the server killed": _kill_a_helper("server"),
    "source stopped for a while": _stop_for("source", 1.5),
    "server stopped for a while": _stop_for("server", 1.5),
    "source stopped for long": _stop_for("source", 15),
    "server stopped for long": _stop_for("server", 15),
    "network cut": lambda scene: scene.network().cut(),
    "network cut for a moment": _cut_for(0.02),
    "network cut for a while": _cut_for(1.5),
}


@dataclass
class Told:
    """What a process says on its standard error, as it comes."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def says(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def join(self) -> None:
        self._thread.join()


def holds(host: Host) -> bool:
    """Whether there is a tree in a host, running or not."""
    try:
        pid = host.outer_pid(ROOT_PID)
        return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def strangers(host: Host, tree: Tree) -> list[str]:
    """Who else is in a host: neither its first process nor of the tree."""
    found = []
    for pid in host.pids() - {host.init, *family_of(tree.pid)}:
        with suppress(OSError):
            found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()!r}")
    return found


class Journey:
    """A tree that is moved there and back between two hosts, and disturbed."""

    def __init__(self, source: Host, destination: Host, tree: Tree, secret: Path, mode: str) -> None:
        self.tree = tree
        self._source, self._destination = source, destination
        self._secret, self._mode = secret, mode
        self._is_lazy = mode in {"postcopy", "hybrid"}
        #: how long the command takes if nothing disturbs it
        self._usual_s = 0.0

    def go(self) -> None:
        """Move it; nothing disturbs it."""
        self.disturbed("nothing", 0.0, _FAST, random.Random())

    def disturb(self, dice: random.Random, name: str | None = None) -> Outcome:
        """Move it, which something disturbs at some moment, over a network that may be slow; see `disturbed`.

        `name`: of the disturbance; dice choose without one.
        """
        chosen = name or dice.choice([name for name in DISTURBANCES if name != "nothing"])
        after_s = dice.uniform(dice.choice((START_S, self._usual_s / 2)), self._usual_s)
        return self.disturbed(chosen, after_s, dice.choice((_FAST, _FAST, _SLOW)), dice)

    def disturbed(self, name: str, after_s: float, bytes_per_s: float, dice: random.Random) -> Outcome:
        """Move it, and let something happen so long behind the begin of the command.

        Returns:
            Whether it is still here, or there, which is then here; or lost, as somebody said.

        Raises:
            AssertionError: anything else.
        """
        attempt = _Attempt(self._source, self._destination, self.tree, name, self._is_lazy)
        try:
            outcome = attempt.run(self._secret, self._mode, after_s, bytes_per_s, dice)
        except AssertionError as error:
            error.add_note(f"{self._mode}, {name} after {after_s:.3f} s, at {bytes_per_s:.0e} bytes/s")
            error.add_note(f"the source ended with {attempt.code}; {attempt.told}")
            raise
        if name == "nothing":
            self._usual_s = attempt.lasted_s
        if outcome == "there":
            self._source, self._destination = self._destination, self._source
        return outcome


class _Attempt:
    """One migration, and what became of it. `is_lazy`: pages come later."""

    def __init__(self, source: Host, destination: Host, tree: Tree, name: str, is_lazy: bool) -> None:
        self._source, self._destination, self._tree = source, destination, tree
        self._name, self._is_lazy = name, is_lazy
        #: the exit code of the source, and how long it took
        self.code: int | None = None
        self.lasted_s = 0.0
        #: the lines of either side
        self.told: dict[str, list[str]] = {}

    def run(
        self, secret: Path, mode: str, after_s: float, bytes_per_s: float, dice: random.Random
    ) -> Outcome:
        with serving(self._destination, secret) as server, Wire(server.address, bytes_per_s) as wire:
            begin = time.monotonic()
            migrate = ("migrate", "--pid", str(ROOT_PID), "--to", wire.address, "--mode", mode)
            migration = subprocess.Popen(
                self._source.command(sys.executable, "-m", "pipeline", *migrate, "--secret-file", secret),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            scene = Scene(dice, migration, server, wire)
            says = {"source": Told(migration), "server": Told(server.process)}
            self.told = {side: told.lines for side, told in says.items()}
            try:
                time.sleep(after_s)
                DISTURBANCES[self._name](scene)
                self._wait_for_the_source(scene)
                self.lasted_s = time.monotonic() - begin
                outcome = self._settle(scene, says["server"])
                self._end_server(scene)
            finally:
                terminate(server.process)
                terminate(migration)
                for told in says.values():
                    told.join()
        return self._judged(outcome)

    def _wait_for_the_source(self, scene: Scene) -> None:
        """A source that waits for a network gets it; one that waits for who is dead gets a signal."""
        begin = time.monotonic()
        while scene.source.poll() is None:
            waited_s = time.monotonic() - begin
            assert waited_s < _PATIENCE_S, "the source does not come to an end"
            if self._is_lazy and waited_s > 3:
                scene.network().mend()
            if waited_s > 6 and scene.command_of("server").poll() is not None:
                _signal("source", signal.SIGINT)(scene)
                time.sleep(1)
            time.sleep(_POLL_S)
        self.code = scene.source.returncode

    def _settle(self, scene: Scene, server: Told) -> Outcome:
        """Wait until the tree is in one place, or none; decide like a person what the server says is in doubt."""
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            here, there = holds(self._source), holds(self._destination)
            if here and not there:
                return "here"
            if server.says("in doubt") and scene.command_of("server").poll() is None:
                _signal("server", signal.SIGINT if here else signal.SIGUSR1)(scene)
                time.sleep(0.5)
                if not here:
                    return "there"
            elif there and not here:
                return "there"
            elif not there:
                return "lost"
            time.sleep(_POLL_S)
        raise AssertionError("the tree is in both places")

    def _end_server(self, scene: Scene) -> None:
        """Ask it to end; once more, if it waits for pages that nobody has any more."""
        begin, asked = time.monotonic(), 0
        while scene.command_of("server").poll() is None:
            waited_s = time.monotonic() - begin
            assert waited_s < 30, "the server does not end"
            is_orphan = self._name == "source killed" and self._is_lazy
            if asked == 0 or (asked == 1 and is_orphan and waited_s > 5):
                _signal("server", signal.SIGTERM)(scene)
                asked += 1
            time.sleep(_POLL_S)

    def _judged(self, outcome: Outcome) -> Outcome:
        place = self._destination if outcome == "there" else self._source
        if outcome == "lost" or not holds(place):
            assert self._name in {"source killed", "server killed"}, "the tree is lost"
            said = "".join(line for lines in self.told.values() for line in lines)
            assert "in doubt" in said or "pages of it were missing" in said, "the tree is lost in silence"
            return "lost"
        self._tree.pid = place.outer_pid(ROOT_PID)
        assert self._name != "nothing" or outcome == "there", "nothing was in its way"
        assert self.code != 0 or outcome == "there", "it says that the tree is there"
        assert self.code not in {1, 3, 130, 143} or outcome == "here", "it says that the tree is here"
        self._tree.check()
        for host in (self._source, self._destination):
            until = time.monotonic() + 10
            while left := strangers(host, self._tree):
                assert time.monotonic() < until, f"left behind: {left}"
                time.sleep(_POLL_S)
        return outcome
