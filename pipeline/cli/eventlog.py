"""A listener that writes events: rate-limited progress, rounds, the pause, and how it ended."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import __version__, events
from pipeline.cli.outlet import Outlet
from pipeline.cli.render import blocker
from pipeline.errors import PipelineError, Refused
from pipeline.progress import Round

#: between two events of progress
EVERY_S = 0.1


class EventLog:
    """Writes to all `outlets`, which it owns; the first event says what `subject` is.

    Args:
        command: which one.
        subject: fields of `events.Begin`.
    """

    def __init__(self, outlets: Sequence[Outlet], command: str, subject: Mapping[str, Any]) -> None:
        self._outlets = outlets
        self._began = time.monotonic()
        self._phase = "setup"
        self._told_s = self._began
        self._told_bytes = self._bytes = 0
        self._total: int | None = None
        self._last: Round | None = None
        self._ended = False
        self._put(
            events.Begin(
                t=0.0,
                format=events.FORMAT,
                time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                version=__version__,
                command=command,
                **subject,
            )
        )

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 6)

    def _put(self, event: events.Event, *, droppable: bool = False) -> None:
        line = events.line(event)
        for outlet in self._outlets:
            if droppable and not outlet.keeps_up:
                outlet.put(b"")  # it may have room by now
                continue
            if outlet.dropped and outlet.keeps_up:
                lost, outlet.dropped = outlet.dropped, 0
                outlet.put(events.line(events.Lost(t=event.t, count=lost)))
            outlet.put(line)

    def phase(self, name: str) -> None:
        self._rest()
        self._phase = name
        self._told_s = time.monotonic()
        self._told_bytes = self._bytes = 0
        self._total = None
        self._put(events.Phase(t=self._now(), name=name))

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        if bytes_done < self._told_bytes:  # another round
            self._told_bytes = 0
        self._bytes, self._total = bytes_done, bytes_total
        if time.monotonic() - self._told_s >= EVERY_S:
            self._tell()

    def _rest(self) -> None:
        """Tell what was not told because it came too soon."""
        if self._bytes > self._told_bytes:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        spent_s = max(now - self._told_s, 1e-6)
        last = self._last
        expected_s = last.expected_downtime_s if last is not None else None
        self._put(
            events.Advance(
                t=self._now(),
                phase=self._phase,
                transferred=self._bytes,
                remaining=None if self._total is None else max(self._total - self._bytes, 0),
                total=self._total,
                mbps=round(8e-6 * (self._bytes - self._told_bytes) / spent_s, 3),
                dirty_pages_rate=None if last is None else round(last.dirty_rate / mmap.PAGESIZE, 1),
                expected_downtime=None if expected_s is None else round(1e3 * expected_s, 3),
                dirty_sync_count=0 if last is None else last.number + 1,
                cpu_throttle_percentage=0 if last is None else last.throttle_percentage,
            ),
            droppable=True,
        )
        self._told_s, self._told_bytes = now, self._bytes

    def round(self, ended: Round) -> None:
        self._rest()
        self._last = ended
        self._told_bytes = self._bytes = 0
        self._told_s = time.monotonic()
        expected_s = ended.expected_downtime_s
        self._put(
            events.RoundEnd(
                t=self._now(),
                number=ended.number,
                dirty_bytes=ended.dirty_bytes,
                sent_bytes=ended.sent_bytes,
                seconds=round(ended.seconds, 6),
                mbps=round(8e-6 * ended.rate, 3),
                dirty_bytes_rate=round(ended.dirty_rate, 1),
                dirty_pages_rate=round(ended.dirty_rate / mmap.PAGESIZE, 1),
                expected_downtime=None if expected_s is None else round(1e3 * expected_s, 3),
                dirty_sync_count=ended.number + 1,
                cpu_throttle_percentage=ended.throttle_percentage,
            )
        )

    def pause(self, parts: Mapping[str, float]) -> None:
        rounded = {name: round(value, 3) for name, value in parts.items()}
        self._put(events.Pause(t=self._now(), downtime=round(sum(parts.values()), 3), parts=rounded))

    def message(self, text: str) -> None:
        """Text for a person. What is said after the end is in the last event already."""
        if not self._ended:
            self._put(events.Message(t=self._now(), text=text))

    def listening(self, host: str, port: int) -> None:
        """`serve` can be reached there."""
        self._put(events.Listening(t=self._now(), host=host, port=port))

    def restored(self, root_pid: int, figures: Mapping[str, float], notes: Sequence[str]) -> None:
        """A tree has arrived."""
        self._rest()
        self._put(
            events.Restored(t=self._now(), root_pid=root_pid, figures=_figures(figures), notes=list(notes))
        )

    def completed(self, root_pid: int | None, figures: Mapping[str, float], notes: Sequence[str]) -> None:
        """It is done; what comes after this is no event any more, unless it is a failure."""
        self._rest()
        self._ended = True
        self._put(
            events.Completed(
                t=self._now(), exit_code=0, root_pid=root_pid, figures=_figures(figures), notes=list(notes)
            )
        )

    def close(self, error: BaseException | None = None) -> None:
        """Tell how it failed, if it did, and let go; idempotent."""
        if error is not None and not (self._ended and isinstance(error, SystemExit)):
            self._rest()
            self._put(self._failure(error))
        self._ended = True
        for outlet in self._outlets:
            outlet.close()
        self._outlets = ()

    def _failure(self, error: BaseException) -> events.Event:
        if isinstance(error, KeyboardInterrupt):
            return events.Cancelled(t=self._now(), exit_code=130)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            return events.Cancelled(t=self._now(), exit_code=error.code)
        blockers = error.blockers if isinstance(error, Refused) else ()
        return events.Failed(
            t=self._now(),
            exit_code=error.exit_code if isinstance(error, PipelineError) else 1,
            error=type(error).__name__,
            message=str(error),
            blockers=[blocker(item) for item in blockers],
        )


def _figures(values: Mapping[str, float]) -> dict[str, float]:
    """Times to the microsecond; whole numbers stay what they are."""
    return {name: round(value, 3) for name, value in values.items()}
