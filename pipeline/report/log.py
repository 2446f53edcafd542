"""Reading the log of a command: its events, checked, in order.

A log is what `--events FILE` or `--progress json` wrote (docs/events.md). It is somebody else's file: lines, numbers
and how many there are have bounds, and what is no event is refused by its line. One thing is borne, because that is
when a log is wanted most: the command was killed, so that the end is missing, or the last line is half there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO, NamedTuple

from pipeline import events
from pipeline.errors import LogError

#: a line that is longer is no event
MOST_BYTES_A_LINE = 1 << 20
#: more than a day of progress
MOST_LINES = 1_000_000

_GIVE = "give report the file that `migrate --events FILE` wrote"


class Stage(NamedTuple):
    """Something that the command did, in seconds since it began."""

    name: str
    begin_s: float
    end_s: float


@dataclass
class Log:
    """The events of one command.

    Args:
        end: how it ended; None if the log says nothing of that.
        last_s: when the last event was.
        lost: events that a slow reader missed.
        is_cut: half of a last line was left out.
    """

    begin: events.Begin
    phases: list[events.Phase] = field(default_factory=list)
    advances: list[events.Advance] = field(default_factory=list)
    rounds: list[events.RoundEnd] = field(default_factory=list)
    restored: list[events.Restored] = field(default_factory=list)
    messages: list[events.Message] = field(default_factory=list)
    pause: events.Pause | None = None
    end: events.Completed | events.Failed | events.Cancelled | None = None
    last_s: float = 0.0
    lost: int = 0
    is_cut: bool = False

    def stages(self) -> list[Stage]:
        """The phases, each until the next one; ``start`` is before the first, and rounds in a row are one."""
        begun = [("start", 0.0), *((phase.name, phase.t) for phase in self.phases)]
        ends_s = [begin_s for _, begin_s in begun[1:]] + [self.last_s]
        single = [Stage(name, begin_s, end_s) for (name, begin_s), end_s in zip(begun, ends_s, strict=True)]
        found: list[Stage] = []
        for are_rounds, group in groupby(single, lambda stage: stage.name.partition(" ")[0] == "round"):
            stages = list(group)
            found += [_as_one(stages)] if are_rounds and len(stages) > 1 else stages
        return found

    def paused(self) -> Stage | None:
        """When the tree stood still: it is told as soon as it is over."""
        if self.pause is None:
            return None
        return Stage("pause", max(self.pause.t - self.pause.downtime / 1e3, 0.0), self.pause.t)

    def figures(self) -> dict[str, float]:
        """Those of the result; without one, none."""
        return self.end.figures if isinstance(self.end, events.Completed) else {}


def _as_one(rounds: list[Stage]) -> Stage:
    first, last = (stage.name.partition(" ")[2] for stage in (rounds[0], rounds[-1]))
    return Stage(f"rounds {first}-{last}" if first != last else "rounds", rounds[0].begin_s, rounds[-1].end_s)


def read(file: BinaryIO, name: str) -> Log:
    """The log in `file`, which stays the caller's.

    Args:
        name: what errors call it.

    Raises:
        LogError: it is empty, foreign, damaged, too new, or the log of several commands.
        OSError: it cannot be read.
    """
    log: Log | None = None
    number = 0
    while text := file.readline(MOST_BYTES_A_LINE + 1):
        number += 1
        where = f"{name}: line {number}"
        if number > MOST_LINES:
            raise LogError(f"{where}: a report draws {MOST_LINES} lines at most; give it a shorter log")
        if log is None:
            log = Log(_head(text, where))
            continue
        try:
            event = _event(text)
        except ValueError as error:
            if not text.endswith(b"\n") and len(text) <= MOST_BYTES_A_LINE:
                log.is_cut = True
                break
            raise LogError(f"{where} is no event ({error}); take it out, and the rest is drawn") from None
        if event is not None:
            _add(log, event, where)
    if log is None:
        raise LogError(f"{name}: it is empty; {_GIVE}, once the command has begun")
    return log


def _event(text: bytes) -> events.Event | None:
    """None: its kind is not known here.

    Raises:
        ValueError: it is no event; the text says why.
    """
    if len(text) > MOST_BYTES_A_LINE:
        raise ValueError(f"longer than {MOST_BYTES_A_LINE} bytes")
    try:
        return events.parse(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _head(text: bytes, where: str) -> events.Begin:
    try:
        event = _event(text)
    except ValueError as error:
        raise LogError(f"{where} is no event ({error}), so this is no log; {_GIVE}") from None
    if not isinstance(event, events.Begin):
        raise LogError(
            f'{where} is not the event "begin": what was before it is missing; give report the whole log'
        )
    if event.format > events.FORMAT:
        raise LogError(
            f"{where}: the log has format {event.format}, and this version knows {events.FORMAT}; "
            f"draw it with the version that wrote it, {event.version}"
        )
    return event


def _add(log: Log, event: events.Event, where: str) -> None:
    if isinstance(event, events.Begin):
        raise LogError(f"{where}: another command begins here; give report a file with the lines of one")
    if event.t < log.last_s:
        raise LogError(f"{where} is from before the line above it; give report the log as it was written")
    log.last_s = event.t
    match event:
        case events.Phase():
            log.phases.append(event)
        case events.Advance():
            log.advances.append(event)
        case events.RoundEnd():
            log.rounds.append(event)
        case events.Pause():
            log.pause = event
        case events.Restored():
            log.restored.append(event)
        case events.Message():
            log.messages.append(event)
        case events.Lost():
            log.lost += event.count
        case events.Completed() | events.Failed() | events.Cancelled():
            log.end = event
