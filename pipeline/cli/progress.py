"""Progress on stderr: a bar with bytes, rate and time left on a terminal, terse lines elsewhere.

The bar is imported only when a command has lasted longer than `PATIENCE_S`: most
are over before that. It is redrawn from `advance`, without a thread of its own.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pipeline.cli.render import milliseconds, say, size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from pipeline.progress import Round

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
    if ended.expected_downtime_s is None:
        return text
    return f"{text}, expected downtime {milliseconds(1e3 * ended.expected_downtime_s)}"


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
            say(f"{self._command}: {name}")

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_EVERY_S
        total = "" if bytes_total is None else f" of {size(bytes_total)}"
        say(f"{self._command}: {self._phase}: {size(bytes_done)}{total}")

    def round(self, ended: Round) -> None:
        if time.monotonic() > self._began:
            say(f"{self._command}: {told(ended)}")

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
            self._bar.update(self._task, description=f"{self._command}: {name}", refresh=True)

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REDRAW_EVERY_S
        if self._bar is None:
            self._bar = _make_bar()
            self._task = self._bar.add_task(f"{self._command}: {self._phase}", total=None)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=bytes_done, total=bytes_total, refresh=True)

    def round(self, ended: Round) -> None:
        if self._bar is not None:
            self._bar.console.print(
                f"{self._command}: {told(ended)}", highlight=False, markup=False, soft_wrap=True
            )

    def pause(self, parts: Mapping[str, float]) -> None:
        """The figures at the end have it."""


def _make_bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )


def listener(command: str) -> Lines | Terminal:
    """The progress listener that suits stderr; a context manager."""
    return Terminal(command) if sys.stderr.isatty() else Lines(command)
