"""Progress on stderr: a bar with bytes, rate and time left on a terminal, terse lines elsewhere, or events.

With ``--progress json`` stderr has one JSON object a line (docs/events.md), and what else would be said to a person
is among them; ``--events FILE`` writes the same to a file.

The bar is imported only when a command has lasted longer than `PATIENCE_S`: most are over before that. It is redrawn
from `advance`, without a thread of its own.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, cast

from pipeline.amounts import milliseconds, size
from pipeline.cli import render
from pipeline.cli.render import show
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from pipeline.cli.eventlog import EventLog
    from pipeline.cli.outlet import Screen
    from pipeline.progress import Round

#: what `migrate` says, once, when it comes to these phases
_WARNINGS = {
    "postcopy-paused": "the destination cannot be reached, and the tree there waits for pages that are still here; it "
    "is tried again and again (^C twice gives up, and the tree is lost)",
    "take-back": "the tree runs on here. The destination does not answer, and may hold a copy of it, stopped: for half "
    "a minute it is tried to tell it (^C again waits no more; then ^C there ends the copy)",
}
#: how long a command runs before anything is drawn
PATIENCE_S = 0.3
#: between two lines where stderr is no terminal
LINE_EVERY_S = 2.0
#: between two redraws on a terminal
REDRAW_EVERY_S = 0.1


def told(ended: Round) -> str:
    """A round in words."""
    text = (
        f"round {ended.number}: {size(ended.dirty_bytes)} in {milliseconds(1e3 * ended.seconds)}, "
        f"rate {size(ended.rate)}/s, dirty rate {size(ended.dirty_rate)}/s"
    )
    if ended.expected_downtime_s is not None:
        text += f", expected downtime {milliseconds(1e3 * ended.expected_downtime_s)}"
    if ended.throttle_percentage:
        text += f", from now on held back {ended.throttle_percentage} % of its time"
    return text


class Lines:
    """Where stderr is a file or a pipe: a line for each phase that lasts, and now and then the bytes.

    Args:
        command: what the lines begin with.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._phase = "setup"
        self._began = self._next = time.monotonic() + PATIENCE_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def phase(self, name: str) -> None:
        self._phase = name
        if time.monotonic() > self._began:
            show(f"{self._command}: {name}")

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_EVERY_S
        total = "" if bytes_total is None else f" of {size(bytes_total)}"
        show(f"{self._command}: {self._phase}: {size(bytes_done)}{total}")

    def round(self, ended: Round) -> None:
        if time.monotonic() > self._began:
            show(f"{self._command}: {told(ended)}")

    def pause(self, parts: Mapping[str, float]) -> None:
        """The figures at the end have it."""


class Terminal:
    """On a terminal: rich's bar, taken away again at the end.

    Args:
        command: shown before the phase.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._phase = "setup"
        self._next = time.monotonic() + PATIENCE_S
        self._bar: Bar | None = None
        self._screen: Screen | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str) -> None:
        self._phase = name
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._command}: {name}", refresh=self._keeps_up)

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REDRAW_EVERY_S
        if self._bar is None:
            self._screen, self._bar = _make_bar()
            self._task = self._bar.add_task(f"{self._command}: {self._phase}", total=None)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=bytes_done, total=bytes_total, refresh=self._keeps_up)

    @property
    def _keeps_up(self) -> bool:
        return self._screen is None or self._screen.keeps_up

    def round(self, ended: Round) -> None:
        if self._bar is not None:
            self._bar.console.print(
                f"{self._command}: {told(ended)}", highlight=False, markup=False, soft_wrap=True
            )

    def pause(self, parts: Mapping[str, float]) -> None:
        """The figures at the end have it."""


def _make_bar() -> tuple[Screen | None, Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    from pipeline.cli.outlet import Screen

    outlet = render.outlet_of(sys.stderr)
    screen = Screen(outlet) if outlet is not None else None
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=cast("IO[str]", screen)) if screen is not None else Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    return screen, bar


class Elsewhere(SystemExit):
    """This process has only waited for another one, which has told how it ended."""


class Listener:
    """What a command tells its recipe to call: a person's listener, events, both or none; a context manager.

    Args:
        command: which one calls it.
        shown: for the person at stderr, or None.
        log: takes the events, or None; owned.
    """

    def __init__(self, command: str, shown: Lines | Terminal | None, log: EventLog | None) -> None:
        self._command = command
        self._shown = shown
        self._log = log
        self._warnings = dict(_WARNINGS) if command == "migrate" else {}
        self._unwaited = ExitStack()

    def __enter__(self) -> Self:
        self._unwaited.enter_context(render.unwaited())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_show()
        if self._log is not None:
            self._log.close(None if isinstance(error, Elsewhere) else error)

    def _end_show(self) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None
        self._unwaited.close()

    def phase(self, name: str) -> None:
        for one in (self._shown, self._log):
            if one is not None:
                one.phase(name)
        warning = self._warnings.pop(name, None)
        if warning is not None and self._shown is not None:
            render.say(f"{self._command}: {warning}")

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        for one in (self._shown, self._log):
            if one is not None:
                one.advance(bytes_done, bytes_total)

    def round(self, ended: Round) -> None:
        for one in (self._shown, self._log):
            if one is not None:
                one.round(ended)

    def pause(self, parts: Mapping[str, float]) -> None:
        for one in (self._shown, self._log):
            if one is not None:
                one.pause(parts)

    def listening(self, host: str, port: int) -> None:
        """`serve` can be reached there."""
        if self._log is not None:
            self._log.listening(host, port)

    def restored(self, root_pid: int, figures: Mapping[str, float], notes: Sequence[str]) -> None:
        """A tree has arrived at `serve`."""
        if self._log is not None:
            self._log.restored(root_pid, figures, notes)

    def completed(
        self,
        root_pid: int | None = None,
        figures: Mapping[str, float] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """It is done: nothing more is shown, and the last event is written."""
        self._end_show()
        if self._log is not None:
            self._log.completed(root_pid, figures or {}, notes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("text", "json", "none"),
        default="text",
        help="on stderr: for people (default), one JSON object a line, or nothing",
    )
    parser.add_argument("--events", metavar="FILE", help="write the same JSON lines to FILE")


def listener(command: str, arguments: argparse.Namespace, **subject: object) -> Listener:
    """The listener that the options ask for; `subject`: what the first event says of the command.

    Raises:
        UsageError: the file for events cannot be written.
    """
    shown: Lines | Terminal | None = None
    if arguments.progress == "text":
        shown = Terminal(command) if sys.stderr.isatty() else Lines(command)
    json = arguments.progress == "json"
    if not json and arguments.events is None:
        return Listener(command, shown, None)
    from pipeline.cli.eventlog import EventLog
    from pipeline.cli.outlet import Outlet

    outlets = []
    if arguments.events is not None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(arguments.events, flags, 0o666)
        except (OSError, ValueError) as error:
            raise UsageError(f"--events {arguments.events}: {getattr(error, 'strerror', error)}") from None
        outlets.append(Outlet(fd))
        os.close(fd)
    if json:
        outlets.append(Outlet(sys.stderr.fileno()))
    log = EventLog(outlets, command, subject)
    render.overhear(log.message, instead=json)
    return Listener(command, shown, log)
