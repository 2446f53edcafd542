"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli.test_commands import Program, folder, program

__all__ = ["folder", "program"]

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_without_arguments_each_says_how_it_is_used(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"python examples/{path.name} " in done.stderr


@pytest.mark.root
def test_checkpoints_are_taken_the_last_are_kept_and_the_newest_restores(
    program: Program, folder: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "checkpoint_every.py", str(program.pid), "0.02", "2", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        names = [process.stdout.readline().partition(": ")[0] for _ in range(4)]
        time.sleep(0.1)
        kept = sorted(entry.name for entry in folder.iterdir())
        assert program.runs()
        process.terminate()
        process.wait(20)
    assert names == sorted(names)
    assert set(kept) & set(names) == set(names[-2:])
    program.end()
    restored = subprocess.run(
        [sys.executable, "-m", "pipeline", "restore", "--from", folder / names[-1], "--detach"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert restored.returncode == 0, restored.stderr
    assert program.runs()


def test_what_cannot_be_moved_stays_and_is_named() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"], stdin=subprocess.PIPE) as child:
        try:
            done = subprocess.run(
                [sys.executable, EXAMPLES / "drain_host.py", "127.0.0.1:1", "/nowhere", str(child.pid)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 1
            assert f"pid {child.pid} stays: pid {child.pid} fd 0" in done.stderr
            assert child.poll() is None
        finally:
            child.kill()


def test_an_image_is_removed_manifest_first(folder: Path) -> None:
    place = load("checkpoint_every").Folder(str(folder))
    for name in ("b", "a"):
        (folder / name).mkdir()
        (folder / name / "manifest").touch()
    (folder / "half").mkdir()
    assert place.names() == ["a", "b"]
    place.remove("a")
    assert place.names() == ["b"]


@pytest.mark.root
@pytest.mark.skipif(
    not (shutil.which("Xvnc") and shutil.which("xclock")),
    reason="needs Debian's tigervnc-standalone-server and x11-apps",
)
def test_the_clock_of_a_plain_users_vnc_server_goes_on(folder: Path) -> None:
    """The case that the project started from; the example itself waits for the hands to move, three times."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "vnc" / "seed_case.py", folder],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(pictures) == ["1-started.png", "2-restored.png", "3-migrated.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
