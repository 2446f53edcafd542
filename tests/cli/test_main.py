"""Parsing, exit codes and what goes to which stream."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys

import pytest

from pipeline import amounts
from pipeline.cli import main, pacing, render
from pipeline.cli.main import COMMANDS
from pipeline.errors import Blocker, InDoubt, PipelineError, Refused, UsageError, exhausted


def pipeline(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command: str) -> None:
    done = pipeline(command, "--help")
    assert done.returncode == 0
    assert f"python -m pipeline {command}" in done.stdout.partition("example:")[2]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("frobnicate",),
        ("dump",),
        ("dump", "--pid", "x", "--to", "d"),
        ("dump", "--pid", "1", "--to", "d", "--leave-running", "--leave-stopped"),
        ("dump", "--pid", "1", "--to", "-", "--json"),
        ("dump", "--p", "1", "--to", "d"),
        ("migrate", "--pid", "1", "--to", "h:1", "--max-downtime", "5"),
        ("migrate", "--pid", "1", "--to", "h:1", "--mode", "magic"),
        ("restore", "--from", "d", "--pidfile", "/no/such/directory/pid"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2_and_silent_on_stdout(words: tuple[str, ...]) -> None:
    done = pipeline(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_the_version_is_printed() -> None:
    done = pipeline("--version")
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("0.5s", 0.5), ("250us", 0.00025), ("60s", 60)]
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert pacing.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PipelineError("failed"), 1),
        (UsageError("wrong"), 2),
        (Refused([Blocker("pid 5 fd 3", "a kernel's fact", "close it")]), 3),
        (InDoubt("who knows"), 4),
    ],
)
def test_errors_go_to_stderr_and_as_json_to_stdout(
    error: PipelineError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render.fail("dump", error, json=True) == code
    out, err = capsys.readouterr()
    assert err.startswith("dump: ")
    document = json.loads(out)
    assert document["error"] == type(error).__name__
    assert document["exit_code"] == code
    if isinstance(error, Refused):
        assert document["blockers"][0]["subject"] == "pid 5 fd 3"
        assert "pid 5 fd 3: a kernel's fact (close it)" in err


def test_of_many_that_are_alike_some_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    processes = [Blocker(f"pid {number}", "has too much", "raise it") for number in range(1, 6)]
    many = [Blocker(f"pid 5 mapping {number}", "is watched", "wait") for number in range(9)]
    files = [Blocker(f"/usr/lib/{number}", "is not here", "bring it") for number in range(9)]
    assert render.fail("dump", Refused([*processes, *many, *files]), json=True) == 3
    out, err = capsys.readouterr()
    assert len(json.loads(out)["blockers"]) == 23
    assert [line for line in err.splitlines() if "watched" in line] == [
        "  pid 5 mapping 0: is watched (wait)",
        "  pid 5 mapping 1: is watched (wait)",
        "  pid 5 mapping 2: is watched (wait)",
        "  and 6 more mappings: is watched",
    ]
    assert [line for line in err.splitlines() if "too much" in line] == [
        "  pid 1: has too much (raise it)",
        "  pid 2: has too much (raise it)",
        "  pid 3: has too much (raise it)",
        "  and 2 more processes: has too much",
    ]
    assert err.count("is not here (bring it)") == 9, "each has to be brought"


def test_what_runs_out_in_a_task_is_not_taken_for_ours() -> None:
    ours = OSError(errno.ENOMEM, "mmap: Cannot allocate memory")
    theirs = OSError(errno.ENOMEM, "mmap: ENOMEM: Cannot allocate memory")
    assert "there is no memory left: free some" in str(exhausted(ours))
    assert exhausted(theirs) is None
    assert exhausted(OSError(errno.EPERM, "Operation not permitted")) is None
    assert exhausted(ExceptionGroup("", [ours, RuntimeError("can't start new thread"), MemoryError()]))
    assert exhausted(ExceptionGroup("", [ours, theirs])) is None


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m pipeline check --json | true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (18_312_345, "18.3 MB"), (2_500_000_000_000, "2.5 TB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert amounts.size(count) == text


def test_figures_show_the_rate() -> None:
    assert render.figures(
        {"total-time": 500, "downtime": 8.25, "transferred": 10_000_000, "mode": "stop"}
    ) == ("total-time 500 ms, downtime 8.2 ms, transferred 10.0 MB, mode stop, rate 20.0 MB/s")


@pytest.mark.parametrize("is_of_a_class", [False, True], ids=["in a line", "in a class that is made"])
def test_an_interrupt_during_imports_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, is_of_a_class: bool
) -> None:
    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def import_module(_: str) -> object:
        if is_of_a_class:
            type("Imported", (), {"attribute": Interrupted()})
        raise KeyboardInterrupt

    monkeypatch.setattr(main.importlib, "import_module", import_module)
    assert main.main(["inspect", "nothing"]) == 130


def test_an_interrupt_while_a_library_begins_is_not_lost() -> None:
    """msgspec would go on without datetime, and crash."""
    code = """
import sys
class Interrupting:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "datetime":
            sys.meta_path.remove(Interrupting)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting)
import pipeline.resources.unix_look
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_another_error_of_imports_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(_: str) -> object:
        raise RuntimeError("not to be passed over")

    monkeypatch.setattr(main.importlib, "import_module", import_module)
    with pytest.raises(RuntimeError, match="not to be passed over"):
        main.main(["inspect", "nothing"])
