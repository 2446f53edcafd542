"""The head of a page: what was done, when, how it ended, and the figures that are asked for first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pipeline import events
from pipeline.report.log import Log
from pipeline.report.markup import Markup, text
from pipeline.report.measures import LEAST_MS, in_bytes, ms, rate, seconds

_TITLES = {"dump": "Dump", "migrate": "Migration", "restore": "Restore", "serve": "Service"}
_SIGNALS = {130: "SIGINT", 143: "SIGTERM"}


def title(begin: events.Begin) -> str:
    """Which command it was, of what, from and to where."""
    name = _TITLES.get(begin.command, begin.command)
    pairs = (("of pid", begin.pid), ("from", begin.source), ("to", begin.to), ("at", begin.listen))
    return " ".join([name, *(f"{word} {value}" for word, value in pairs if value is not None)])


def head(log: Log) -> str:
    """What is below the title: when it was, how it ended, figures, and what the log lacks."""
    begin = log.begin
    facts = [f'<time datetime="{text(begin.time)}">{text(_day(begin.time))}</time>']
    if begin.mode is not None:
        facts.append(text(f"--mode {begin.mode}"))
    facts.append(text(f"pipeline {begin.version}"))
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in _tiles(log))
    gaps = "".join(f'<p class="aside">{text(gap)}</p>\n' for gap in _gaps(log))
    return f'<p class="when">{" · ".join(facts)}</p>\n{_result(log)}\n{gaps}<dl>{tiles}</dl>'


def _day(time: str) -> str:
    """RFC 3339 for a person; what is none stays what it is."""
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError):
        return time


def _result(log: Log) -> str:
    match log.end:
        case events.Completed() as end:
            kind, word, said = "good", "Completed", Markup("")
            if log.begin.command == "migrate" and end.root_pid is not None:
                said = text(f": the tree runs at the destination, its root as pid {end.root_pid} there")
        case events.Failed() as end:
            kind, word, said = "bad", _failure(end), _why(end)
        case events.Cancelled() as end:
            by = _SIGNALS.get(end.exit_code, "a signal")
            kind, word = "bad", f"Cancelled by {by} (exit code {end.exit_code})"
            said = text(": everything was rolled back")
        case None:
            kind, word = "bad", "No end"
            said = text(": the log does not say how it ended. The command was killed, or it runs still")
    return f'<div class="result {kind}"><strong>{text(word)}</strong>{said}</div>'


def _failure(end: events.Failed) -> str:
    word = {"Refused": "Refused, and nothing was touched", "InDoubt": "In doubt"}.get(end.error, "Failed")
    return f"{word} (exit code {end.exit_code})"


def _why(end: events.Failed) -> Markup:
    if not end.blockers:
        return Markup(f"<pre>{text(end.message)}</pre>")
    items = []
    for blocker in end.blockers:
        subject, reason, remedy = (blocker.get(name) or "" for name in ("subject", "reason", "remedy"))
        items.append(f"<li>{text(subject)}: {text(reason)}{text(f' ({remedy})' if remedy else '')}</li>")
    return Markup(f"<ul>{''.join(items)}</ul>")


def _tiles(log: Log) -> Iterator[tuple[str, Markup]]:
    """The figures that are asked for first; without a result, those that the events give."""
    figures = log.figures()
    downtime = figures.get("downtime", log.pause.downtime if log.pause is not None else None)
    if downtime is not None:
        yield "stood still", ms(downtime)
    total = figures.get("total-time")
    if total is not None:
        yield "took", ms(total)
    else:
        yield "known until" if log.end is None else "ended after", seconds(log.last_s)
    sent = figures.get("transferred", sum(ended.sent_bytes for ended in log.rounds))
    if sent:
        yield "sent", in_bytes(sent)
    if sent and total is not None and total >= LEAST_MS:
        yield "on average", rate(1e3 * sent / total)
    if log.rounds:
        yield "rounds", text(len(log.rounds))


def _gaps(log: Log) -> Iterator[str]:
    if log.is_cut:
        yield "The last line of the log is cut off; what it said is not drawn."
    if log.lost:
        yield f"{log.lost} events are missing: whoever read them was too slow."
