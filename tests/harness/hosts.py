"""Two "hosts" on one machine: each a pid and a mount namespace of its own with its own /proc.

What runs in one does not see the other, so a tree can be on both with the same pids, as
it is for a moment in every migration. Files and the network are shared.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.carry import assert_same
from tests.harness.settings import Setting
from tests.harness.tree import PATIENCE_S, ROOT, Tree, Workshop, children_of, family_of, reap, said

#: the first process: orphans that come to it are reaped by the kernel
_INIT = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)


class Host:
    """A running "host"; `close` ends all that is in it."""

    def __init__(self) -> None:
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            sys.executable,
            "-c",
            _INIT,
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        try:
            assert self._process.stdout.readline() == b"up\n", "the host's first process did not start"
            (self.init,) = children_of(self._process.pid)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        family = family_of(self._process.pid)
        self._process.kill()
        self._process.wait()
        reap(family)

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line that runs `arguments` in this host."""
        return ["nsenter", "-t", str(self.init), "-p", "-m", "-w" + str(ROOT), "--", *map(str, arguments)]

    def run(
        self, *arguments: str | Path, timeout_s: float = 2 * PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )

    def engine(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """`python -m pipeline ARGUMENTS` in this host."""
        return self.run(sys.executable, "-m", "pipeline", *arguments)

    def start(
        self,
        workshop: Workshop,
        program: str,
        setting: Setting,
        first_pid: int,
        arguments: Sequence[str] = (),
    ) -> Tree:
        """Start a program in this host, with pids from `first_pid` on."""
        self.go_on_from(first_pid)
        return Tree.start(workshop, program, setting, arguments, within=self.command())

    def go_on_from(self, pid: int) -> None:
        """Let `pid` be the next number that is given out in this host."""
        done = self.run("sh", "-c", f"echo {pid - 1} > /proc/sys/kernel/ns_last_pid")
        assert done.returncode == 0, done.stderr

    def snapshot(self, root: int) -> dict[str, Any]:
        """What /proc in this host says of the tree of `root`, a pid of this host."""
        done = self.run(sys.executable, "-m", "tests.harness.snapshot", str(root))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def outer_pid(self, pid: int) -> int:
        """The pid outside of the process that has `pid` in this host."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                lines = Path(f"/proc/{name}/status").read_text("latin-1").splitlines()
                (numbers,) = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
                below = [os.readlink(f"/proc/{name}/ns/pid")]
            except OSError:
                continue
            if (
                len(numbers) >= 2
                and numbers[1] == str(pid)
                and (below == [namespace] or self._holds(int(name)))
            ):
                return int(name)
        raise ProcessLookupError(f"no process has pid {pid} in this host")

    def pids(self) -> set[int]:
        """All processes in this host and in pid namespaces below it, by their pids outside."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = set()
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace or self._holds(pid):
                    found.add(pid)
            except OSError:
                continue
        return found

    def _holds(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.init:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[1])
        return False


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two of them, ended at the end."""
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            found.append(Host())
            stack.callback(found[-1].close)
        yield found[0], found[1]


def write_secret(path: Path) -> Path:
    """Make the file of a secret that is good enough; its path."""
    path.write_text("a secret that is long enough for both sides\n")
    path.chmod(0o600)
    return path


@dataclass
class Server:
    """A running `serve`, and where it listens."""

    process: subprocess.Popen[str]
    address: str

    def has_served(self) -> tuple[str, str]:
        """Wait for the end of one that serves once; it must be a good one. What it said."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, err
        return out, err


#: where the numbers of servers begin, one after the other
_NUMBERS = itertools.cycle((12_000, 19_000, 26_000))


@contextmanager
def serving(
    host: Host,
    secret: Path,
    *options: str | Path,
    within: Sequence[str] = (),
    tool: Sequence[str] = ("pipeline",),
) -> Iterator[Server]:
    """`serve` in a host, and in what the command `within` enters before; ended at the end. `tool`: its module.

    It and its helpers have no numbers that processes may have which are born in the tree until it is here.
    """
    host.go_on_from(next(_NUMBERS))
    serve = ["serve", "--listen", "127.0.0.1:0", "--secret-file", secret, *options]
    process = subprocess.Popen(
        [*within, *host.command(sys.executable, "-m", *tool, *serve)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), f"{line} {terminate(process)}"
        yield Server(process, line.split()[-1])
    finally:
        terminate(process)


def inner_pid(pid: int) -> int:
    """The pid in its host of a process, of which `pid` is the one outside."""
    lines = Path(f"/proc/{pid}/status").read_text("latin-1").splitlines()
    (numbers,) = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
    return int(numbers[1])


def migrate(
    source: Host,
    destination: Host,
    tree: Tree,
    secret: Path,
    *options: str,
    compare: bool = True,
    tool: Sequence[str] = ("pipeline",),
) -> dict[str, Any]:
    """Move `tree` from one host to the other: gone here, with the same pids there, and what it was.

    Returns what `migrate --json` says. `compare`: /proc says the same of it before and after. `tool`: see `serving`.

    `tree.pid` is then the pid outside of its root in the other host.
    """
    root, family = inner_pid(tree.pid), tree.pids()
    before = source.snapshot(root) if compare else {}
    with serving(destination, secret, "--once", tool=tool) as server:
        options = ("--to", server.address, "--secret-file", str(secret), "--json", *options)
        done = source.engine("migrate", "--pid", str(root), *options)
        assert done.returncode == 0, said(done) + str(terminate(server.process))
        out, _ = server.has_served()
        assert f"restored: root pid {root}" in out
        assert not reap(family), "the source still runs"
    tree.pid = destination.outer_pid(root)
    after = destination.snapshot(root) if compare else {}
    assert_same_tree(before, after, root)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def assert_same_tree(before: dict[str, object], after: dict[str, object], root: int) -> None:
    """Nothing that /proc says of a tree in one host differs from what it says in the other."""
    # the parent of the root is outside of the tree: nsenter, in no host, and then the first process of the other
    for found in (before, after):
        for key in [k for k in found if k.startswith(f"{root} ") and k.endswith((".ppid", ".PPid"))]:
            del found[key]
    assert_same(before, after)


def kill_inside(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to the command that `Host.command` runs."""
    os.kill(inside(process), number)


def inside(process: subprocess.Popen[str]) -> int:
    """The pid outside of the command that `Host.command` runs. ValueError: it has ended."""
    (child,) = children_of(process.pid)
    return child


def kill_guard(server: Server, number: int) -> None:
    """Send a signal to the process that watches over the tree of a server whose pages come later."""
    (guard,) = (pid for pid in family_of(inside(server.process)) if b"guard_program" in _command_of(pid))
    os.kill(guard, number)


def _command_of(pid: int) -> bytes:
    """What /proc says that a process was called with; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def terminate(process: subprocess.Popen[str]) -> Sequence[str]:
    """End a command that was started with `Host.command`, and what it said."""
    for child in children_of(process.pid):
        os.kill(child, signal.SIGTERM)
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()
