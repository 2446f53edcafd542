"""Draw the event log of one migration as a page: one file of HTML, without a script, that needs no network.

The log is what `migrate --events FILE` (or `--progress json`) wrote, also of a migration that failed, was cancelled or
killed. Logs of dump, restore and serve are drawn, too, as far as they say the same.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.cli import render
from pipeline.errors import StorageError, UsageError

EXAMPLE = (
    "  python -m pipeline migrate --pid 4242 --to other.example:7000 --secret-file secret --events log\n"
    "  python -m pipeline report log -o report.html"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="the log, or - for stdin")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="where the page goes, or - for stdout; a file that is there is replaced when the page is complete",
    )


def execute(arguments: argparse.Namespace) -> int:
    from pipeline.report import log, page

    _check(arguments.output)
    name = "stdin" if arguments.log == "-" else arguments.log
    try:
        with open(0 if arguments.log == "-" else arguments.log, "rb", closefd=arguments.log != "-") as file:
            _refuse_log(arguments.output, file)
            found = log.read(file, name)
    except OSError as error:
        raise StorageError(f"{name}: {_read_said(error)}") from None
    if found.is_cut:
        render.say(f"report: {name}: the last line is cut off, and left out")
    _write(arguments.output, page.page(found).encode())
    return 0


def _is_replaced(path: Path) -> bool:
    """Whether a file is put there; else it is a device or a pipe, and written to."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True


def _check(output: str) -> None:
    """Refuse early what `_write` could not do later.

    Raises:
        UsageError: no file can be made there.
    """
    if output == "-":
        return
    path = Path(output)
    try:
        if path.is_dir():
            raise UsageError(f"-o {output}: it is a directory; give the name of a file in it")
        if not _is_replaced(path):
            return
    except OSError as error:
        raise UsageError(f"-o {output}: {error.strerror}; give another place") from None
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"-o {output}: there is no directory {folder}; make it, or give another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"-o {output}: uid {os.geteuid()} cannot make a file in {folder}; give another place"
        )


def _refuse_log(output: str, log: BinaryIO) -> None:
    """Refuse to put the page where the log is.

    Raises:
        UsageError: it is the same file.
    """
    if output != "-" and Path(output).is_file() and os.path.samestat(os.fstat(log.fileno()), os.stat(output)):
        raise UsageError(f"-o {output}: that is the log itself; give another place")


def _write(output: str, page: bytes) -> None:
    """Whole or not at all where a file is put."""
    path = Path(output)
    try:
        if output == "-":
            with open(sys.stdout.fileno(), "wb", closefd=False) as file:
                file.write(page)
        elif not _is_replaced(path):
            path.write_bytes(page)
        else:
            _replace(path.resolve(), page)
    except OSError as error:
        if output == "-" and isinstance(error, BrokenPipeError):
            raise
        raise StorageError(f"{'stdout' if output == '-' else output}: {_write_said(error)}") from None


def _replace(path: Path, page: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(page)
        draft.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise


def _read_said(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file; give report the file that `migrate --events FILE` wrote"
    if isinstance(error, IsADirectoryError):
        return "it is a directory; give report the file that `migrate --events FILE` wrote"
    if isinstance(error, PermissionError):
        return f"{error.strerror}: uid {os.geteuid()} may not read it; chmod or chown it"
    return error.strerror or str(error)


def _write_said(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on device; free some, or give -o another place"
    return error.strerror or str(error)
