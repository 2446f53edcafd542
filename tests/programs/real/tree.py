"""A program that nobody wrote for this tool, with a load in it: dumped and restored, dumped and left running, moved.

It runs in a "host" of its own (`tests.harness.hosts`), in the user namespaces of a setting, and writes to a
directory that is seen from everywhere. It is not asked anything: a test says how its *progress* is read, a number
that grows while the load works, and what must be true of its results at the end.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness.hosts import Host, inner_pid, serving, terminate, two_hosts
from tests.harness.settings import DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop, children_of, reap, said

#: where every real program is tried
DEPTHS = (DEPTH_1, DEPTH_2)
SOURCES = Path(__file__).with_name("sources")
_POLL_S = 0.01
#: only who waits in vain waits so long, on a machine that does much else
_PATIENCE_S = 60.0
_FIRST_PID = 5000


def needs(*packages: str, modules: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Skip, with the reason, where a command (``command=package of Debian``) or a module of Python is missing."""
    missing = [
        f"{command} (Debian's {package})"
        for command, _, package in (pair.partition("=") for pair in packages)
        if not find(command)
    ]
    missing += [f"the Python module {name}" for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"missing here: {', '.join(missing)}")


def find(command: str) -> str | None:
    """The path of a command that every uid may execute."""
    return shutil.which(command, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")


@dataclass
class RealTree(Tree):
    """A running program and where it runs; `progress` reads a number that grows while it works."""

    host: Host = field(kw_only=True)
    other: Host = field(kw_only=True)
    secret: Path = field(kw_only=True)
    progress: Callable[[Path], int] = field(kw_only=True)
    #: options of dump and migrate, and of restore and serve
    dumping: Sequence[str] = field(default=(), kw_only=True)
    restoring: Sequence[str] = field(default=(), kw_only=True)

    # -- waiting --------------------------------------------------------------------

    def wait(self, what: str, holds: Callable[[], bool], timeout_s: float = _PATIENCE_S) -> None:
        """Wait for a condition; AssertionError with the program's log and states if it does not come."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert self.alive(), f"{what}: the program has ended: {self.log()}"
            assert time.monotonic() < deadline, f"{what}: not in {timeout_s} s: {self.log()}\n{self.states()}"
            time.sleep(_POLL_S)

    def wait_for_file(self, name: str) -> Path:
        """Wait until the program has made a file; its path."""
        path = self.directory / name
        self.wait(f"{name} is made", path.exists)
        return path

    def goes_on(self, steps: int = 1) -> None:
        """Wait until its load has done `steps` more."""
        goal = self.progress(self.directory) + steps
        self.wait(f"the load gets to {goal}", lambda: self.progress(self.directory) >= goal)

    # -- the engine -----------------------------------------------------------------

    def _engine(self, host: Host, *arguments: str | Path) -> None:
        done = host.engine(*arguments)
        assert done.returncode == 0, f"{said(done)}\nlog of the program: {self.log()}"

    @property
    def root(self) -> int:
        """Pid of its root in its host."""
        return inner_pid(self.pid)

    def carry_running(self, image: Path) -> None:
        """Dump it while it runs on, unharmed: the same processes, and the load works."""
        before = self.pids()
        self._engine(
            self.host, "dump", "--pid", str(self.root), "--to", image, "--leave-running", *self.dumping
        )
        assert before[0] == self.pids()[0]
        self.goes_on()

    def carry(self, image: Path) -> None:
        """Dump it; all of it is gone; restore it, and the load works."""
        root, family = self.root, self.pids()
        self._engine(self.host, "dump", "--pid", str(root), "--to", image, *self.dumping)
        left = reap(family)
        assert not left, f"the dump left {left} running"
        stands = self.progress(self.directory)
        self._engine(self.host, "restore", "--from", image, "--detach", *self.restoring)
        self.pid = self.host.outer_pid(root)
        assert self.progress(self.directory) >= stands
        self.goes_on()

    def migrate(self) -> str:
        """Move it to the other host: gone here, there with the pids it had, and the load works.

        Returns what the other side said on its standard error.
        """
        root, family = self.root, self.pids()
        with serving(self.other, self.secret, "--once", *self.restoring) as server:
            to = ["--to", server.address, "--secret-file", str(self.secret)]
            done = self.host.engine("migrate", "--pid", str(root), *to, *self.dumping)
            assert done.returncode == 0, said(done) + str(terminate(server.process))
            _, err = server.has_served()
            assert not reap(family), "the source still runs"
        self.host, self.other = self.other, self.host
        self.pid = self.host.outer_pid(root)
        self.goes_on()
        return err

    def all_ways(self, folder: Path) -> None:
        """Dumped and left running, dumped and restored, moved; the load works all the time."""
        self.goes_on()
        self.carry_running(folder / "running")
        self.carry(folder / "image")
        self.migrate()

    # -- its end --------------------------------------------------------------------

    def finish(self, number: int | None = signal.SIGTERM) -> None:
        """Send its root a signal (None: it ends by itself); all of it must end, and nobody be left."""
        family = self.pids()
        if number is not None:
            os.kill(self.pid, number)
        left = reap(family)
        assert not left, f"left behind: {left}\n{self.states()}\n{self.log()}"


#: a host has terminals of its own: their numbers are exact
_TERMINALS = (
    "mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts"
    " && mount --bind /dev/pts/ptmx /dev/ptmx"
)


@dataclass
class Stage:
    """Two hosts, and what it takes to start a program on one of them."""

    workshop: Workshop
    host: Host
    other: Host
    secret: Path

    def start(
        self,
        setting: Setting,
        command: Sequence[str | Path],
        progress: Callable[[Path], int],
        *,
        directory: Path | None = None,
        sources: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        dumping: Sequence[str] = (),
        restoring: Sequence[str] = (),
    ) -> RealTree:
        """Start a command in `directory` (`Workshop.directory`), which is its HOME and TMPDIR, too.

        `sources`: files of `SOURCES` that are copied there.
        """
        directory = directory or self.workshop.directory()
        for name in sources:
            (directory / name).write_bytes((SOURCES / name).read_bytes())
        program, *words = map(str, command)
        starter = [self.workshop.python, "-S", "-s", "-E", "-B", str(self.workshop.programs / "starter.py")]
        done = self.host.run("sh", "-c", f"echo {_FIRST_PID - 1} > /proc/sys/kernel/ns_last_pid")
        assert done.returncode == 0, done.stderr
        here = [f"-w{directory}" if word.startswith("-w") else word for word in self.host.command()]
        with open(directory / "log", "ab") as log:
            os.chmod(directory / "log", 0o666)
            process = subprocess.Popen(
                [*here, *starter, setting.to_json(), find(program) or program, *words],
                env={
                    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
                    "LANG": "C.UTF-8",
                    "HOME": str(directory),
                    "TMPDIR": str(directory),
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        tree = RealTree(
            directory,
            process.pid,
            host=self.host,
            other=self.other,
            secret=self.secret,
            progress=progress,
            dumping=dumping,
            restoring=restoring,
        )
        # nsenter stays in front of the tree, and ends with it
        tree.wait("it is started", lambda: bool(children_of(process.pid)))
        (tree.pid,) = children_of(process.pid)
        process.returncode = 0  # reaped by `reap`, with all others
        return tree


@contextmanager
def made_stage(workshop: Workshop, secret: Path) -> Iterator[Stage]:
    """Two hosts between which real programs move, ended at the end."""
    # what a program has in /dev/shm is on both hosts, and goes with them
    shared = tempfile.mkdtemp(prefix="pipeline-tests-", dir="/dev/shm")
    os.chmod(shared, 0o1777)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, shared)
        hosts = stack.enter_context(two_hosts())
        for host in hosts:
            done = host.run("sh", "-ec", f"{_TERMINALS}; mount --bind {shared} /dev/shm")
            assert done.returncode == 0, done.stderr
        yield Stage(workshop, *hosts, secret)


@contextmanager
def launching(stage: Stage) -> Iterator[Callable[..., RealTree]]:
    """`Stage.start`; whatever is left of a program is killed at the end."""
    with ExitStack() as stack:

        def launch(*args: object, **kwargs: object) -> RealTree:
            tree = stage.start(*args, **kwargs)  # type: ignore[arg-type]
            stack.callback(tree.kill)
            return tree

        yield launch


def count_in(name: str) -> Callable[[Path], int]:
    """Progress that a load writes into a file as a decimal number; 0 while there is none."""

    def read(directory: Path) -> int:
        try:
            words = (directory / name).read_text().split()
        except FileNotFoundError:
            return 0
        return int(words[-1]) if words else 0

    return read


def lines_of(name: str) -> Callable[[Path], int]:
    """Progress that is the number of lines of a file."""

    def read(directory: Path) -> int:
        try:
            return (directory / name).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    return read
