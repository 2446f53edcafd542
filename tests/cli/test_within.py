"""A command that has gone into the surroundings of a restored tree: cancelled, killed, refused, and by whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.tree import children_of, engine, family_of, reap, said

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def status_of(pid: int, name: str) -> list[str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A shell and its child in a pid namespace that a restore has made: first process around, and root."""
    begun = engine("run", "--userns", "--detach", "--", "sh", "-c", "sleep 1000 & wait")
    assert begun.returncode == 0, said(begun)
    family = family_of(int(begun.stdout))
    done = engine("dump", "--pid", begun.stdout.strip(), "--to", tmp_path / "first")
    assert done.returncode == 0, said(done)
    assert not reap(family)
    done = engine("restore", "--from", tmp_path / "first", "--new-pidns", "--detach")
    assert done.returncode == 0, said(done)
    root = int(done.stdout)
    init = int(status_of(root, "PPid")[0])
    yield init, root
    family = family_of(init)
    with suppress(ProcessLookupError):
        os.kill(init, signal.SIGKILL)
    assert not reap(family)


def stalled(root: int) -> tuple[subprocess.Popen[bytes], int, int]:
    """A dump of `root` that stands still because its output is full; the command, and both ends of the pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    command = [sys.executable, "-m", "pipeline", "dump", "--pid", str(root), "--to", "-"]
    dump = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while status_of(root, "State")[0] != "t":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return dump, reader, writer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_tree_and_its_first_process_run_on(restored: tuple[int, int], number: signal.Signals) -> None:
    init, root = restored
    dump, reader, writer = stalled(root)
    try:
        assert status_of(init, "State")[0] == "t"
        (inside,) = children_of(dump.pid)
        dump.send_signal(number)
        _, told = dump.communicate(timeout=20)
        assert not reap([inside])
        assert dump.returncode == (-number if number == signal.SIGKILL else 128 + number), told
    finally:
        os.close(reader)
        os.close(writer)
    deadline = time.monotonic() + 60
    while {status_of(pid, "State")[0] for pid in (init, root)} != {"S"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {status_of(pid, "TracerPid")[0] for pid in (init, root)} == {"0"}
    # and it still does what it is there for
    os.kill(root, signal.SIGKILL)
    assert not reap([init, root])


def test_an_image_has_nothing_of_the_surroundings(restored: tuple[int, int], tmp_path: Path) -> None:
    _, root = restored
    done = engine("dump", "--pid", str(root), "--to", tmp_path / "second", "--leave-running")
    assert done.returncode == 0, said(done)
    images = [
        json.loads(engine("inspect", tmp_path / name, "--namespaces", "--json").stdout)
        for name in ("first", "second")
    ]
    assert images[0] == images[1]
    assert status_of(root, "State")[0] == "S"


def test_check_says_what_this_host_can_do_and_not_what_the_inside_can(restored: tuple[int, int]) -> None:
    _, root = restored
    plain, inside = (
        json.loads(engine("check", *more, "--json").stdout) for more in ([], ["--pid", str(root)])
    )
    assert plain["host"] == inside["host"]
    assert inside["blockers"] == []


def test_a_program_that_calls_the_engine_is_told_the_first_process(
    restored: tuple[int, int], tmp_path: Path
) -> None:
    from pipeline import blocking
    from pipeline.errors import Refused

    init, root = restored
    with pytest.raises(Refused, match=rf"pid {root}: was restored .* whose first process is pid {init} "):
        blocking.dump(root, str(tmp_path / "second"))
    assert not (tmp_path / "second").exists()


def test_a_first_process_of_another_name_is_not_entered(tmp_path: Path) -> None:
    """Its child is two pid namespaces deep: refused with the pid to give, and not ended for an image of no use."""
    begun = engine("run", "--pidns", "--detach", "--", "unshare", "-p", "-f", "sleep", "1000")
    assert begun.returncode == 0, said(begun)
    first = int(begun.stdout)
    try:
        deadline = time.monotonic() + 60
        while len(family := family_of(first)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = engine("dump", "--pid", str(family[-1]), "--to", tmp_path / "image")
        assert done.returncode == 3, said(done)
        assert f"give that one: --pid {first}" in done.stderr
        assert family_of(first) == family
    finally:
        family = family_of(first)
        os.kill(first, signal.SIGKILL)
        reap(family)


def test_a_root_that_ends_at_once_has_its_status(tmp_path: Path) -> None:
    """Who is around the tree takes its end before anybody here has looked at it."""
    wait = "import time, os, sys\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.001)\nos._exit(5)"
    tmp_path.chmod(0o755)
    words = ("/usr/bin/python3", "-S", "-E", "-c", wait, tmp_path / "over")
    begun = engine("run", "--userns", "--detach", "--", *words)
    assert begun.returncode == 0, said(begun)
    root = int(begun.stdout)
    time.sleep(0.3)
    done = engine("dump", "--pid", str(root), "--to", tmp_path / "image")
    assert done.returncode == 0, said(done)
    assert not reap([root])
    (tmp_path / "over").touch()
    for _ in range(5):
        done = engine("restore", "--from", tmp_path / "image", "--new-pidns")
        assert done.returncode == 5, said(done)
