"""The events that a command tells while it works: one JSON object a line, the schema of docs/events.md.

Every event has ``event``, its name, and ``t``, seconds since the command began, on a clock that never goes back;
only the first one says the time of day. Figures have QMP's names (with hyphens) where QMP has one. Whoever
reads skips events and fields that they do not know.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

#: of the schema; a higher one may have changed what is here
FORMAT = 1

#: what a number of a log may be: a reader computes with it
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Amount = Annotated[float, Meta(ge=0, le=1e18)]
Percentage = Annotated[int, Meta(ge=0, le=100)]


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event"):
    """What all have: `t` in seconds."""

    t: Amount


class Begin(Event, frozen=True, kw_only=True, tag="begin"):
    """The first one. `time`: of day, RFC 3339, UTC."""

    format: Annotated[int, Meta(ge=1)]
    time: str
    version: str
    command: str
    pid: int | None = None
    to: str | None = None
    source: str | None = field(name="from", default=None)
    listen: str | None = None
    mode: str | None = None


class Phase(Event, frozen=True, kw_only=True, tag="phase"):
    """A phase begins."""

    name: str


class Advance(Event, frozen=True, kw_only=True, tag="progress"):
    """How far a phase's pages are. Bytes; `mbps` in Mbit/s; `expected_downtime` in ms.

    `cpu_throttle_percentage`: how much of its time the tree is held back now; at the end of a round, from now on.
    """

    phase: str
    transferred: Count
    remaining: Count | None = None
    total: Count | None = None
    mbps: Amount
    dirty_pages_rate: Amount | None = field(name="dirty-pages-rate", default=None)
    expected_downtime: Amount | None = field(name="expected-downtime", default=None)
    dirty_sync_count: Count = field(name="dirty-sync-count")
    cpu_throttle_percentage: Percentage = field(name="cpu-throttle-percentage", default=0)


class RoundEnd(Event, frozen=True, kw_only=True, tag="round"):
    """A round of pre-copy is over. Rates with bytes in their names: bytes a second."""

    number: Count
    dirty_bytes: Count = field(name="dirty-bytes")
    sent_bytes: Count = field(name="sent-bytes")
    seconds: Amount
    mbps: Amount
    dirty_bytes_rate: Amount = field(name="dirty-bytes-rate")
    dirty_pages_rate: Amount = field(name="dirty-pages-rate")
    expected_downtime: Amount | None = field(name="expected-downtime", default=None)
    dirty_sync_count: Count = field(name="dirty-sync-count")
    cpu_throttle_percentage: Percentage = field(name="cpu-throttle-percentage", default=0)


class Pause(Event, frozen=True, kw_only=True, tag="pause"):
    """The tree stood still: `downtime` and its `parts`, in ms."""

    downtime: Amount
    parts: dict[str, Amount]


class Listening(Event, frozen=True, kw_only=True, tag="listening"):
    """`serve` can be reached."""

    host: str
    port: int


class Restored(Event, frozen=True, kw_only=True, tag="restored"):
    """A tree has arrived at `serve`, and runs."""

    root_pid: int
    figures: dict[str, Amount] = {}
    notes: list[str] = []


class Message(Event, frozen=True, kw_only=True, tag="message"):
    """Text for a person."""

    text: str


class Lost(Event, frozen=True, kw_only=True, tag="lost"):
    """The reader was too slow: so many events are missing here."""

    count: Count


class Completed(Event, frozen=True, kw_only=True, tag="completed"):
    """It is done. `figures`: times in ms, sizes in bytes."""

    exit_code: int
    root_pid: int | None = None
    figures: dict[str, Amount] = {}
    notes: list[str] = []


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    """It failed: `error` is the kind. `blockers`: what stood in the way, each with subject, reason and remedy."""

    exit_code: int
    error: str
    message: str
    blockers: list[dict[str, Any]] = []


class Cancelled(Event, frozen=True, kw_only=True, tag="cancelled"):
    """SIGINT or SIGTERM came, and everything was rolled back."""

    exit_code: int


KINDS: tuple[type[Event], ...] = (
    Begin, Phase, Advance, RoundEnd, Pause, Listening, Restored, Message, Lost, Completed, Failed, Cancelled,
)  # fmt: skip
_BY_NAME = {kind.__struct_config__.tag: kind for kind in KINDS}


class _Head(Struct):
    event: str
    t: Amount


def line(event: Event) -> bytes:
    """The line of an event, with its newline; text that is no Unicode (a file's name) loses what is none."""
    try:
        return msgspec.json.encode(event) + b"\n"
    except UnicodeEncodeError:
        return msgspec.json.encode(_unicode(msgspec.to_builtins(event))) + b"\n"


def _unicode(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case dict():
            return {key: _unicode(item) for key, item in value.items()}
        case list():
            return [_unicode(item) for item in value]
        case _:
            return value


def parse(text: bytes) -> Event | None:
    """The event of a line; None where its kind is not known here.

    Raises:
        msgspec.DecodeError: it is no JSON, or not what its kind has to be.
    """
    kind = _BY_NAME.get(msgspec.json.decode(text, type=_Head).event)
    return None if kind is None else msgspec.json.decode(text, type=kind)
