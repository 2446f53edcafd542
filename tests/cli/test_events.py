"""Events of real commands: the schema, how each ends, and readers that are slow or gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline import events
from pipeline.cli.outlet import Outlet
from tests.cli.test_commands import TOOL, Program, folder, pipeline, program

__all__ = ["folder", "program"]


def read(text: bytes) -> list[events.Event]:
    assert text.endswith(b"\n")
    found = [events.parse(line) for line in text.splitlines()]
    assert all(found)
    known = [event for event in found if event is not None]
    assert isinstance(known[0], events.Begin)
    assert [event.t for event in known] == sorted(event.t for event in known)
    return known


@pytest.mark.root
def test_dump_and_restore_tell_phases_and_figures(program: Program, folder: Path) -> None:
    log = folder / "log"
    words = ["dump", "--pid", program.pid, "--to", folder / "image", "--progress", "json", "--events", log]
    dumped = pipeline(*words)
    assert dumped.returncode == 0, dumped.stderr
    assert log.read_bytes() == dumped.stderr
    told = read(dumped.stderr)
    assert {"setup", "freeze", "memory", "write"} <= {e.name for e in told if isinstance(e, events.Phase)}
    assert isinstance(told[-1], events.Completed)
    assert told[-1].figures["downtime"] > 0
    assert [e for e in told if isinstance(e, events.Advance)][-1].remaining == 0
    program.collect()
    restored = pipeline("restore", "--from", folder / "image", "--detach", "--events", log)
    assert restored.returncode == 0, restored.stderr
    told = read(log.read_bytes())
    assert isinstance(told[-1], events.Completed)
    assert told[-1].root_pid == program.pid


@pytest.mark.root
def test_migrate_and_serve_tell_their_ends(program: Program, folder: Path) -> None:
    secret, log = folder / "secret", folder / "log"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    words = ["serve", "--listen", "127.0.0.1:0", "--secret-file", str(secret), "--once", "--new-pidns"]
    with subprocess.Popen(
        [*TOOL, *words, "--progress", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as serve:
        assert serve.stdout is not None
        address = serve.stdout.readline().decode().split()[-1]
        moved = pipeline(
            "migrate",
            "--pid",
            program.pid,
            "--to",
            address,
            "--secret-file",
            secret,
            "--events",
            log,
            "--json",
        )
        _, heard = serve.communicate(timeout=30)
    assert moved.returncode == 0, moved.stderr
    told, there = read(log.read_bytes()), read(heard)
    assert isinstance(told[-1], events.Completed)
    # figures are rounded in the event
    assert told[-1].figures.keys() == json.loads(moved.stdout)["figures"].keys()
    arrived = [event for event in there if isinstance(event, events.Restored)]
    assert len(arrived) == 1
    os.kill(arrived[0].root_pid, signal.SIGKILL)
    assert isinstance(there[-1], events.Completed)


def test_a_failure_is_the_last_event(folder: Path) -> None:
    done = pipeline("restore", "--from", folder / "no\udcff", "--progress", "json")
    told = read(done.stderr)
    assert isinstance(told[-1], events.Failed)
    assert told[-1].exit_code == done.returncode == 1


def test_a_cancelled_restore_says_so(folder: Path) -> None:
    command = [*TOOL, "restore", "--from", "-", "--progress", "json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as restore:
        assert restore.stderr is not None
        heard = b""
        while b'"setup"' not in heard:
            heard += restore.stderr.readline()
        restore.send_signal(signal.SIGINT)
        assert restore.wait(20) == 130
        told = read(heard + restore.stderr.read())
    assert isinstance(told[-1], events.Cancelled)


def test_a_full_pipe_blocks_nobody_and_loses_whole_lines_only() -> None:
    reader, writer = os.pipe()
    outlet = Outlet(writer)
    line = b"x" * 999 + b"\n"
    for _ in range(3000):
        outlet.put(line)
    assert outlet.dropped > 0
    assert os.get_blocking(writer)
    os.set_blocking(reader, False)
    assert set(os.read(reader, 1 << 20).splitlines(keepends=True)[:-1]) == {line}
    os.close(reader)
    outlet.put(line)
    outlet.close()
    outlet.close()
    os.close(writer)
