"""Notes about what a command has made outside of itself, so that `clean` can take it away after a SIGKILL.

A note is written before the thing is made and removed after the thing is gone. It says
who made it, so that a note whose maker is gone is a leftover and nothing else is. A
maker is known by boot, pid namespace, pid and start time; a note of another pid
namespace cannot be judged from here and is kept.

Notes are in /run/pipeline for root and in $XDG_RUNTIME_DIR/pipeline for others. Where
there is no such place, or no room in it, nothing is noted: it changes what `clean` can find, nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["directory", "file", "image"]


class Leftover(NamedTuple):
    """What `sweep` did with one note; `removed` is false where it could not or must not, for `reason`."""

    path: str
    removed: bool
    reason: str


def notes_directory() -> Path | None:
    """Where notes are kept; None where there is no private place for them."""
    if os.geteuid() == 0:
        base = "/run"
    elif "XDG_RUNTIME_DIR" in os.environ:
        base = os.environ["XDG_RUNTIME_DIR"]
    else:
        return None
    folder = Path(base) / "pipeline"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
    return folder if private else None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int | Literal["self"]) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[19]


class Unfinished(NamedTuple):
    """What a maker of an image leaves in its directory.

    `claim`: the name of what it makes first there; its content is that of the note.
    `names`: of what else it makes, as patterns of glob. `complete`: what is there when the image is to stay.
    """

    claim: str
    names: list[str]
    complete: str


@contextmanager
def noted(kind: Kind, path: Path, unfinished: Unfinished | None = None) -> Iterator[bytes]:
    """Note `path` while the body makes, uses and removes it; yields what the note says.

    Args:
        unfinished: of an ``image``.
    """
    maker = {
        "kind": kind,
        "path": str(path.absolute()),
        "boot": _boot(),
        "pidns": os.readlink("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started("self"),
        "number": secrets.token_hex(4),
    }
    if unfinished is not None:
        maker["unfinished"] = unfinished
    content = json.dumps(maker).encode()
    folder = notes_directory()
    note = folder / f"{os.getpid()}-{maker['number']}.json" if folder is not None else None
    try:
        if note is not None:
            with suppress(OSError):  # there is no room for it
                note.write_bytes(content)
        yield content
    finally:
        if note is not None:
            note.unlink(missing_ok=True)


def sweep() -> list[Leftover]:
    """Remove what noted makers that are gone have left, and their notes."""
    folder = notes_directory()
    if folder is None:
        return []
    return [_judge(note) for note in sorted(folder.glob("*.json"))]


def _judge(note: Path) -> Leftover:
    try:
        content = note.read_bytes()
        maker = json.loads(content)
        kind, path = maker["kind"], maker["path"]
        same_boot = maker["boot"] == _boot()
        if same_boot and maker["pidns"] != os.readlink("/proc/self/ns/pid"):
            return Leftover(path, False, "made in another pid namespace; run `clean` there")
        if same_boot and maker["started"] == _started(int(maker["pid"])):
            return Leftover(path, False, f"in use by pid {maker['pid']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Leftover(str(note), False, f"not a note of this program ({error})")
    try:
        if kind == "directory":
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        elif kind == "image":
            _remove_image(Path(path), content, Unfinished(*maker["unfinished"]))
        else:
            Path(path).unlink(missing_ok=True)
    except OSError as error:
        return Leftover(path, False, error.strerror or str(error))
    note.unlink(missing_ok=True)
    return Leftover(path, True, f"left by pid {maker['pid']}, which is gone")


def _remove_image(directory: Path, content: bytes, unfinished: Unfinished) -> None:
    """Remove what of an image its maker has left; the claim last. Not what somebody else has made there since."""
    claim = directory / unfinished.claim
    with suppress(FileNotFoundError):
        if claim.read_bytes() != content:
            return
        if not (directory / unfinished.complete).exists():
            for path in [one for name in unfinished.names for one in directory.glob(name)]:
                path.unlink()
        claim.unlink()
    with suppress(OSError):
        directory.rmdir()  # only succeeds if nothing is left
