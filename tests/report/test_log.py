"""Logs that are whole, without an end, cut off, damaged, foreign: what is read of them, or what is said."""

from __future__ import annotations

import io

import pytest

from pipeline import events
from pipeline.errors import LogError
from pipeline.report import log

BEGIN = events.line(
    events.Begin(t=0, format=1, time="2026-11-26T08:32:21.287Z", version="0.1.0", command="migrate", pid=7)
)


def phase(t: float, name: str) -> bytes:
    return events.line(events.Phase(t=t, name=name))


def read(*lines: bytes) -> log.Log:
    return log.read(io.BytesIO(b"".join(lines)), "FILE")


def test_phases_become_stages_without_gaps_and_rounds_in_a_row_one() -> None:
    names = ["setup", "draft", "round 1", "round 2", "round 10", "freeze", "round"]
    lines = [phase(1.0 + index, name) for index, name in enumerate(names)]
    found = read(BEGIN, *lines, events.line(events.Cancelled(t=9, exit_code=130)))
    assert found.stages() == [
        ("start", 0.0, 1.0),
        ("setup", 1.0, 2.0),
        ("draft", 2.0, 3.0),
        ("rounds 1-10", 3.0, 6.0),
        ("freeze", 6.0, 7.0),
        ("round", 7.0, 9.0),
    ]


def test_the_pause_is_before_it_is_told_and_not_before_the_begin() -> None:
    assert read(BEGIN).paused() is None
    told = events.line(events.Pause(t=2, downtime=500, parts={"freeze": 500}))
    assert read(BEGIN, told).paused() == ("pause", 1.5, 2.0)
    told = events.line(events.Pause(t=2, downtime=5000, parts={}))
    assert read(BEGIN, told).paused() == ("pause", 0.0, 2.0)


def test_what_is_not_known_is_skipped_and_what_is_lost_is_counted() -> None:
    found = read(
        BEGIN,
        b'{"event":"weather","t":5,"sun":true}\n',
        b'{"event":"phase","t":6,"name":"setup","more":[]}\n',
        events.line(events.Lost(t=7, count=3)),
        events.line(events.Lost(t=7, count=4)),
    )
    assert [one.name for one in found.phases] == ["setup"]
    assert (found.lost, found.last_s, found.end, found.is_cut) == (7, 7.0, None, False)


@pytest.mark.parametrize("bytes_left", [1, 20, 35])
def test_half_a_last_line_is_left_out(bytes_left: int) -> None:
    found = read(BEGIN, phase(1, "setup"), phase(2, "freeze")[:bytes_left])
    assert found.is_cut
    assert [one.name for one in found.phases] == ["setup"]


def test_a_last_line_that_only_lacks_its_end_is_read() -> None:
    found = read(BEGIN, phase(1, "setup").rstrip())
    assert not found.is_cut
    assert [one.name for one in found.phases] == ["setup"]


GIVE = "give report the file that `migrate --events FILE` wrote"
MALFORMED = "JSON is malformed: invalid character (byte 0)"
TAKE_OUT = "take it out, and the rest is drawn"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], f"it is empty; {GIVE}, once the command has begun"),
        (
            [b"root:x:0:0:root:/root:/bin/bash\n"],
            f"line 1 is no event ({MALFORMED}), so this is no log; {GIVE}",
        ),
        ([b"\x89PNG\r\n", b"\x1a\n"], f"line 1 is no event ({MALFORMED}), so this is no log; {GIVE}"),
        ([BEGIN[:30]], f"line 1 is no event (Input data was truncated), so this is no log; {GIVE}"),
        (
            [b"{" + b" " * log.MOST_BYTES_A_LINE],
            f"line 1 is no event (longer than 1048576 bytes), so this is no log; {GIVE}",
        ),
        (
            [phase(1, "setup"), phase(2, "freeze")],
            'line 1 is not the event "begin": what was before it is missing; give report the whole log',
        ),
        (
            [BEGIN.replace(b'"format":1', b'"format":2').replace(b"0.1.0", b"0.7.0")],
            "line 1: the log has format 2, and this version knows 1; draw it with the version that wrote it, 0.7.0",
        ),
        ([BEGIN, phase(1, "a"), b"oops\n", phase(2, "b")], f"line 3 is no event ({MALFORMED}); {TAKE_OUT}"),
        ([BEGIN, b"\n", phase(2, "a")], f"line 2 is no event (Input data was truncated); {TAKE_OUT}"),
        (
            [BEGIN, phase(1, "setup"), b'{"event":"phase","t":-1,"name":"freeze"}\n'],
            f"line 3 is no event (Expected `float` >= 0.0 - at `$.t`); {TAKE_OUT}",
        ),
        (
            [BEGIN, b'{"event":"phase","t":1,"name":"' + b"x" * log.MOST_BYTES_A_LINE],
            f"line 2 is no event (longer than 1048576 bytes); {TAKE_OUT}",
        ),
        (
            [BEGIN, phase(1, "setup"), BEGIN],
            "line 3: another command begins here; give report a file with the lines of one",
        ),
        (
            [BEGIN, phase(2, "setup"), phase(1, "freeze")],
            "line 3 is from before the line above it; give report the log as it was written",
        ),
    ],
    ids=[
        "empty",
        "text",
        "binary",
        "cut in its head",
        "one long line",
        "without head",
        "too new",
        "damaged",
        "empty line",
        "wrong field",
        "long line",
        "two logs",
        "out of order",
    ],
)
def test_what_is_no_log_is_refused_with_what_to_do(lines: list[bytes], said: str) -> None:
    with pytest.raises(LogError) as refused:
        read(*lines)
    assert str(refused.value) == f"FILE: {said}"
    assert refused.value.exit_code == 1


def test_deeply_nested_lines_are_refused() -> None:
    line = (
        b'{"event":"failed","t":1,"exit_code":1,"error":"x","message":"","blockers":[{"a":'
        + b"[" * 100_000
        + b"\n"
    )
    with pytest.raises(LogError, match="line 2 is no event"):
        read(BEGIN, line)


def test_a_log_without_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST_LINES", 3)
    assert read(BEGIN, phase(1, "a"), phase(2, "b")).last_s == 2
    with pytest.raises(LogError) as refused:
        read(BEGIN, phase(1, "a"), phase(2, "b"), phase(3, "c"))
    assert str(refused.value) == "FILE: line 4: a report draws 3 lines at most; give it a shorter log"
