"""What a restore is given for ends outside of the tree (`pipeline.resources.external_end`), found before all else.

In this order: what a person names (``--inherit-fd NAME=FD`` or ``NAME=PATH``); the terminal of the shell, for the
terminal of a job; standard input, output and error of the restorer, for ends that are those of the tree, while it
stays in the foreground; for a FIFO its name. What is missing then is refused, all of it at once.

A pipe, FIFO or terminal is opened anew through /proc, so that flags which the tree sets are its own; anything else is
shared with whoever gave it, as by execve(2).

Source: proc_pid_fd(5), pipe(7).
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress

import msgspec

from pipeline.errors import Blocker, ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import Index, OpenFile
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.resources.external_state import KIND_NAME, ExternalState, given_key
from pipeline.resources.pump import COMM, Pump

_STDIO = {0: "stdin", 1: "stdout", 2: "stderr"}
_NEW_FILE_MODE = 0o666
PUMP = COMM.decode()
_JOB = "restore --shell-job, from an interactive shell"


class _End(msgspec.Struct, frozen=True):
    file: OpenFile
    record: ExternalState
    holders: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return os.fsdecode(self.record.name)

    @property
    def subject(self) -> str:
        pid, fd = self.holders[0] if self.holders else (0, -1)
        return f"pid {pid} fd {fd} ({self.name})" if pid else self.name

    @property
    def standard(self) -> int | None:
        return min((fd for _, fd in self.holders if fd in _STDIO), default=None)


def external_ends(image: Image) -> dict[str, list[tuple[int, int]]]:
    """Names of the ends outside of the tree, and who holds them: (level-0 pid, descriptor number)."""
    found: dict[str, list[tuple[int, int]]] = {}
    for end in _ends(image):
        found.setdefault(end.name, []).extend(end.holders)
    return found


def _ends(image: Image) -> list[_End]:
    files = [file for file in image.files.values() if file.kind == KIND_NAME]
    if not files:
        return []
    holders: dict[Index, list[tuple[int, int]]] = {}
    for process in image.processes.values():
        for entry in process.fds:
            holders.setdefault(entry.file, []).append((process.pids[0], entry.fd))
    try:
        return [
            _End(file, msgspec.convert(file.state, ExternalState), tuple(holders.get(file.index, ())))
            for file in files
        ]
    except msgspec.ValidationError as error:
        raise ImageError(f"an end outside of the tree: {error}") from None


class GivenEnds:
    """What is given for the ends outside of an image.

    Ownership: holds one descriptor for each until `close`; `made` lends them to `CreateScope.once`.

    Args:
        image: the records.
        policy: what was given.
        job_terminal: path of the terminal of the shell; None where no job is restored.
        strict: names that the image does not have are an error, too.
    """

    def __init__(
        self, image: Image, policy: RestorePolicy, job_terminal: str | None, strict: bool = True
    ) -> None:
        self._ends = _ends(image)
        self._policy = policy
        self._job_terminal = job_terminal
        self._is_job = image.head.job is not None
        self._strict = strict
        self._held: dict[Index, LocalFd] = {}
        self._pumps: dict[str, Pump] = {}
        self.notes: list[str] = []
        #: descriptors of this process that were given
        self.given: list[int] = []

    # -- which ------------------------------------------------------------------------

    def missing(self) -> Iterator[Blocker]:
        """Ends for which nothing was given, and names that the image does not have."""
        names = {end.name for end in self._ends}
        for name in sorted(set(self._policy.inherited) - names) if self._strict else ():
            has = ", ".join(sorted(names)) or "none"
            yield Blocker(f"--inherit-fd {name}", f"the image has no end outside of this name, but: {has}")
        if self._is_job and self._job_terminal is None:
            yield Blocker("the tree", "was a job of a shell, on its terminal", _JOB)
        for end in self._ends:
            if self._source(end) is None and end.record.path is None:
                yield Blocker(
                    end.subject,
                    "has an end outside of the tree, for which nothing is given",
                    self._remedy(end),
                )

    def _remedy(self, end: _End) -> str:
        if end.record.job:
            return _JOB
        there = end.standard is not None and not self._policy.stdio
        return f"--inherit-fd '{end.name}=FD' or '{end.name}=PATH'" + (
            "; without --detach it is this command's own" if there else ""
        )

    def _source(self, end: _End) -> str | int | None:
        """A path or a descriptor of this process; None for nothing."""
        given = self._policy.inherited.get(end.name)
        if given is not None:
            return int(given) if given.isdecimal() else given
        if end.record.job and self._job_terminal is not None:
            return "/dev/tty" if end.record.controlling else self._job_terminal
        if end.record.controlling or not self._policy.stdio:
            return None
        number = end.standard
        if number is None:
            same = [other.standard for other in self._ends if other.name == end.name]
            number = min((number for number in same if number is not None), default=None)
        return number

    # -- having them ------------------------------------------------------------------

    def open(self) -> None:
        """Get hold of everything that was given.

        Raises:
            RebuildError: it cannot be had, or is not open for what the tree does with it.
        """
        unread = {end.name for end in self._ends if end.record.buffer is not None}
        for end in self._ends:
            source = self._source(end)
            if source is None:
                continue
            fd = self._pumped(end, source) if end.name in unread else _open(end, source)
            LEDGER.take("given end", fd)
            self._held[end.file.index] = fd
            if isinstance(source, int) and source not in self.given:
                self.given.append(source)
            if end.name not in self._policy.inherited and isinstance(source, int):
                self.notes.append(f"{end.subject} is the {_STDIO[source]} of this command")

    def _pumped(self, end: _End, source: str | int) -> LocalFd:
        """An end of the pipe in which unread bytes come before what was given."""
        if end.name not in self._pumps:
            reader = next(other for other in self._ends if other.name == end.name and other.record.buffer)
            self._pumps[end.name] = Pump(_open(reader, source))
            assert reader.record.buffer is not None
            size = sum(map(len, reader.record.buffer.unread))
            self.notes.append(
                f"{reader.subject}: {size} bytes that were not read yet come first; a process called {PUMP} passes on "
                "what is given"
            )
        access = end.file.flags & os.O_ACCMODE
        pipe = f"/proc/self/fd/{self._pumps[end.name].reader}"
        return LocalFd(os.open(pipe, access | os.O_NONBLOCK | os.O_CLOEXEC))

    def start(self) -> None:
        """The tree runs: what was given for pipes with unread bytes is passed on from now on.

        Raises:
            RebuildError: no process can be made.
        """
        for pump in self._pumps.values():
            pump.start()

    @property
    def made(self) -> Mapping[tuple[str, int], LocalFd]:
        """What `CreateScope.once` shall find made already."""
        return {given_key(index): fd for index, fd in self._held.items()}

    def close(self) -> None:
        """Close what is held here; idempotent."""
        while self._pumps:
            self._pumps.popitem()[1].close()
        while self._held:
            _, fd = self._held.popitem()
            os.close(fd)
            LEDGER.give_back("given end", fd)


def _open(end: _End, source: str | int) -> LocalFd:
    access = end.file.flags & os.O_ACCMODE
    common = os.O_NOCTTY | os.O_CLOEXEC
    try:
        if isinstance(source, str):
            regular = not os.path.exists(source) or os.path.isfile(source)
            more = os.O_CREAT | os.O_APPEND if regular and access == os.O_WRONLY else 0
            # of a regular file no flag is set later
            more |= 0 if regular else os.O_NONBLOCK
            return LocalFd(os.open(source, access | common | more, _NEW_FILE_MODE))
        mode = os.fstat(source).st_mode
        if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(source)):
            with suppress(OSError):  # nobody is at its other end, or its owner is another one
                return LocalFd(os.open(f"/proc/self/fd/{source}", access | common | os.O_NONBLOCK))
        if fcntl.fcntl(source, fcntl.F_GETFL) & os.O_ACCMODE not in (os.O_RDWR, access):
            does = {os.O_RDONLY: "reads from", os.O_WRONLY: "writes to"}.get(access, "reads and writes")
            raise RebuildError(
                f"{end.subject}: the tree {does} it, and descriptor {source} is not open for that"
            )
        return LocalFd(os.dup(source))
    except OSError as error:
        raise RebuildError(f"{end.subject}: what is given for it, {source}: {error.strerror}") from error
