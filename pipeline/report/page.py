"""One page of HTML that shows the log of one command: no script, nothing that is loaded.

What a drawing shows is said once more in a table beneath it. Sections of which the log says nothing are left out, so
that a log is drawn that ends anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import events
from pipeline.amounts import figure, milliseconds, size
from pipeline.report import head, svg, words
from pipeline.report.log import Log, Stage
from pipeline.report.markup import Markup, table, text, wide
from pipeline.report.measures import (
    LEAST_MS,
    axis_ms,
    axis_s,
    count,
    exact,
    in_bytes,
    ms,
    rate,
    seconds,
    told_ms,
    told_rate,
    told_s,
)  # fmt: skip
from pipeline.report.style import CSS

#: mbps are Mbit/s; a page says bytes
_BYTES_A_MBIT = 125_000


def page(log: Log) -> str:
    """The page, whole."""
    title = text(head.title(log.begin))
    sections = [head.head(log), _timeline(log), _rounds(log), _pause(log), _figures(log), _messages(log)]
    body = "\n".join(section for section in sections if section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<footer>Drawn by <code>python -m pipeline report</code> from a log of format {log.begin.format}. Numbers are
rounded, sizes in powers of 1000; hold the mouse on one in a table for the exact one.</footer>
</body>
</html>
"""


def _section(title: str, about: str, *parts: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n<p>{about}</p>\n{''.join(parts)}</section>"


def _timeline(log: Log) -> str:
    stages, paused = log.stages(), log.paused()
    rows = [
        svg.Row(
            s.name,
            s.begin_s,
            s.end_s,
            told_s(s.end_s - s.begin_s),
            "orange" if _within(s, paused) else "blue",
        )
        for s in stages
    ]
    shade = None
    about = "What the command did, from its begin to its end."
    if paused is not None and log.pause is not None:
        told = milliseconds(log.pause.downtime)
        shade = svg.Row("the tree stands still", paused.begin_s, paused.end_s, told, "shade")
        about += (
            ' <span class="key shade"></span> The tree stands still, and <span class="key orange"></span> these are '
            f"the stages of that; in all others it runs{', but for a moment' if _draft_ms(log) else ''}."
        )
    if len(rows) > svg.MOST_ROWS:
        about += f" The first {svg.MOST_ROWS} of {len(rows)} stages are drawn; all are in the table."
    drawings = [svg.waterfall("timeline", "Stages along time", rows, log.last_s, axis_s, shade)]
    spans = _spans(log)
    if spans:
        drawings.append(Markup('<p class="aside">Memory that was read and sent, at the same times:</p>\n'))
        drawings.append(svg.rate("rate", "Rate along time", spans, log.last_s, axis_s, told_rate))
    listing = table(
        "Stages",
        ("stage", "begins at", "lasts", "what happens"),
        [(s.name, seconds(s.begin_s), seconds(s.end_s - s.begin_s), words.stage(s.name)) for s in stages],
        (1, 2),
    )
    return _section("Timeline", about, wide("Stages along time", *drawings), listing)


def _draft_ms(log: Log) -> float:
    """How long the tree stood still for its draft, which is not part of the pause; 0 without a draft."""
    return log.figures().get("draft-time", 0.0)


def _within(stage: Stage, paused: Stage | None) -> bool:
    """Whether more than half of a stage is in the pause."""
    if paused is None:
        return False
    common_s = min(stage.end_s, paused.end_s) - max(stage.begin_s, paused.begin_s)
    return common_s > 0.5 * (stage.end_s - stage.begin_s)


def _spans(log: Log) -> list[svg.Span]:
    """From each progress to the one before, or to the begin of its phase or round."""
    marks = sorted([0.0, *(e.t for e in (*log.phases, *log.rounds, *log.advances))])
    found, place = [], 0
    for advance in log.advances:
        while place + 1 < len(marks) and marks[place + 1] < advance.t:
            place += 1
        found.append(svg.Span(marks[place], advance.t, advance.mbps * _BYTES_A_MBIT))
    return found


def _rounds(log: Log) -> str:
    if not log.rounds:
        return ""
    rounds = log.rounds
    places = [f"{ended.number}" for ended in rounds]
    about = (
        "While the tree runs, each round sends what was written during the one before; the first sends everything. "
        '<span class="key blue"></span> to be sent <span class="key orange"></span> sent, on the wire'
    )
    to_send = svg.Bars("to be sent", [ended.dirty_bytes for ended in rounds], "blue")
    sent = svg.Bars("sent", [ended.sent_bytes for ended in rounds], "orange")
    written = [_pages(ended) for ended in rounds]
    drawings = [
        svg.columns("bytes", "Bytes of each round", places, (to_send, sent), size),
        Markup(
            '<p class="aside">Pages that the tree wrote to meanwhile, which the next round has to send:</p>\n'
        ),
        svg.columns(
            "pages", "Pages written during each round", places, [svg.Bars("pages", written, "orange")], count
        ),
    ]
    drawings += _expected(log, places)
    is_throttled = any(ended.cpu_throttle_percentage for ended in rounds)
    listing = table(
        "Rounds",
        (
            "round",
            "to be sent",
            "sent",
            "took",
            "rate",
            "pages written",
            "pages/s written",
            "expected downtime",
            *(["held back from then on"] if is_throttled else []),
        ),
        [
            (
                ended.number,
                in_bytes(ended.dirty_bytes),
                in_bytes(ended.sent_bytes),
                seconds(ended.seconds),
                rate(ended.mbps * _BYTES_A_MBIT),
                count(pages),
                exact(count(ended.dirty_pages_rate), ended.dirty_pages_rate, "pages/s"),
                "" if ended.expected_downtime is None else ms(ended.expected_downtime),
                *([f"{ended.cpu_throttle_percentage} %"] if is_throttled else []),
            )
            for ended, pages in zip(rounds, written, strict=True)
        ],
        range(1, 9 if is_throttled else 8),
    )
    return _section("Rounds", about, wide("Bytes and pages of each round", *drawings), listing)


def _pages(ended: events.RoundEnd) -> int:
    return round(ended.dirty_pages_rate * ended.seconds)


def _expected(log: Log, places: Sequence[str]) -> list[Markup]:
    """How long it would have stood still after each round, and how long it did."""
    expected = [ended.expected_downtime for ended in log.rounds]
    known = [value for value in expected if value is not None]
    if len(known) < len(expected):
        return []
    about = "How long the tree would have stood still if it had been stopped after the round"
    level = None
    if log.pause is not None:
        about += "; the line is how long it did in the end"
        level = f"it was {milliseconds(log.pause.downtime)}", log.pause.downtime
    return [
        Markup(f'<p class="aside">{about}:</p>\n'),
        svg.columns(
            "expected",
            "Expected downtime after each round",
            places,
            [svg.Bars("expected downtime", known, "blue")],
            told_ms,
            level,
        ),
    ]


def _pause(log: Log) -> str:
    pause = log.pause
    if pause is None:
        return ""
    rows, begin = [], 0.0
    for name, part in pause.parts.items():
        rows.append(svg.Row(name, begin, begin + part, milliseconds(part), "orange"))
        begin += part
    told = ms(pause.downtime)
    about = f"The tree stood still for {told}, and that is what was done meanwhile."
    draft = _draft_ms(log)
    if draft:
        about += f" Earlier, at the begin of its draft, it had stood still for {ms(draft)}."
    drawing = svg.waterfall("parts", "Parts of the pause", rows, max(begin, pause.downtime), axis_ms)
    all_ms = max(pause.downtime, LEAST_MS)
    listing = table(
        "Parts of the pause",
        ("part", "lasts", "of all", "what happens"),
        [
            *(
                (name, ms(part), f"{100 * part / all_ms:.0f} %", words.PARTS.get(name, ""))
                for name, part in pause.parts.items()
            ),
            ("all", told, "", "downtime"),
        ],
        (1, 2),
    )
    return _section("The pause", about, wide("Parts of the pause", drawing), listing)


def _figures(log: Log) -> str:
    tables = []
    given = [("All figures", log.figures())]
    given += [(f"Of the tree with the root pid {one.root_pid}", one.figures) for one in log.restored]
    for caption, figures in given:
        rows = [
            (name, exact(figure(name, value), value), words.FIGURES.get(name, ""))
            for name, value in figures.items()
        ]
        if rows:
            tables.append(table(caption, ("figure", "value", "what it is"), rows, (1,)))
    return _section("Figures", "What the command said at its end.", *tables) if tables else ""


def _messages(log: Log) -> str:
    ended = log.end.notes if isinstance(log.end, events.Completed) else []
    rows: list[tuple[str, str]] = [(seconds(message.t), message.text) for message in log.messages]
    rows += [("note", note) for notes in (*(tree.notes for tree in log.restored), ended) for note in notes]
    if not rows:
        return ""
    return _section("Messages", "What was said to a person.", table("Messages", ("at", "what"), rows, ()))
