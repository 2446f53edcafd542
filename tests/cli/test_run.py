"""`run` against the kernel: what the program sees of its namespaces from inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run import Extent, parse_map

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="maps of foreign ids without newuidmap need root")


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "run", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def shell(script: str, *options: str) -> list[str]:
    done = run(*options, "--", "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_map_is_parsed_line_by_line() -> None:
    assert parse_map("0:100000:65536,70000:5:1") == (Extent(0, 100000, 65536), Extent(70000, 5, 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:0",
        "0:0:0",
        "a:0:1",
        "-1:0:1",
        "0:4294967295:1",
        "0:0:4294967296",
        "0:0:10,9:100:1",
        "0:100:10,50:109:1",
        ",".join(f"{n}:{n}:1" for n in range(341)),
    ],
)
def test_a_wrong_map_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_map(text)


def test_lines_that_touch_do_not_overlap() -> None:
    assert len(parse_map("0:100:10,10:110:1,11:90:10")) == 3


def test_without_a_map_the_caller_becomes_root_inside() -> None:
    words = shell("id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map", "--userns")
    assert words == ["0", "0", "0", str(os.geteuid()), "1", "0", str(os.getegid()), "1"]


@needs_root
def test_levels_nest_and_each_has_its_own_map() -> None:
    words = shell(
        "id -u; id -g; cat /proc/self/uid_map",
        "--userns=0:100000:65536",
        "--userns=5:1000:100",
        "--userns=8:9:2",
    )
    assert words == ["8", "8", "8", "9", "2"]


@needs_root
def test_supplementary_groups_are_dropped_where_they_would_be_unmapped() -> None:
    assert shell("grep ^Groups /proc/self/status", "--userns=0:100000:65536") == ["Groups:"]


def test_the_program_is_pid_1_with_a_proc_of_its_own() -> None:
    words = shell("echo $$; echo /proc/[0-9]*", "--userns", "--pidns", "--mntns")
    assert words == ["1", "/proc/1"]


def test_every_kind_is_new_and_owned_by_the_new_user_namespace() -> None:
    kinds = {"pid", "mnt", "ipc", "uts", "net", "time", "cgroup"}
    inside = set(shell("readlink /proc/self/ns/*", "--userns", *[f"--{kind}ns" for kind in kinds]))
    outside = {os.readlink(f"/proc/self/ns/{kind}") for kind in [*kinds, "user"]}
    assert not inside & outside


def test_the_loopback_of_a_new_network_namespace_is_up() -> None:
    connect = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    )
    assert run("--userns", "--netns", "--", sys.executable, "-W", "ignore", "-c", connect).returncode == 0


def test_the_exit_status_is_the_programs() -> None:
    assert run("--userns", "--", "/bin/sh", "-c", "exit 7").returncode == 7
    killed = run("--userns", "--", "/bin/sh", "-c", "kill -TERM $$")
    assert killed.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in killed.stderr


def test_a_program_that_is_not_there_is_named() -> None:
    done = run("--userns", "--", "/no/such/program")
    assert done.returncode == 1
    assert done.stderr == "run: /no/such/program: No such file or directory\n"


@needs_root
def test_a_line_outside_the_parents_map_is_named() -> None:
    done = run("--userns=0:100000:10", "--userns=0:9:2", "--", "/bin/true")
    assert done.returncode == 1
    assert "map 0:9:2: Operation not permitted" in done.stderr


@pytest.mark.parametrize(
    "words", [["sleep", "1"], ["--userns"], ["--userns", "--"], ["--userns=x", "--", "true"]]
)
def test_usage_errors(words: list[str]) -> None:
    assert run(*words).returncode == 2


def test_signals_are_passed_on() -> None:
    script = 'trap "exit 9" USR1; echo ready; while :; do sleep 0.05; done'
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "--userns", "--", "/bin/sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 9


def test_detach_leaves_a_session_of_its_own_and_no_pipe_of_ours(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    log = tmp_path / "log"
    with log.open("w") as out:
        done = subprocess.run(
            [
                *[sys.executable, "-m", "pipeline", "run", "--userns", "--pidns", "--mntns", "--detach"],
                *["--pidfile", str(pidfile), "--", "/bin/sleep", "60"],
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            check=True,
        )
    pid = int(pidfile.read_text())
    assert done.stdout == f"{pid}\n"
    handle = os.pidfd_open(pid)
    try:
        assert os.getsid(pid) == pid
        links = {entry.name: os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert links == {"0": "/dev/null", "1": "/dev/null", "2": str(log)}
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}/fd").exists() and time.monotonic() < deadline:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                pass
            time.sleep(0.01)
        os.close(handle)
