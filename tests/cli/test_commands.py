"""The commands on real trees: streams, exit codes, pid files, signals, what is printed where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.tree import Tree, Workshop, engine, reap, said

TOOL = [sys.executable, "-m", "pipeline"]


def pipeline(*words: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    return subprocess.run([*TOOL, *map(str, words)], check=False, timeout=60, capture_output=True, **options)  # type: ignore[call-overload]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


class Program:
    """A shell script, detached, in a user namespace of its own; killed at the end."""

    def __init__(self, script: str, *options: str) -> None:
        done = pipeline("run", "--userns", *options, "--detach", "--", "/bin/sh", "-c", script)
        assert done.returncode == 0, done.stderr
        self.pid = int(done.stdout)

    def state(self) -> str:
        """The letter of proc_pid_stat(5); empty if there is no such process."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def runs(self) -> bool:
        return self.state() not in {"", "Z", "X"}

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.collect()

    def collect(self) -> None:
        """Wait until nothing holds the tree's pids: the test run is the subreaper of what is detached."""
        deadline = time.monotonic() + 60
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)
        self._reap()

    @staticmethod
    def _reap() -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program("exec sleep 1000")
    yield program
    program.end()


@pytest.mark.root
def test_dump_ends_the_tree_and_restore_prints_its_pid(program: Program, folder: Path) -> None:
    image, pidfile = folder / "image", folder / "pid"
    dumped = pipeline("dump", "--pid", program.pid, "--to", image, "--json")
    assert dumped.returncode == 0, dumped.stderr
    result = json.loads(dumped.stdout)
    assert result["root_pid"] == program.pid
    assert {"total-time", "downtime", "setup-time", "transferred"} <= set(result["figures"])
    assert not program.runs()
    program.collect()
    restored = pipeline("restore", "--from", image, "--detach", "--pidfile", pidfile)
    assert restored.returncode == 0, restored.stderr
    assert restored.stdout == f"{program.pid}\n".encode()
    assert pidfile.read_text() == f"{program.pid}\n"
    assert program.runs()


@pytest.mark.parametrize(("option", "states"), [("--leave-running", "SR"), ("--leave-stopped", "T")])
def test_dump_leaves_the_tree_as_it_is_told(program: Program, folder: Path, option: str, states: str) -> None:
    dumped = pipeline("dump", "--pid", program.pid, "--to", folder / "image", option)
    assert dumped.returncode == 0, dumped.stderr
    assert dumped.stdout == b""
    assert program.state() in set(states)


@pytest.mark.parametrize(
    ("options", "is_advised"),
    [
        (("--mode", "stop", "--leave-running", "--max-downtime", "1us"), True),
        (("--mode", "stop", "--leave-running", "--max-downtime", "60s"), False),
        (("--leave-running", "--max-downtime", "1us"), False),
        (("--mode", "stop", "--leave-stopped", "--max-downtime", "1us"), False),
    ],
)
def test_who_stands_still_for_long_is_told_of_rounds(
    program: Program, folder: Path, options: tuple[str, ...], is_advised: bool
) -> None:
    dumped = pipeline("dump", "--pid", program.pid, "--to", folder / "image", *options)
    assert dumped.returncode == 0, dumped.stderr
    assert (b"with --mode precopy its memory goes while it runs" in dumped.stderr) == is_advised


@pytest.mark.root
def test_an_image_goes_through_a_pipe(program: Program) -> None:
    dumped = pipeline("dump", "--pid", program.pid, "--to", "-")
    assert dumped.returncode == 0, dumped.stderr
    inspected = pipeline("inspect", "-", "--json", input=dumped.stdout)
    assert inspected.returncode == 0, inspected.stderr
    assert [process["pids"] for process in json.loads(inspected.stdout)["processes"]] == [[program.pid]]
    program.collect()
    restored = pipeline("restore", "--from", "-", "--detach", "--json", input=dumped.stdout)
    assert restored.returncode == 0, restored.stderr
    assert json.loads(restored.stdout)["root_pid"] == program.pid
    assert program.runs()


@pytest.mark.parametrize("inside", [(), ("--pidns", "--mntns")], ids=["these pids", "its own pids"])
@pytest.mark.parametrize("where", [(), ("--new-pidns",)], ids=["here", "new-pidns"])
def test_restore_stays_forwards_signals_and_exits_with_the_status(
    folder: Path, where: tuple[str, ...], inside: tuple[str, ...]
) -> None:
    program = Program("trap 'exit 9' USR1; while :; do sleep 0.05; done", *inside)
    try:
        dumped = pipeline("dump", "--pid", program.pid, "--to", folder / "image")
        assert dumped.returncode == 0, dumped.stderr
        program.collect()
        with subprocess.Popen(
            [*TOOL, "restore", "--from", folder / "image", "--json", *where],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as restore:
            assert restore.stdout is not None
            assert restore.stdout.readline() == b"{\n"
            assert b"root_pid" in restore.stdout.readline()
            restore.send_signal(signal.SIGUSR1)
            assert restore.wait(30) == 9
    finally:
        program.end()


def test_what_is_in_the_way_is_named_and_is_exit_code_3(folder: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "1000"], stdin=subprocess.PIPE) as child:
        try:
            checked = pipeline("check", "--pid", child.pid, "--json")
            dumped = pipeline("dump", "--pid", child.pid, "--to", folder / "image", "--json")
            assert (checked.returncode, dumped.returncode) == (3, 3)
            error = json.loads(dumped.stdout)
            assert (error["error"], error["exit_code"]) == ("Refused", 3)
            subjects = {blocker["subject"] for blocker in error["blockers"]}
            assert any(subject.startswith(f"pid {child.pid} fd 0") for subject in subjects)
            assert subjects <= {blocker["subject"] for blocker in json.loads(checked.stdout)["blockers"]}
            assert b"nothing was touched" in dumped.stderr
            assert child.poll() is None
            assert not (folder / "image").exists()
        finally:
            child.kill()


def test_a_pid_that_is_not_there_is_said(folder: Path) -> None:
    done = pipeline("dump", "--pid", 4194303, "--to", folder / "image")
    assert done.returncode in {1, 2, 3}
    assert b"4194303" in done.stderr
    assert b"Traceback" not in done.stderr


def test_sigint_during_a_dump_rolls_it_back(program: Program) -> None:
    """The image goes to a pipe that is full: the dump stands in the middle when the signal comes."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(65536))
        os.set_blocking(writer, True)
        with subprocess.Popen(
            [*TOOL, "dump", "--pid", str(program.pid), "--to", "-"], stdout=writer, stderr=subprocess.PIPE
        ) as dump:
            deadline = time.monotonic() + 20
            while program.state() != "t" and time.monotonic() < deadline:
                time.sleep(0.005)
            assert program.state() == "t"
            dump.send_signal(signal.SIGINT)
            assert dump.wait(30) == 130
            assert dump.stderr is not None
            assert b"rolling back" in dump.stderr.read()
    finally:
        os.close(reader)
        os.close(writer)
    assert program.state() in {"S", "R"}


def test_clean_and_check_work_without_a_tree() -> None:
    assert pipeline("clean").returncode == 0
    checked = pipeline("check", "--json")
    assert checked.returncode in {0, 1}
    rows = json.loads(checked.stdout)["host"]
    assert all(set(row) == {"name", "ok", "needed", "detail", "remedy"} for row in rows)


def test_serve_says_where_and_with_what_and_migrate_gets_there(program: Program, folder: Path) -> None:
    """Source and destination share this machine's pids, so the destination makes a namespace for them."""
    serve = [*TOOL, "serve", "--listen", "127.0.0.1:0", "--once", "--new-pidns"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        assert first.startswith("listening on 127.0.0.1:")
        to = first.split()[-1]
        assert server.stdout.readline() == "on the other host:\n"
        subprocess.run(["/bin/sh", "-c", server.stdout.readline()], check=True, cwd=folder)
        command = server.stdout.readline()
        assert f"migrate --pid PID --to {to} --secret-file pipeline-secret" in command
        assert (folder / "pipeline-secret").stat().st_mode & 0o077 == 0
        moved = pipeline(
            *[
                "migrate",
                "--pid",
                program.pid,
                "--to",
                to,
                "--secret-file",
                folder / "pipeline-secret",
                "--json",
            ]
        )
        assert moved.returncode == 0, moved.stderr
        last = server.stdout.readline()
        assert last == f"restored: root pid {json.loads(moved.stdout)['root_pid']}\n"
        assert server.wait(30) == 0
    assert not program.runs()
    program.collect()
    program.pid = int(last.rpartition(" ")[2])
    assert program.runs()


def test_migrate_without_the_secret_leaves_the_tree_running(program: Program, folder: Path) -> None:
    (folder / "wrong").touch(mode=0o600)
    (folder / "wrong").write_text("0123456789abcdef" * 4)
    serve = [*TOOL, "serve", "--listen", "127.0.0.1:0", "--once", "--new-pidns"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        to = server.stdout.readline().split()[-1]
        refused = pipeline("migrate", "--pid", program.pid, "--to", to, "--secret-file", folder / "wrong")
        assert refused.returncode == 1
        assert b"Traceback" not in refused.stderr
        assert program.runs()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 143


@pytest.mark.root
def test_plain_code_and_asyncio_do_the_same(program: Program, folder: Path) -> None:
    import asyncio

    from pipeline import aio, blocking

    dumped = blocking.dump(program.pid, str(folder / "one"))
    assert dumped.root_pid == program.pid
    program.collect()

    async def back_and_forth() -> int:
        tree = await aio.restore(str(folder / "one"))
        again = await aio.dump(tree.root_pid, str(folder / "two"), leave="running")
        assert again.processes == 1
        assert (await aio.inspect(str(folder / "two"))).image.head.root == tree.root_pid
        tree.send_signal(signal.SIGTERM)
        status = await tree.wait()
        tree.close()
        return status

    assert os.waitstatus_to_exitcode(asyncio.run(back_and_forth())) == -signal.SIGTERM


@pytest.mark.root
def test_the_end_of_the_restorer_is_not_that_of_a_tree_that_ends_with_its_parent(
    nothing_left_behind: None, workshop: Workshop, tmp_path: Path
) -> None:
    """As `unshare --kill-child` asks for SIGKILL at the end of its parent; a detached restore ends at once."""
    around_it = ["sh", "-c", 'setpriv --pdeathsig KILL "$@" & wait', "-"]
    tree = Tree.start(workshop, "quiet", within=around_it)
    around = int(Path(f"/proc/{tree.pid}/stat").read_text().rpartition(")")[2].split()[1])
    try:
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image")
        assert done.returncode == 0, said(done)
        assert not reap([tree.pid, around])
        done = engine("restore", "--from", tmp_path / "image", "--detach")
        assert done.returncode == 0, said(done)
        assert "no signal will be sent to it at the end of its parent" in done.stderr
        tree.check()
    finally:
        tree.kill()
