"""What a program feels of being moved while it writes: `python -m bench --live [--results FILE]`.

A program in a user namespace writes to its memory, page by page at random, and logs every gap in its own time. It is
moved over loopback by each mode; beside stand the figures of the command, and the rate of a bare loop of the same run
that reads the same memory (process_vm_readv) and sends it through a socket.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import time
from pathlib import Path
from typing import Any

from bench.__main__ import kill, measured, migration_secret, serving, start
from pipeline.ids import HostPid
from pipeline.kernel import smaps
from pipeline.kernel.syscalls import process_vm_readv

WRITING = (
    "import os, random, sys, time\n"
    "mib, rate = int(sys.argv[1]), float(sys.argv[2])\n"
    "memory = bytearray()\n"
    "for _ in range(mib): memory += os.urandom(1 << 20)\n"
    "pages, step, due = mib * 256, 0.001, rate * 256 * 0.001\n"
    "print('ready', flush=True)\n"
    "owed = count = 0; last = time.monotonic()\n"
    "while True:\n"
    "    owed += due\n"
    "    while owed >= 1:\n"
    "        owed -= 1; count += 1\n"
    "        memory[random.randrange(pages) * 4096] = count & 255\n"
    "    now = time.monotonic()\n"
    "    if now - last > 0.004: print(f'gap {1e3 * (now - last):.1f} at {time.time():.3f}', flush=True)\n"
    "    last = now\n"
    "    time.sleep(step)\n"
)
#: MiB, MB/s written
CASES = ((16, 5), (64, 20), (1024, 0), (1024, 50))
MODES = ("stop", "precopy", "postcopy", "hybrid")
_PIECE_BYTES = 4 << 20
_SETTLE_S = 1.0


def bare_rate(pid: int) -> float:
    """Bytes a second of a loop that reads the largest mapping of a process and sends it to a thread-less reader."""
    largest = max(smaps.maps(HostPid(pid)), key=lambda mapping: mapping.end - mapping.start)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if not child:
            try:
                with socket.create_connection(listener.getsockname()) as reader:
                    buffer = bytearray(_PIECE_BYTES)
                    while reader.recv_into(buffer):
                        pass
            finally:
                os._exit(0)
        writer, _ = listener.accept()
    view = memoryview(bytearray(_PIECE_BYTES))
    begin = time.perf_counter()
    with writer:
        for at in range(largest.start, largest.end, _PIECE_BYTES):
            count = process_vm_readv(HostPid(pid), [(at, min(_PIECE_BYTES, largest.end - at))], view, 0)
            writer.sendall(view[:count])
    os.waitpid(child, 0)
    return (largest.end - largest.start) / (time.perf_counter() - begin)


def longest_gap_ms(log: Path, since: float) -> float:
    """The longest gap that the program has logged since a time of day."""
    gaps = re.findall(r"^gap ([\d.]+) at ([\d.]+)$", log.read_text(), re.MULTILINE)
    return max((float(gap) for gap, at in gaps if float(at) >= since), default=0.0)


def move(folder: Path, mib: int, rate: int, mode: str) -> dict[str, Any]:
    """One migration; its figures, the longest gap (ms) and the rate of the bare loop (bytes/s)."""
    secret = migration_secret(folder)
    pid = start(folder, WRITING, str(mib), str(rate))
    try:
        time.sleep(_SETTLE_S)
        bare = bare_rate(pid)
        with serving(folder, secret) as to:
            since = time.time()
            options = ("--to", to, "--secret-file", str(secret), "--mode", mode)
            figures = measured("migrate", "--pid", str(pid), *options)
            time.sleep(_SETTLE_S)
            gap = longest_gap_ms(folder / "log", since)
    finally:
        kill(pid)
    return {"mib": mib, "rate": rate, "mode": mode, "gap": gap, "bare-rate": bare, **figures}


def main(folder: Path, rounds: int, results: Path | None) -> None:
    """Measure and print; all results as JSON, with the machine described."""
    found = []
    print(
        "MiB  MB/s  mode       gap ms  downtime ms  (freeze collect pages finish thaw)  total s  rounds  asked"
    )
    for mib, rate in CASES:
        for mode in MODES:
            for _ in range(rounds):
                one = move(folder, mib, rate, mode)
                found.append(one)
                parts = " ".join(
                    f"{one[name + '-time']:.0f}"
                    for name in ("freeze", "collect", "transfer", "finish", "thaw")
                )
                print(
                    f"{mib:4} {rate:5}  {mode:9} {one['gap']:7.1f} {one['downtime']:12.1f}  ({parts})  "
                    f"{one['total-time'] / 1e3:6.2f}  {one.get('dirty-sync-count', 0):5.0f}  "
                    f"{one.get('postcopy-requests', 0):5.0f}",
                    flush=True,
                )
    large = [one for one in found if one["mib"] >= 1024 and one["mode"] == "stop"]
    for one in large:
        sent = one["page-bytes"] / (one["transfer-time"] / 1e3)
        bare = one["bare-rate"]
        print(f"stop, {one['mib']} MiB: {sent / 1e9:.2f} GB/s with TLS, {sent / bare:.2f} of a bare loop")
    if results is not None:
        machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
        results.write_text(
            json.dumps({"machine": machine, "date": time.strftime("%F"), "results": found}, indent=1)
        )
