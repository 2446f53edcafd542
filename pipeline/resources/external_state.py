"""The record of an end outside of the tree, and what a restore asks of it: see `pipeline.resources.external_end`."""

from __future__ import annotations

import os
import stat

from pipeline.ids import LocalFd
from pipeline.image.schema import Path, PathRef, Record
from pipeline.resources.pipe_buffer import Buffer

KIND_NAME = "external"
_SETTABLE = os.O_NONBLOCK | os.O_ASYNC


class ExternalState(Record, frozen=True, kw_only=True):
    """One end.

    `name`: see `external_end.name_of`. `path`: of a FIFO whose name leads to it. `controlling`: it is /dev/tty.
    `job`: it is the terminal of the shell whose job the tree is. `buffer`: with the first end that reads.
    """

    name: Path
    path: PathRef | None = None
    controlling: bool = False
    job: bool = False
    buffer: Buffer | None = None


def given_key(index: int) -> tuple[str, int]:
    """Under which `CreateScope.once` knows what was given for an open file."""
    return "external", index


def settable(fd: LocalFd) -> int:
    """Status flags that are set on what was given: those of a regular file are its giver's."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return 0
    return _SETTABLE | (os.O_DIRECT if stat.S_ISFIFO(mode) else 0)
