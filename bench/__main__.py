"""The figures of the README: `make bench`, or `python -m bench [--rounds 5] [--mib 1024]`; `--scale`: how they grow;
`--frozen`: how long a small tree stands still; `--live`: what a program feels that is moved while it writes.

Each figure is the median over the rounds, of whole commands as a user types them, the
start of the interpreter included; times inside of a command are its own ``--json``.
Images go to tmpfs (/dev/shm). Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOL = [sys.executable, "-m", "pipeline"]
SMALL = "import time; print('ready', flush=True); time.sleep(1e6)"
LARGE = (
    "import os, sys, time\n"
    "memory = bytearray()\n"
    "for _ in range(int(sys.argv[1])): memory += os.urandom(1 << 20)\n"
    "print('ready', flush=True); time.sleep(1e6)"
)


def start(folder: Path, program: str, *words: str) -> int:
    """Start a Python program in a user namespace and a session of its own; returns its pid when it is ready."""
    log = folder / "log"
    with log.open("w") as out:
        command = [*TOOL, "run", "--userns", "--detach", "--pidfile", str(folder / "pid"), "--"]
        subprocess.run([*command, sys.executable, "-c", program, *words], check=True, stdout=out, stderr=out)
    pid = int((folder / "pid").read_text())
    wait_for(pid, lambda: "ready" in log.read_text(), log)
    return pid


def wait_for(pid: int, holds: Callable[[], bool], log: Path) -> None:
    """Wait until a program is ready; SystemExit with what it said if it ends before that."""
    while not holds():
        if not Path(f"/proc/{pid}").exists():
            raise SystemExit(f"the program to measure has ended: {log.read_text()}")
        time.sleep(0.01)


def kill(pid: int) -> None:
    """End a program and wait until its pid is free."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.005)


def measured(*words: str) -> dict[str, Any]:
    """Run a command with --json; its figures, with its whole duration and its peak memory."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([*TOOL, *words, "--json"], stdout=out, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{said}")
        out.seek(0)
        figures: dict[str, Any] = json.load(out)["figures"]
    figures["command-time"] = 1e3 * (time.monotonic() - begin)
    figures["peak-bytes"] = usage.ru_maxrss * 1024
    return figures


def median(rounds: list[dict[str, Any]], name: str) -> float:
    """Of a figure over the rounds; not a number where a command does not tell it."""
    values = [figures[name] for figures in rounds if name in figures]
    return statistics.median(values) if values else float("nan")


def idle_bytes() -> int:
    """Peak memory of the interpreter with the same imports, doing nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import trio, msgspec, msgpack, xxhash, pipeline.dump"])
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_maxrss * 1024


def there_and_back(folder: Path, rounds: int, program: str, *words: str) -> tuple[list[Any], list[Any]]:
    """Dump to tmpfs and restore, again and again."""
    dumps, restores = [], []
    for _ in range(rounds):
        image = folder / "image"
        pid = start(folder, program, *words)
        try:
            dumps.append(measured("dump", "--pid", str(pid), "--to", str(image)))
            kill(pid)
            restores.append(measured("restore", "--from", str(image), "--detach"))
        finally:
            kill(pid)
            shutil.rmtree(image, ignore_errors=True)
    return dumps, restores


@contextmanager
def serving(folder: Path, secret: Path, *options: str) -> Iterator[str]:
    """`serve --once` on loopback, with pids of its own: source and destination share this machine."""
    command = [
        *TOOL,
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--secret-file",
        str(secret),
        "--once",
        "--new-pidns",
    ]
    with (
        (folder / "serve.err").open("w") as err,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=err, text=True) as server,
    ):
        assert server.stdout is not None
        first = server.stdout.readline()
        if not first.startswith("listening on "):
            raise SystemExit(f"serve: {(folder / 'serve.err').read_text()}")
        try:
            yield first.removeprefix("listening on ").strip()
            said = server.stdout.read()
            for line in said.splitlines():
                if line.startswith("restored: root pid "):
                    kill(int(line.rpartition(" ")[2]))
        finally:
            server.kill()


def migration_secret(folder: Path) -> Path:
    """The file of a secret for both sides."""
    secret = folder / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    return secret


def migrations(folder: Path, rounds: int, mib: int, *options: str) -> list[dict[str, Any]]:
    """Move a program over loopback."""
    secret = migration_secret(folder)
    results = []
    for _ in range(rounds):
        pid = start(folder, LARGE, str(mib))
        try:
            with serving(folder, secret, *options) as to:
                results.append(
                    measured("migrate", "--pid", str(pid), "--to", to, "--secret-file", str(secret), *options)
                )
        finally:
            kill(pid)
    return results


def report(title: str, dumps: list[Any], restores: list[Any]) -> None:
    """The lines of one program."""
    carried = median(dumps, "page-bytes")
    print(f"{title}: {carried / 1e6:.1f} MB of pages")
    print(
        f"  dump     {median(dumps, 'command-time'):8.0f} ms whole, {median(dumps, 'downtime'):8.1f} ms frozen, "
        f"{median(dumps, 'injected-calls'):.0f} calls injected"
    )
    print(
        f"  restore  {median(restores, 'command-time'):8.0f} ms whole, {median(restores, 'total-time'):8.1f} ms its own"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="random memory of the large program")
    parser.add_argument("--no-migrate", action="store_true")
    parser.add_argument(
        "--scale", action="store_true", help="only: growing numbers of descriptors, mappings, pages"
    )
    parser.add_argument("--frozen", action="store_true", help="only: how long a small tree stands still")
    parser.add_argument("--live", action="store_true", help="only: programs that write, by every mode")
    parser.add_argument("--results", type=Path, help="with --live: the results as JSON")
    arguments = parser.parse_args()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm, prefix="pipeline-bench-") as name:
        folder = Path(name)
        if arguments.scale:
            from bench import scale

            scale.main(folder)
            return
        if arguments.frozen:
            from bench import frozen

            frozen.main(folder)
            return
        if arguments.live:
            from bench import live

            live.main(folder, arguments.rounds, arguments.results)
            return
        print(f"medians of {arguments.rounds}; command line as typed, image on tmpfs")
        report("small Python program", *there_and_back(folder, arguments.rounds, SMALL))
        dumps, restores = there_and_back(folder, arguments.rounds, LARGE, str(arguments.mib))
        report(f"{arguments.mib} MiB of random memory", dumps, restores)
        above = median(dumps, "peak-bytes") - idle_bytes()
        print(f"  dumper's peak memory: {above / 1e6:.0f} MB above the interpreter's with its imports")
        if not arguments.no_migrate:
            for wire, options in (("TLS", ()), ("plain", ("--plaintext",))):
                moved = migrations(folder, arguments.rounds, arguments.mib, *options)
                rate = median(moved, "transferred") / median(moved, "total-time") / 1e6
                downtime = median(moved, "downtime")
                print(f"  migrate over loopback, {wire}: {rate:.2f} GB/s, downtime {downtime:.0f} ms")


if __name__ == "__main__":
    main()
