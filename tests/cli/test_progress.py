"""Progress: nothing for a short command, a few lines for a long one, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress

import pytest

from pipeline.cli import progress, render
from pipeline.progress import Round


def test_a_short_command_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Lines("dump") as lines:
        lines.phase("freeze")
        lines.advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_long_command_says_phase_and_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", -1)
    with progress.Lines("dump") as lines:
        lines.phase("memory")
        lines.advance(1_000_000, 4_000_000)
        lines.advance(2_000_000, 4_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "dump: memory\ndump: memory: 1.0 MB of 4.0 MB\n"


def test_what_a_person_has_to_know_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for command, times in (("migrate", 1), ("restore", 0)):
        with progress.Listener(command, progress.Lines(command), None) as listener:
            for phase in ("take-back", "postcopy-paused", "postcopy", "postcopy-paused", "take-back"):
                listener.phase(phase)
        err = capsys.readouterr().err
        assert err.count("the tree runs on here. The destination does not answer") == times
        assert err.count("waits for pages that are still here") == times


def test_a_terminal_gets_a_bar() -> None:
    program = """
        import argparse, sys
        from pipeline.cli import progress
        progress.PATIENCE_S = -1
        assert sys.stderr.isatty()
        arguments = argparse.Namespace(progress="text", events=None)
        with progress.listener("dump", arguments) as bar:
            bar.phase("memory")
            bar.advance(1_000_000, 4_000_000)
            bar.phase("write")
    """
    controller, terminal = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            stderr=terminal,
            check=True,
            timeout=60,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )
        shown = os.read(controller, 65536).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert "dump: memory" in shown
    assert "1.0/4.0 MB" in shown


def test_a_round_says_rate_dirty_rate_and_expected_downtime(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", -1)
    with progress.Lines("migrate") as lines:
        lines.round(Round(0, 8_000_000, 8_100_000, 0.1, 81e6, 5e6, 0.02))
        lines.round(Round(1, 500_000, 510_000, 0.01, 51e6, 0.0))
        lines.round(Round(2, 500_000, 510_000, 0.01, 51e6, 0.0, 0.02, 20))
    assert capsys.readouterr().err == (
        "migrate: round 0: 8.0 MB in 100 ms, rate 81.0 MB/s, dirty rate 5.0 MB/s, expected downtime 20 ms\n"
        "migrate: round 1: 500.0 kB in 10 ms, rate 51.0 MB/s, dirty rate 0 B/s\n"
        "migrate: round 2: 500.0 kB in 10 ms, rate 51.0 MB/s, dirty rate 0 B/s, expected downtime 20 ms, "
        "from now on held back 20 % of its time\n"
    )


@contextmanager
def told_to_a_pipe() -> Iterator[tuple[int, int]]:
    """Stderr writes to a pipe; its two ends."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    try:
        with redirect_stderr(stream):
            yield reader, writer
    finally:
        with suppress(BrokenPipeError):
            stream.close()
        os.close(reader)


def test_who_does_not_read_is_not_waited_for() -> None:
    """A line that waits would let a tree stand still."""
    with told_to_a_pipe() as (reader, writer):
        os.set_blocking(writer, False)
        filled = os.write(writer, bytes(1 << 20))
        os.set_blocking(writer, True)
        with render.unwaited():
            for number in range(3):
                render.show(f"line {number}")
            assert len(os.read(reader, filled)) == filled
        render.show("then")
        assert os.read(reader, 100) == b"line 0\nline 1\nline 2\nthen\n"


def test_who_has_gone_does_not_end_what_is_at_work() -> None:
    with told_to_a_pipe() as (reader, _):
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, reader, inheritable=False)
        os.close(null)
        with render.unwaited():
            render.show("to nobody")
            render.show("once more")
        render.show("and how it ended")


def test_a_full_disk_takes_no_messages_and_that_is_all() -> None:
    gone_on = False
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as stream:
        with redirect_stderr(stream):
            render.show("a line")
        gone_on = True
    assert gone_on


def test_a_terminal_that_is_stopped_stops_nothing() -> None:
    """By ^S; what was drawn last is there when it goes on."""
    program = """
        import argparse, os, sys
        from pipeline.cli import progress, render
        progress.PATIENCE_S = progress.REDRAW_EVERY_S = -1
        arguments = argparse.Namespace(progress="text", events=None)
        with progress.listener("dump", arguments) as bar:
            for number in range(200):
                bar.advance(number, 1000)
            render.say("a line")
            os.write(1, b"done")
            sys.stdin.read(1)
    """
    controller, terminal = pty.openpty()
    try:
        termios.tcflow(terminal, termios.TCOOFF)
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        ) as process:
            assert process.stdout is not None
            try:
                assert select.select([process.stdout], [], [], 60)[0], "it waits for the terminal"
                assert process.stdout.read(4) == b"done"
            finally:
                termios.tcflow(terminal, termios.TCOON)
            process.communicate(b"\n", timeout=60)
        assert process.returncode == 0
        shown = os.read(controller, 65536).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert "a line" in shown
    assert shown.count("0/1000") <= 1, "many bars are kept for it"
