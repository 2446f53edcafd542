"""Pages: every figure, every way to end, and nothing of what a log says becomes anything but text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline import events
from pipeline.report import log, svg
from pipeline.report.page import page
from tests.harness.pages import Page, exact

BEGIN = events.Begin(
    t=0,
    format=1,
    time="2026-11-26T08:32:21.287Z",
    version="0.1.0",
    command="migrate",
    pid=5472,
    to="there:7000",
    mode="precopy",
)
ROUNDS = [
    events.RoundEnd(
        t=2 + number,
        number=number,
        dirty_bytes=100_000_000 >> number,
        sent_bytes=90_000_001 >> number,
        seconds=0.9,
        mbps=800.5,
        dirty_bytes_rate=4096 * 1000.5,
        dirty_pages_rate=1000.5,
        expected_downtime=80.25 / (number + 1),
        dirty_sync_count=number + 1,
    )
    for number in range(3)
]
PARTS = {"freeze": 7.5, "collect": 40.125, "last-pages": 60.0, "finish": 100.0, "thaw": 5.0}
DONE = [
    events.Phase(t=1, name="setup"),
    events.Phase(t=1.5, name="draft"),
    events.Advance(
        t=1.75, phase="draft", transferred=50_000_000, remaining=50_000_000, mbps=1600, dirty_sync_count=0
    ),
    *ROUNDS,
    events.Phase(t=5, name="freeze"),
    events.Message(t=5.5, text="something was said"),
    events.Pause(t=6, downtime=212.625, parts=PARTS),
    events.Completed(
        t=6.25,
        exit_code=0,
        root_pid=31,
        figures={
            "total-time": 5250.5,
            "downtime": 212.625,
            "transferred": 157_500_001.0,
            "draft-time": 99.5,
            "compression-rate": 1.125,
            "of-tomorrow": 3.0,
        },
        notes=["a note at the end"],
    ),
]


def drawn(told: Sequence[events.Event], begin: events.Begin = BEGIN) -> Page:
    lines = b"".join(events.line(event) for event in (begin, *told))
    return Page(page(log.read(io.BytesIO(lines), "FILE")))


def test_every_figure_is_there() -> None:
    found = drawn(DONE)
    for ended in ROUNDS:
        numbers = (
            ended.dirty_bytes,
            ended.sent_bytes,
            ended.seconds,
            ended.mbps * 125_000,
            ended.dirty_pages_rate,
        )
        assert {exact(number) for number in (*numbers, ended.expected_downtime or 0)} <= found.values
    end = DONE[-1]
    assert isinstance(end, events.Completed)
    assert {exact(number) for number in (*PARTS.values(), *end.figures.values())} <= found.values
    stages = ["start", "setup", "draft", "freeze"]
    assert found.rows[: len(stages)] == stages
    assert {*PARTS, *end.figures} <= set(found.rows)
    for words in (
        "Migration of pid 5472 to there:7000",
        "2026-11-26 08:32:21 UTC",
        "--mode precopy",
        "Completed : the tree runs at the destination, its root as pid 31 there",
        "the tree stands still: 213 ms",
        "it had stood still for 100 ms",
        "something was said",
        "a note at the end",
        "157.5 MB",
    ):
        assert words in found.text


def test_what_a_tree_was_held_back_is_told_where_it_was() -> None:
    assert "held back" not in drawn(DONE).text
    throttled = [replace(ended, cpu_throttle_percentage=10 * ended.number) for ended in ROUNDS]
    text = drawn([*DONE[:3], *throttled, *DONE[6:]]).text
    assert "held back from then on" in text
    assert all(f"{10 * ended.number} %" in text for ended in ROUNDS)


@pytest.mark.parametrize("ending", range(len(DONE)))
def test_a_log_that_ends_anywhere_is_drawn(ending: int) -> None:
    found = drawn(DONE[:ending])
    assert "No end : the log does not say how it ended." in found.text
    for kind, title in (
        (events.Advance, "Rate along time"),
        (events.RoundEnd, "Bytes of each round"),
        (events.Pause, "Parts of the pause"),
    ):
        assert (title in found.text) == any(isinstance(event, kind) for event in DONE[:ending])


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            events.Cancelled(t=7, exit_code=130),
            "Cancelled by SIGINT (exit code 130) : everything was rolled back",
        ),
        (
            events.Cancelled(t=7, exit_code=143),
            "Cancelled by SIGTERM (exit code 143) : everything was rolled back",
        ),
        (
            events.Failed(t=7, exit_code=1, error="PeerError", message="the other side\nwent away"),
            "Failed (exit code 1) the other side went away",
        ),
        (
            events.Failed(t=7, exit_code=4, error="InDoubt", message="it may run at either"),
            "In doubt (exit code 4) it may run at either",
        ),
        (
            events.Failed(
                t=7,
                exit_code=3,
                error="Refused",
                message="refused:\n  pid 5 fd 7: cannot be carried",
                blockers=[
                    {
                        "subject": "pid 5 fd 7",
                        "reason": "cannot be carried",
                        "remedy": "close it",
                        "transient": False,
                    },
                    {"subject": "pid 6", "reason": "is traced", "remedy": ""},
                    {"reason": ["odd"]},
                ],
            ),
            "Refused, and nothing was touched (exit code 3) pid 5 fd 7: cannot be carried (close it) pid 6: is traced",
        ),
    ],
    ids=["interrupted", "terminated", "failed", "in doubt", "refused"],
)
def test_a_migration_that_did_not_come_about_is_drawn(end: events.Event, words: str) -> None:
    found = drawn([*DONE[:5], end])
    assert words in found.text
    assert "ended after 7.00 s" in found.text
    assert "The pause" not in found.text
    assert exact(ROUNDS[1].sent_bytes) in found.values


def test_what_a_log_lacks_is_said() -> None:
    lines = b"".join(events.line(event) for event in (BEGIN, *DONE[:3], events.Lost(t=2, count=12)))
    found = Page(page(log.read(io.BytesIO(lines + b'{"event":"ph'), "FILE")))
    assert "The last line of the log is cut off; what it said is not drawn." in found.text
    assert "12 events are missing: whoever read them was too slow." in found.text


NASTY = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)>&lt;]]>--><svg/onload=1>'


def test_nothing_of_a_log_becomes_markup() -> None:
    begin = events.Begin(
        t=0,
        format=1,
        time=NASTY,
        version=NASTY,
        command=NASTY,
        to=NASTY,
        source=NASTY,
        listen=NASTY,
        mode=NASTY,
    )
    told = [
        events.Phase(t=1, name=NASTY),
        events.Advance(t=2, phase=NASTY, transferred=1, mbps=1, dirty_sync_count=0),
        events.Pause(t=3, downtime=1, parts={NASTY: 1}),
        events.Restored(t=3, root_pid=1, figures={NASTY: 1}, notes=[NASTY]),
        events.Message(t=3, text=NASTY),
    ]
    done = events.Completed(t=4, exit_code=0, root_pid=1, figures={NASTY: 2}, notes=[NASTY])
    blockers = [{"subject": NASTY, "reason": NASTY, "remedy": NASTY}, {"subject": {NASTY: [NASTY]}}]
    failed = events.Failed(t=4, exit_code=1, error=NASTY, message=NASTY, blockers=blockers)
    for end in (done, failed, events.Failed(t=4, exit_code=1, error=NASTY, message=NASTY)):
        found = drawn([*told, end], begin)
        assert found.text.count(NASTY) >= 10
        assert "img" not in found.tags


def test_what_cannot_be_seen_shows_as_a_box() -> None:
    found = drawn([events.Message(t=1, text="a\x00b\x1b[31mc\u202ed\u2066e\r\nf")])
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ufffd f" in found.text


def test_a_log_with_many_stages_says_that_not_all_are_drawn() -> None:
    names = ["setup", "freeze"] * svg.MOST_ROWS
    found = drawn([events.Phase(t=index, name=name) for index, name in enumerate(names)])
    assert (
        f"The first {svg.MOST_ROWS} of {len(names) + 1} stages are drawn; all are in the table." in found.text
    )
    assert found.rows.count("freeze") == svg.MOST_ROWS


@pytest.mark.parametrize("command", ["dump", "restore", "serve"])
def test_logs_of_other_commands_are_drawn_as_far_as_they_go(command: str) -> None:
    begin = events.Begin(t=0, format=1, time="today", version="0.1.0", command=command, listen="0.0.0.0:7000")
    restored = events.Restored(t=2, root_pid=44, figures={"page-bytes": 4096.0}, notes=["late"])
    found = drawn([events.Phase(t=1, name="rebuild"), restored, events.Completed(t=3, exit_code=0)], begin)
    assert "at 0.0.0.0:7000 today" in found.text
    assert "Of the tree with the root pid 44" in found.text
    assert {"page-bytes", "rebuild"} <= set(found.rows)


amounts = st.floats(0, 1e18) | st.sampled_from([0.0, 5e-324, 1e-9, 1.0])
counts = st.integers(0, 1 << 62)
names = st.text(max_size=8)
tellings = st.one_of(
    st.builds(events.Phase, t=amounts, name=names | st.just("round 3")),
    st.builds(
        events.Advance, t=amounts, phase=names, transferred=counts, mbps=amounts, dirty_sync_count=st.just(0)
    ),
    st.builds(
        events.RoundEnd,
        t=amounts,
        number=counts,
        dirty_bytes=counts,
        sent_bytes=counts,
        seconds=amounts,
        mbps=amounts,
        dirty_bytes_rate=amounts,
        dirty_pages_rate=amounts,
        expected_downtime=st.none() | amounts,
        dirty_sync_count=counts,
    ),
    st.builds(events.Pause, t=amounts, downtime=amounts, parts=st.dictionaries(names, amounts, max_size=4)),
    st.builds(
        events.Completed,
        t=amounts,
        exit_code=st.just(0),
        figures=st.dictionaries(st.sampled_from(["downtime", "total-time", "transferred", "x"]), amounts),
    ),
)


@given(st.lists(tellings, max_size=12))
@example([events.Completed(t=1, exit_code=0, figures={"transferred": 1.0, "total-time": 5e-324})])
@example([events.Pause(t=1, downtime=5e-324, parts={"freeze": 1e18})])
def test_any_log_is_drawn_with_finite_numbers(told: list[events.Event]) -> None:
    told.sort(key=lambda event: event.t)
    found = drawn(told)
    assert all(math.isfinite(float(value)) for value in found.values)
    assert "inf %" not in found.text
