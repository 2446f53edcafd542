"""A running test program, and the engine's commands on it.

`Workshop` is made once per test session: a directory that every uid can reach, with
the programs copied and compiled into it. `Tree` is one running program: it is asked
through files in a directory of its own (see `tests/programs/support.py`). `dump`,
`restore` and `migrate` run the engine as a user does, by its command line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.settings import DEPTH_0, Setting

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
STARTER = Path(__file__).with_name("starter.py")
_POLL_S = 0.005
#: only who waits in vain waits so long, on a machine that does much else
SLOWNESS = os.environ.get("PIPELINE_TEST_SLOW", "1")
PATIENCE_S = 60.0 * float(SLOWNESS)


def find_python() -> str:
    """A Python >= 3.11 that every uid may execute (an interpreter below /root is of no use in a namespace)."""
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable):
        path = os.path.realpath(candidate)
        if os.access(path, os.X_OK) and all(os.stat(p).st_mode & 1 for p in Path(path).parents):
            return path
    return os.path.realpath(sys.executable)


class Workshop:
    """The programs, ready to run, in a directory of mode 0755; `remove` deletes all of it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pipeline-tests-", dir="/tmp"))
        self.path.chmod(0o755)
        self.programs = self.path / "programs"
        shutil.copytree(PROGRAMS, self.programs, ignore=shutil.ignore_patterns("__pycache__", "real"))
        shutil.copy(STARTER, self.programs)
        # All of it at once, unwritable and with old times, so that a program's files are not "just changed".
        for path in self.programs.iterdir():
            path.chmod(0o644)
        self.python = find_python()
        self._count = 0

    def command(self, program: str) -> list[str]:
        """How `program` (a file's stem) is executed; programs in C are compiled when first used."""
        script = self.programs / f"{program}.py"
        if script.exists():
            return [self.python, "-S", "-s", "-E", "-B", str(script)]
        source, binary = self.programs / f"{program}.c", self.programs / program
        if not binary.exists():
            compiler = [
                "cc",
                "-O1",
                "-pthread",
                "-Wall",
                "-Wno-unused-function",
                "-o",
                str(binary),
                str(source),
            ]
            done = subprocess.run(compiler, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{source.name}: {done.stderr}")
        return [str(binary)]

    def directory(self) -> Path:
        """A new directory in which every uid may write."""
        self._count += 1
        path = self.path / f"run{self._count}"
        path.mkdir()
        path.chmod(0o777)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def has_kernel_threads() -> bool:
    """Whether pid 2 is the kernel's; in a pid namespace it is somebody else."""
    try:
        return Path("/proc/2/comm").read_text() == "kthreadd\n"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Host pids of the children of every thread of `pid`."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def family_of(pid: int) -> list[int]:
    """`pid` and all its descendants (host pids), zombies too, breadth first."""
    family = [pid] if os.path.exists(f"/proc/{pid}") else []
    for member in family:
        family += [child for child in sorted(children_of(member)) if child not in family]
    return family


def reap(pids: Sequence[int], timeout_s: float = PATIENCE_S) -> list[int]:
    """Wait for `pids` to be gone, reaping those that are our children; those left at the end."""
    deadline = time.monotonic() + timeout_s
    left = list(pids)
    while True:
        still = []
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if os.path.exists(f"/proc/{pid}"):
                still.append(pid)
        left = still
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)


@dataclass
class Tree:
    """A running test program: `pid` is the host pid of the root of its tree."""

    directory: Path
    pid: int
    asked: int = 0
    roles: list[str] = field(default_factory=list)
    #: names of all checks, as the programs announced them
    checks: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        workshop: Workshop,
        program: str,
        setting: Setting = DEPTH_0,
        arguments: Sequence[str] = (),
        within: Sequence[str] = (),
    ) -> Tree:
        """Start `program` and wait until all its roles are ready. RuntimeError with its log if it is not.

        `within`: a command that runs its arguments in a child elsewhere (nsenter); the tree is that child then.
        """
        directory = workshop.directory()
        starter = [workshop.python, "-S", "-s", "-E", "-B", str(workshop.programs / "starter.py")]
        command = [
            *within,
            *starter,
            setting.to_json(),
            *workshop.command(program),
            str(directory),
            *arguments,
        ]
        with open(directory / "log", "ab") as log, open(os.devnull, "rb") as null:
            os.chmod(directory / "log", 0o666)
            environment = {
                "PATH": "/usr/bin:/bin",
                "LANG": "C",
                "TEST_PROGRAM": program,
                "PIPELINE_TEST_SLOW": SLOWNESS,
            }
            pid = os.posix_spawnp(
                command[0],
                command,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=range(1, 32),
            )
        tree = cls(directory, pid)
        try:
            tree._wait_ready()
            if within:
                (tree.pid,) = children_of(pid)
        except BaseException:
            tree.kill()
            raise
        return tree

    def _wait_ready(self) -> None:
        # The first role is ready last: it waits for its children.
        self.wait_for(self.directory / "ready.main")
        for path in sorted(self.directory.glob("ready.*")):
            self.roles.append(path.name.removeprefix("ready."))
            self.checks += path.read_text().split("\n") if path.stat().st_size else []
        self.checks = [name for name in self.checks if name]

    def wait_for(self, path: Path, timeout_s: float = PATIENCE_S) -> None:
        """Wait for a file that the program makes."""
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if not self.alive():
                raise RuntimeError(f"the program ended instead of making {path.name}: {self.log()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {path.name} after {timeout_s} s: {self.log()}\n{self.states()}")
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        try:
            return (
                Path(f"/proc/{self.pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0] not in "ZX"
            )
        except OSError:
            return False

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace").strip()

    def states(self) -> str:
        lines = []
        for pid in self.pids():
            try:
                stat = Path(f"/proc/{pid}/stat").read_text("latin-1").split("(", 1)[1].rpartition(")")
                where = Path(f"/proc/{pid}/syscall").read_text().strip()
                wchan = Path(f"/proc/{pid}/wchan").read_text()
                lines.append(f"pid {pid} ({stat[0]}) {stat[2].split()[0]} {wchan} in {where}")
            except OSError as error:
                lines.append(f"pid {pid}: {error}")
        return "\n".join(lines)

    def pids(self) -> list[int]:
        return family_of(self.pid)

    def ask(self, request: str) -> list[str]:
        """Ask every role; the lines of all answers. RuntimeError if one does not answer."""
        self.asked += 1
        temporary = self.directory / ".request"
        temporary.write_text(request)
        temporary.rename(self.directory / f"request.{self.asked}")
        if request == "end":
            return []
        lines: list[str] = []
        for role in self.roles:
            answer = self.directory / f"answer.{self.asked}.{role}"
            self.wait_for(answer)
            lines += [line for line in answer.read_text().split("\n") if line]
        return lines

    def check(self) -> None:
        """Every check of every role says that all is well, or AssertionError with the differences."""
        differences = self.ask("check")
        assert not differences, "\n".join(["differences:", *differences, f"log: {self.log()}"])

    def end(self) -> int:
        """Ask it to end; returns the exit code of the root. It must end by itself and leave nobody."""
        family = self.pids()
        self.ask("end")
        deadline = time.monotonic() + PATIENCE_S
        while self.alive():
            assert time.monotonic() < deadline, f"did not end: {self.states()} {self.log()}"
            time.sleep(_POLL_S)
        _, status = os.waitpid(self.pid, 0)
        left = reap(family)
        assert not left, f"left behind: {left}"
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """Kill whatever is there."""
        for _ in range(3):
            family = self.pids()
            for pid in family:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not reap(family, 5.0):
                return


def engine(
    *arguments: str | Path, timeout_s: float = 2 * PATIENCE_S, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ARGUMENTS`, with its output, in what the command `within` enters before."""
    return subprocess.run(
        [*within, sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.args[3:]} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"


def dump(tree: Tree, image: Path | str, *options: str) -> None:
    """Dump `tree`, which ends it; all its processes are gone and reaped afterwards."""
    family = tree.pids()
    done = engine("dump", "--pid", tree.pid, "--to", image, *options)
    assert done.returncode == 0, said(done)
    left = reap(family)
    assert not left, f"the dump left {left} running"


def restore(tree: Tree, image: Path | str, *options: str) -> None:
    """Restore `tree` from `image` with the pids it had.

    Another program of this machine may have taken one of them meanwhile: then it is tried again for a moment.
    """
    pidfile = tree.directory / "pid"
    for _ in range(5):
        done = engine("restore", "--from", image, "--detach", "--pidfile", pidfile, *options)
        if done.returncode == 0 or "in use" not in done.stderr:
            break
        time.sleep(0.5)
    assert done.returncode == 0, said(done)
    assert int(pidfile.read_text()) == tree.pid, "the root has another pid"
    pidfile.unlink()
