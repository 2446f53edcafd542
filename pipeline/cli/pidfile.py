"""Writing a pid where scripts look for it."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import UsageError


def check(path: str | None) -> None:
    """Refuse early what `write` could not do later.

    Raises:
        UsageError: the directory does not exist or is not writable.
    """
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--pidfile {path}: cannot create a file in {folder}")


def write(path: str | None, pid: int) -> None:
    """Write `pid` and a newline, whole or not at all; nothing where no path was given."""
    if path is None:
        return
    final = Path(path)
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    draft.write_text(f"{pid}\n")
    draft.replace(final)
