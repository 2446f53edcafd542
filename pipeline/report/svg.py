"""Three drawings as SVG: stages below each other along an axis, a rate along the same axis, bars side by side.

All have the same width and the same room left and right, so that what is above each other on a page is at the same
time. Names of colours are classes of the page's style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.report.markup import Markup, text

#: units of their own; the page makes drawings as wide as it is
WIDTH = 960
LEFT, RIGHT = 110, 100
_ROW = 24
_TALL = 180
#: of a letter, about
_LETTER = 7
#: what is less counts as nothing, so that an axis always has a length
_LEAST = 1e-6
#: stages that are drawn; columns that a rate has
MOST_ROWS = 60
MOST_COLUMNS = 240

Told = Callable[[float], str]


class Row(NamedTuple):
    """A stage: where it is along the axis, and what it says behind its end."""

    name: str
    begin: float
    end: float
    told: str
    colour: str


class Span(NamedTuple):
    """A rate over a stretch of the axis."""

    begin: float
    end: float
    rate: float


class Bars(NamedTuple):
    """One value for each place; names of places are given once for all."""

    name: str
    values: Sequence[float]
    colour: str


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to `top`, some `most` of them."""
    step = 10.0 ** math.floor(math.log10(top / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if top / (step * factor) <= most)
    return [step * index for index in range(int(top / step * (1 + 1e-9)) + 1)]


def waterfall(
    key: str, title: str, rows: Sequence[Row], top: float, tell: Told, shade: Row | None = None
) -> Markup:
    """`rows` below each other along an axis from 0 to `top`; behind them a band, `shade`."""
    top = max(top, _LEAST)
    shown = rows[:MOST_ROWS]
    head = 22 if shade is not None else 4
    floor = head + _ROW * len(shown) + 4
    body = []
    if shade is not None:
        x, width = _place(shade, top)
        said = f"{shade.name}: {shade.told}"
        end = _text(x + width, 14, said, "end") if x > WIDTH / 2 else _text(x, 14, said)
        body += [f'<rect class="shade" x="{x:.2f}" y="20" width="{width:.2f}" height="{floor - 20}"/>', end]
    body += _time_axis(top, head - 2, floor, tell)
    for index, row in enumerate(shown):
        y = head + _ROW * index
        x, width = _place(row, top)
        body += [
            _text(LEFT - 10, y + 16, row.name, "end"),
            _bar(row.colour, x, y + 3, width, _ROW - 6, f"{row.name}: {row.told}"),
            _text(x + width + 6, y + 16, row.told),
        ]
    return _drawing(key, title, floor + 24, body)


def rate(key: str, title: str, spans: Sequence[Span], top: float, tell: Told, tell_rate: Told) -> Markup:
    """A rate along the axis of `waterfall`; between spans it is 0."""
    top = max(top, _LEAST)
    spans = thinned(spans)
    highest = _highest([span.rate for span in spans])
    wide, tall, floor = (WIDTH - LEFT - RIGHT) / top, 90 / highest, 100
    body = _value_axis(highest, floor, tall, tell_rate, most=3) + _time_axis(top, floor, floor, tell)
    for span in spans:
        x, width, height = LEFT + span.begin * wide, (span.end - span.begin) * wide, span.rate * tall
        body.append(_bar("blue", x, floor - height, max(width, 0.5), height, tell_rate(span.rate)))
    return _drawing(key, title, floor + 24, body)


def thinned(spans: Sequence[Span], most: int = MOST_COLUMNS) -> list[Span]:
    """At most `most` spans that hold as much as these: neighbours become one, with their mean rate."""
    every = -(-len(spans) // most)
    found = []
    for index in range(0, len(spans), every or 1):
        group = spans[index : index + every]
        amount = sum(span.rate * (span.end - span.begin) for span in group)
        begin, end = group[0].begin, group[-1].end
        found.append(group[0] if every == 1 else Span(begin, end, amount / max(end - begin, _LEAST)))
    return found


def columns(
    key: str,
    title: str,
    places: Sequence[str],
    groups: Sequence[Bars],
    tell: Told,
    level: tuple[str, float] | None = None,
) -> Markup:
    """For every place the bars of all `groups`, next to each other; `level`: a line across, with its name."""
    highest = _highest([value for bars in groups for value in bars.values] + [level[1] if level else 0.0])
    slot = (WIDTH - LEFT - RIGHT) / len(places)
    width = min(slot * 0.8 / len(groups), 40.0)
    said = [[tell(value) for value in bars.values] for bars in groups]
    fits = max(len(one) for row in said for one in row) * _LETTER < slot
    head = 18 * len(groups) if fits else 8
    floor = head + _TALL
    tall = _TALL / highest
    body = _value_axis(highest, floor, tall, tell)
    every = -(-len(places) * 30 // (WIDTH - LEFT - RIGHT))
    for index, place in enumerate(places):
        middle = LEFT + slot * (index + 0.5)
        above = floor - max(bars.values[index] for bars in groups) * tall - 6
        for nth, bars in enumerate(groups):
            x, height = middle + width * (nth - len(groups) / 2), bars.values[index] * tall
            told = said[nth][index]
            what = f"{place}, {bars.name}: {told}"
            body.append(_bar(bars.colour, x, floor - height, width * 0.94, height, what))
            if fits:
                body.append(_text(middle, above - 16 * (len(groups) - 1 - nth), told, "middle", bars.colour))
        if index % every == 0:
            body.append(_text(middle, floor + 18, place, "middle", "faint"))
    if level is not None:
        name, value = level
        y = floor - value * tall
        body.append(f'<path class="level" d="M{LEFT} {y:.2f}H{WIDTH - RIGHT}"/>')
        body.append(_text(WIDTH - RIGHT + 6, y + 4, name, kind="faint"))
    return _drawing(key, title, floor + 26, body)


def _bar(colour: str, x: float, y: float, width: float, height: float, told: str) -> str:
    return (
        f'<rect class="{colour}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{text(told)}</title></rect>"
    )


def _highest(values: Sequence[float]) -> float:
    highest = max(values, default=0.0)
    return highest if highest > _LEAST else 1.0


def _place(row: Row, top: float) -> tuple[float, float]:
    wide = (WIDTH - LEFT - RIGHT) / top
    return LEFT + row.begin * wide, max((row.end - row.begin) * wide, 1.0)


def _time_axis(top: float, upper: float, floor: float, tell: Told) -> list[str]:
    body = []
    for tick in ticks(top, 8):
        x = LEFT + tick / top * (WIDTH - LEFT - RIGHT)
        body.append(f'<path class="rule" d="M{x:.2f} {upper}V{floor + 4}"/>')
        body.append(_text(x, floor + 18, tell(tick), "middle", "faint"))
    return body


def _value_axis(top: float, floor: float, tall: float, tell: Told, most: int = 5) -> list[str]:
    body = []
    for tick in ticks(top, most):
        y = floor - tick * tall
        body.append(f'<path class="rule" d="M{LEFT} {y:.2f}H{WIDTH - RIGHT}"/>')
        body.append(_text(LEFT - 10, y + 4, tell(tick), "end", "faint"))
    return body


def _text(x: float, y: float, said: str, anchor: str = "start", kind: str = "") -> str:
    """Clipped where it would be longer than the room at the left."""
    most = (LEFT - 10) // _LETTER if anchor == "end" and x < LEFT else len(said)
    if len(said) > most:
        said = said[: most - 1] + "…"
    name = f' class="{kind}"' if kind else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{place}{name}>{text(said)}</text>'


def _drawing(key: str, title: str, height: float, body: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{key}">'
        f'<title id="{key}">{text(title)}</title>\n' + "\n".join(body) + "\n</svg>"
    )
