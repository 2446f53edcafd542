"""Results as one page of HTML, drawn with the parts of `pipeline.report`: no script, nothing that is loaded.

Pure: a document (see docs/performance.md) becomes text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from pipeline.amounts import milliseconds, size
from pipeline.report import svg
from pipeline.report.markup import Markup, table, text, wide
from pipeline.report.style import CSS

_COLOURS = ("blue", "orange")


class _Chart(NamedTuple):
    """A drawing of a section: two figures of the same unit, and what they are called."""

    title: str
    figures: tuple[tuple[str, str], ...]


_CHARTS = {
    "small": [_Chart("Commands", (("dump-ms", "dump"), ("restore-ms", "restore")))],
    "standstill": [_Chart("Until all is known", (("captured-ms", "median"), ("captured-least-ms", "least")))],
    "plain": [
        _Chart("Rate of a dump", (("dump-rate", "dump"), ("bare-dump-rate", "bare loop"))),
        _Chart("Rate of a restore", (("restore-rate", "restore"), ("bare-restore-rate", "bare loop"))),
    ],
    "kept": [
        _Chart("Frozen", (("frozen-ms", "at one stop"), ("rounds-frozen-ms", "behind rounds"))),
        _Chart(
            "Longest gap", (("rounds-gap-ms", "with rounds"), ("parent-gap-ms", "against an earlier image"))
        ),
    ],
    "wire": [_Chart("Rate on the wire", (("rate", "migrate"), ("bare-rate", "bare sockets")))],
    "live": [_Chart("Longest gap", (("gap-ms", "felt by the program"), ("downtime-ms", "told by migrate")))],
    "slowdown": [
        _Chart(
            "The kernel's part of its time",
            (("kernel-in-rounds-percent", "in rounds"), ("kernel-beside-percent", "beside a bare loop")),
        )
    ],
    "services": [_Chart("Longest gap", (("gap-ms", "moved"), ("gap-before-ms", "before that")))],
    "crowd": [_Chart("For each process", (("frozen-each-ms", "frozen"), ("restore-each-ms", "restore")))],
    "scale": [_Chart("Commands", (("dump-ms", "dump"), ("restore-ms", "restore")))],
}


def told(name: str, value: float) -> str:
    """A figure for a person; its name ends in its unit."""
    unit = name.rpartition("-")[2]
    match unit:
        case "ms":
            return milliseconds(value)
        case "bytes":
            return size(value)
        case "rate":
            return f"{size(value)}/s"
        case "percent":
            return f"{value:.1f} %"
        case _:
            return f"{value:.2f}" if unit == "ratio" else f"{value:g}"


def page(document: dict[str, Any]) -> str:
    """The page, whole."""
    parts = [_machine(document)]
    for section, rows in groupby(document["rows"], key=lambda row: row["section"]):
        parts.append(_section(section, list(rows)))
    parts.append(_left_out(document))
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What it costs</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>What it costs</h1>
{body}
</main>
<footer>Drawn by <code>python -m bench</code>. Medians, with the least and the most in parentheses; what bounds each
figure: docs/performance.md.</footer>
</body>
</html>
"""


def _machine(document: dict[str, Any]) -> str:
    machine, criu = document["machine"], document["criu"]
    load = " ".join(f"{value:.2f}" for value in machine["load"])
    facts = (
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("memory", size(machine["memory-bytes"])),
        ("system", f"Linux {machine['kernel']}, Python {machine['python']}"),
        ("load average at start", load),
        ("measured", f"{machine['date']}, commit {machine['commit']}"),
        ("CRIU", criu["version"] if criu["why-not"] is None else f"none: {criu['why-not']}"),
    )
    return str(table("The machine", ("what", "is"), facts, ()))


def _section(section: str, rows: Sequence[dict[str, Any]]) -> str:
    parts = [f"<section>\n<h2>{text(section)}</h2>\n"]
    for number, chart in enumerate(_CHARTS[section]):
        drawn = [row for row in rows if all(name in row["figures"] for name, _ in chart.figures)]
        if drawn:
            parts.append(_drawing(f"{section}-{number}", chart, drawn))
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    body = [
        (
            row["name"],
            *(_cell(name, row["figures"].get(name)) for name in names),
            row["runs"],
            "good" if row["good"] else row.get("failed", "wrong"),
        )
        for row in rows
    ]
    parts.append(table(section, ("what", *names, "runs", "checks"), body, range(1, len(names) + 2)))
    parts.append("</section>")
    return "".join(parts)


def _drawing(key: str, chart: _Chart, rows: Sequence[dict[str, Any]]) -> Markup:
    bars = [
        svg.Bars(name, [row["figures"][figure]["median"] for row in rows], colour)
        for (figure, name), colour in zip(chart.figures, _COLOURS, strict=True)
    ]
    legend = ", ".join(f'<span class="key {one.colour}"></span> {text(one.name)}' for one in bars)
    tell: Callable[[float], str] = lambda value: told(chart.figures[0][0], value)  # noqa: E731 (short, and named)
    places = (
        [str(number) for number in range(1, len(rows) + 1)] if len(rows) > 4 else [r["name"] for r in rows]
    )
    about = "" if len(rows) <= 4 else "; numbers are the rows of the table"
    return Markup(
        f'<p class="aside">{text(chart.title)}: {legend}{about}</p>\n'
        + wide(chart.title, svg.columns(key, chart.title, places, bars, tell))
    )


def _cell(name: str, figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    median = told(name, figure["median"])
    if figure["least"] == figure["most"]:
        return median
    return f"{median} ({told(name, figure['least'])} - {told(name, figure['most'])})"


def _left_out(document: dict[str, Any]) -> str:
    if not document["left-out"]:
        return ""
    rows = [(f"{one['section']}: {one['name']}", one["why"]) for one in document["left-out"]]
    return str(table("Not measured", ("what", "why"), rows, ()))
