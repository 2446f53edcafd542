"""`report`: a real migration drawn from its log, where the page goes, and what is said when it cannot go there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import events
from tests.cli.test_commands import TOOL, Program, folder, pipeline, program
from tests.harness.pages import Page, exact

__all__ = ["folder", "program"]

LOG = b"".join(
    events.line(event)
    for event in (
        events.Begin(
            t=0, format=1, time="2026-11-26T08:32:21.287Z", version="0.1.0", command="migrate", pid=7
        ),
        events.Phase(t=1, name="setup"),
        events.Cancelled(t=2, exit_code=130),
    )
)


@pytest.fixture
def log(folder: Path) -> Path:
    path = folder / "log"
    path.write_bytes(LOG)
    return path


def report(*words: object, **options: object) -> tuple[int, str]:
    """The exit code, and the one line that was said."""
    done = pipeline("report", *words, **options)
    assert done.stdout == b""
    said = done.stderr.decode()
    assert said.count("\n") <= 1
    return done.returncode, said


def read(path: Path) -> list[events.Event | None]:
    return [events.parse(line) for line in path.read_bytes().splitlines()]


@pytest.mark.root
def test_a_migration_is_drawn_with_all_of_its_figures(
    nothing_left_behind: None, program: Program, folder: Path
) -> None:
    secret, log, drawn = folder / "secret", folder / "log", folder / "report.html"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    serving = ["serve", "--listen", "127.0.0.1:0", "--once", "--new-pidns", "--events", folder / "serve"]
    with subprocess.Popen(
        [*TOOL, *map(str, serving), "--secret-file", str(secret)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as serve:
        assert serve.stdout is not None
        to = serve.stdout.readline().decode().split()[-1]
        migrating = [
            "migrate",
            "--pid",
            program.pid,
            "--to",
            to,
            "--secret-file",
            secret,
            "--mode",
            "precopy",
        ]
        moved = pipeline(*migrating, "--events", log)
        serve.communicate(timeout=30)
    assert moved.returncode == 0, moved.stderr
    (arrived,) = [event for event in read(folder / "serve") if isinstance(event, events.Restored)]
    program.collect()
    program.pid = arrived.root_pid
    assert report(log, "-o", drawn) == (0, "")
    page = Page(drawn.read_text())
    told = read(log)
    for event in told:
        match event:
            case events.Begin():
                assert f"to {to}" in page.text
            case events.Phase(t=at):
                assert exact(at) in page.values or event.name.startswith("round ")
            case events.RoundEnd():
                numbers = (event.dirty_bytes, event.sent_bytes, event.seconds, event.mbps * 125_000)
                assert {exact(number) for number in numbers} <= page.values
            case events.Pause():
                assert set(event.parts) <= set(page.rows)
                assert {exact(part) for part in (event.downtime, *event.parts.values())} <= page.values
            case events.Completed():
                assert set(event.figures) <= set(page.rows)
                assert {exact(value) for value in event.figures.values()} <= page.values
                assert f"its root as pid {event.root_pid} there" in page.text
    assert {"Completed", "Failed"} & set(page.pieces) == {"Completed"}
    kinds = {type(event) for event in told}
    assert {events.Phase, events.RoundEnd, events.Pause, events.Completed} <= kinds
    served = folder / "served.html"
    assert report(folder / "serve", "-o", served) == (0, "")
    assert "Service at 127.0.0.1:0" in Page(served.read_text()).text


def test_stdin_and_stdout_may_be_used(log: Path) -> None:
    done = pipeline("report", "-", "-o", "-", input=LOG)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Cancelled by SIGINT" in Page(done.stdout.decode()).text
    assert pipeline("report", log, "-o", "-").stdout == done.stdout


def test_a_page_that_is_there_is_replaced_whole_or_not_at_all(log: Path, folder: Path) -> None:
    page, name = folder / "page", folder / "name"
    page.write_text("the one before")
    name.symlink_to(page)
    log.write_bytes(LOG[:-20] + b"\n")
    code, said = report(log, "-o", name)
    assert (code, page.read_text()) == (1, "the one before")
    assert "line 3 is no event" in said
    log.write_bytes(LOG)
    assert report(log, "-o", name) == (0, "")
    assert name.is_symlink()
    Page(page.read_text())
    assert set(folder.iterdir()) == {log, page, name}


def test_a_log_that_is_cut_off_is_drawn_and_that_is_said(log: Path, folder: Path) -> None:
    log.write_bytes(LOG[:-20])
    assert report(log, "-o", folder / "page") == (
        0,
        f"report: {log}: the last line is cut off, and left out\n",
    )
    assert "No end" in Page((folder / "page").read_text()).pieces


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    give = "give report the file that `migrate --events FILE` wrote\n"
    assert report(folder / "no", "-o", folder / "page") == (
        1,
        f"report: {folder}/no: there is no such file; {give}",
    )
    assert report(folder, "-o", folder / "page") == (1, f"report: {folder}: it is a directory; {give}")
    code, said = report("/etc/passwd", "-o", folder / "page")
    assert (code, said.startswith("report: /etc/passwd: line 1 is no event (")) == (1, True)
    assert said.endswith(f"so this is no log; {give}")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("{folder}", 2, "-o {folder}: it is a directory; give the name of a file in it"),
        (
            "{folder}/no/page",
            2,
            "-o {folder}/no/page: there is no directory {folder}/no; make it, or give another place",
        ),
        ("{folder}/log", 2, "-o {folder}/log: that is the log itself; give another place"),
        ("{folder}/log/page", 2, "-o {folder}/log/page: Not a directory; give another place"),
        ("/dev/full", 1, "/dev/full: no space left on device; free some, or give -o another place"),
    ],
)
def test_where_no_page_can_be(log: Path, folder: Path, output: str, code: int, said: str) -> None:
    found = report(log, "-o", output.format(folder=folder))
    assert found == (code, f"report: {said.format(folder=folder)}\n")
    assert log.read_bytes() == LOG
    assert list(folder.iterdir()) == [log]


def test_a_full_stdout_is_said(log: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*TOOL, "report", log, "-o", "-"], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == b"report: stdout: no space left on device; free some, or give -o another place\n"


def test_a_disk_that_is_full_leaves_what_was_there(log: Path, folder: Path) -> None:
    """A limit on the size of files stands for the disk: what fits is written, the rest is refused."""
    page = folder / "page"
    page.write_text("the one before")
    limit = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n\
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n\
from pipeline.cli.main import main; raise SystemExit(main(['report', {str(log)!r}, '-o', {str(page)!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", limit], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, f"report: {page}: File too large\n")
    assert page.read_text() == "the one before"
    assert set(folder.iterdir()) == {log, page}


def test_a_page_goes_into_a_pipe(log: Path, folder: Path) -> None:
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([*TOOL, "report", log, "-o", fifo], stderr=subprocess.PIPE) as drawing:
        Page(fifo.read_text())
        assert drawing.communicate(timeout=30)[1] == b""
    assert fifo.is_fifo()
