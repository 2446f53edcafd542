"""`clean` removes what a killed command noted, and nothing of a living one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import leftovers


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        notes = Path(name) / "notes"
        notes.mkdir(mode=0o700)
        monkeypatch.setattr(leftovers, "notes_directory", lambda: notes)
        yield Path(name)


def maker(folder: Path) -> subprocess.Popen[str]:
    """A process that makes a directory with a file in it and then waits."""
    program = f"""
        import pathlib, sys, time
        from pipeline import leftovers
        leftovers.notes_directory = lambda: pathlib.Path({str(folder / "notes")!r})
        made = pathlib.Path({str(folder / "made")!r})
        with leftovers.noted("directory", made):
            made.mkdir()
            (made / "file").touch()
            print("made", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    return process


def test_a_living_maker_keeps_its_things_and_a_killed_one_does_not(folder: Path) -> None:
    with maker(folder) as process:
        (kept,) = leftovers.sweep()
        assert (kept.removed, kept.reason) == (False, f"in use by pid {process.pid}")
        assert (folder / "made" / "file").exists()
        process.kill()
        process.wait()
    (gone,) = leftovers.sweep()
    assert (gone.removed, gone.path) == (True, str(folder / "made"))
    assert not (folder / "made").exists()
    assert leftovers.sweep() == []


def test_an_orderly_end_leaves_no_note(folder: Path) -> None:
    with leftovers.noted("file", folder / "x"):
        assert len(list((folder / "notes").iterdir())) == 1
    assert list((folder / "notes").iterdir()) == []


def test_without_room_for_a_note_all_goes_on(folder: Path) -> None:
    (folder / "notes").rmdir()
    with leftovers.noted("file", folder / "x"):
        assert leftovers.sweep() == []


@pytest.mark.parametrize("state", ["begun", "complete", "taken over", "removed"])
def test_an_image_that_was_killed_is_removed_and_no_other(folder: Path, state: str) -> None:
    place = folder / "image"
    place.mkdir()
    unfinished = leftovers.Unfinished("claim", [".*.partial", "image"], "manifest")
    with leftovers.noted("image", place, unfinished) as content:
        (note,) = (folder / "notes").iterdir()
        told = note.read_bytes()
    note.write_bytes(told.replace(f'"{leftovers._started("self")}"'.encode(), b'"1"'))
    names = {"image", ".index.7.partial", "claim"} | ({"manifest"} if state == "complete" else set())
    for name in () if state == "removed" else names:
        (place / name).write_bytes(b"somebody else" if state == "taken over" else note.read_bytes())
    assert told == content
    (gone,) = leftovers.sweep()
    assert gone.removed
    left = {"begun": set(), "complete": names - {"claim"}, "taken over": names, "removed": set()}[state]
    assert (set(os.listdir(place)) if place.exists() else set()) == left
    assert list((folder / "notes").iterdir()) == []


def test_a_pid_that_was_given_to_somebody_else_is_not_the_maker(folder: Path) -> None:
    path = folder / "x"
    path.touch()
    with leftovers.noted("file", path):
        (note,) = (folder / "notes").iterdir()
        note.write_text(note.read_text().replace(f'"{leftovers._started("self")}"', '"1"'))
        (gone,) = leftovers.sweep()
    assert gone.removed
    assert not path.exists()


def test_a_note_of_another_pid_namespace_is_kept(folder: Path) -> None:
    with leftovers.noted("file", folder / "x"):
        (note,) = (folder / "notes").iterdir()
        note.write_text(note.read_text().replace(os.readlink("/proc/self/ns/pid"), "pid:[1]"))
        (kept,) = leftovers.sweep()
        assert not kept.removed


def test_a_file_that_is_no_note_is_kept_and_said(folder: Path) -> None:
    (folder / "notes" / "x.json").write_text("[]")
    (kept,) = leftovers.sweep()
    assert not kept.removed


def test_the_command_says_what_it_did() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "clean"], capture_output=True, text=True, check=True
    )
    assert done.stdout
