"""The engine's commands as a user types them, and the programs that they are given."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.matrix import Failed
from tests.harness.tree import find_python, reap

TOOL = [sys.executable, "-m", "pipeline"]
_WRITING = Path(__file__).with_name("writing.py")
_PATIENCE_S = 120.0
#: of a restore
_TRIES, _PAUSE_S = 5, 0.5
#: between two looks at the memory of a command
_LOOK_S = 0.01


def wait_for(pid: int, holds: Callable[[], bool], log: Path) -> None:
    """Wait until something holds; Failed, with its log, if a program ends before that or nothing comes."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        if not Path(f"/proc/{pid}").exists():
            raise Failed(f"the program to measure has ended: {log.read_text()}")
        if time.monotonic() > deadline:
            raise Failed(f"nothing in {_PATIENCE_S} s: {log.read_text()}")
        time.sleep(0.005)


def kill(pid: int) -> None:
    """End a process, and wait until its pid is free."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    if reap([pid]):
        raise Failed(f"process {pid} does not end")


def longest_gap_ms(log: Path, since: float) -> float:
    """The longest gap that a program has logged (``gap MS at TIME``) since a time of day; 0 if it logged none."""
    text = log.read_text() if log.exists() else ""
    gaps = re.findall(r"^gap ([\d.]+) at ([\d.]+)$", text, re.MULTILINE)
    return max((float(gap) for gap, at in gaps if float(at) >= since), default=0.0)


@dataclass
class Writer:
    """A running `bench.writing`, in a session of its own; `pid` changes where it goes elsewhere."""

    pid: int
    log: Path

    @classmethod
    @contextmanager
    def started(
        cls,
        folder: Path,
        mib: int,
        rate: float = 0,
        *,
        nested: bool = True,
        busy: bool = False,
        shared: bool = False,
    ) -> Iterator[Writer]:
        """It runs, ready, until the end of the block.

        Args:
            rate: MB/s that it writes.
            nested: in a user namespace of its own.
            busy: it computes where it would sleep.
            shared: its memory is not private.
        """
        log = folder / "writer.log"
        words = [*["busy"] * busy, *["shared"] * shared]
        command = [find_python(), "-S", "-E", str(_WRITING), str(mib), f"{rate:g}", *words]
        with log.open("wb") as out:
            if nested:
                pidfile = folder / "writer.pid"
                run = [*TOOL, "run", "--userns", "--detach", "--pidfile", str(pidfile), "--"]
                subprocess.run([*run, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=True)
                pid = int(pidfile.read_text())
            else:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
                process.returncode = 0  # reaped by `kill`, wherever it comes from then
                pid = process.pid
        writer = cls(pid, log)
        try:
            wait_for(pid, lambda: "ready\n" in log.read_text(), log)
            yield writer
        finally:
            kill(writer.pid)

    def is_whole(self) -> bool:
        """Whether it finds all of its memory as it left it."""
        before = self.log.read_text().count("checked ")
        os.kill(self.pid, signal.SIGUSR1)
        wait_for(self.pid, lambda: len(self._found()) > before, self.log)
        return self._found()[-1] == "0"

    def _found(self) -> list[str]:
        return re.findall(r"^checked \d+ wrong (\d+)$", self.log.read_text(), re.MULTILINE)


def measured(*words: str | Path) -> dict[str, Any]:
    """Run a command with --json; its figures, with the root's pid, its whole duration and its peak memory.

    Raises:
        Failed: its exit code is not 0.
    """
    command = [*TOOL, *map(str, words), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        peak_bytes = _peak_bytes(process.pid)
        code = process.wait()
        lasted_s = time.monotonic() - begin
        out.seek(0)
        err.seek(0)
        if code:
            said = err.read().decode(errors="replace")
            raise Failed(f"{' '.join(map(str, words))}: exit code {code}\n{said}")
        document = json.load(out)
    return {
        **document["figures"],
        "root-pid": document["root_pid"],
        "command-time": 1e3 * lasted_s,
        "peak-bytes": peak_bytes,
    }


def restored(image: Path) -> dict[str, Any]:
    """Restore an image with the pids that it has; tried again while somebody else of this machine has one of them."""
    for _ in range(_TRIES - 1):
        try:
            return measured("restore", "--from", image, "--detach")
        except Failed as failed:
            if "is in use here" not in str(failed):
                raise
            time.sleep(_PAUSE_S)
    return measured("restore", "--from", image, "--detach")


def _peak_bytes(pid: int) -> int:
    """Wait for the end of a child, which stays a zombie; the most memory that was seen to be resident in it.

    What wait4(2) tells of that is no less than its parent's, because it counts from before exec.
    """
    peak = 0
    pidfd = os.pidfd_open(pid)
    try:
        while not select.select([pidfd], [], [], _LOOK_S)[0]:
            peak = max(peak, _high_water_bytes(pid))
    finally:
        os.close(pidfd)
    return peak


def _high_water_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def idle_bytes() -> int:
    """Peak memory of the interpreter with a dump's imports, doing nothing."""
    program = "import sys, pipeline.dump, pipeline.cli.dump; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return _high_water_bytes(process.pid)


@dataclass
class Server:
    """A running `serve`: where it listens, and the file of its events."""

    address: str
    events: Path
    _process: subprocess.Popen[str]

    def restored(self) -> int:
        """The pid of the root of the next tree that arrives; it must be on its way."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("restored: root pid "):
                return int(line.rpartition(" ")[2])
        raise Failed("serve has ended, and no tree has arrived")


@contextmanager
def serving(folder: Path, secret: Path, *options: str) -> Iterator[Server]:
    """`serve` on loopback, with pids of its own for each tree: source and destination share this machine."""
    events = folder / "serve.events"
    listen = ["serve", "--listen", "127.0.0.1:0", "--secret-file", str(secret), "--new-pidns"]
    err = folder / "serve.err"
    with err.open("w") as said:
        process = subprocess.Popen(
            [*TOOL, *listen, "--events", str(events), *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first.startswith("listening on "):
            raise Failed(f"serve: {err.read_text()}")
        yield Server(first.split()[-1], events, process)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def migrated(writer: Writer, server: Server, secret: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Move a writer to `server`, where its pid is then; what `migrate` says."""
    to = ("--to", server.address, "--secret-file", str(secret))
    figures = measured("migrate", "--pid", str(writer.pid), *to, *options)
    reap([writer.pid])
    writer.pid = server.restored()
    return figures
