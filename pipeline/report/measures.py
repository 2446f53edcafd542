"""Numbers of a page: told to a person, in tables with the exact one beneath, and short on an axis."""

from __future__ import annotations

from pipeline.amounts import milliseconds, size
from pipeline.report.markup import Markup, text

#: a log is no more exact than that, so nothing is divided by less
LEAST_MS = 1e-3


def exact(told: str, value: float, unit: str = "") -> Markup:
    """A number as it is told to a person, with the exact one beneath (and where the mouse is held)."""
    number = int(value) if value == int(value) else value
    return Markup(f'<data value="{number}" title="{f"{number} {unit}".strip()}">{text(told)}</data>')


def seconds(value: float) -> Markup:
    """Seconds, in a table."""
    return exact(told_s(value), value, "s")


def ms(value: float) -> Markup:
    """Milliseconds, in a table."""
    return exact(milliseconds(value), value, "ms")


def in_bytes(value: float) -> Markup:
    """Bytes, in a table."""
    return exact(size(value), value, "bytes")


def rate(value: float) -> Markup:
    """Bytes a second, in a table."""
    return exact(told_rate(value), value, "bytes/s")


def told_rate(value: float) -> str:
    """Bytes a second, without the exact number."""
    return f"{size(value)}/s"


def told_ms(value: float) -> str:
    """Milliseconds, without the exact number; nothing is ``0``."""
    return milliseconds(value) if value else "0"


def told_s(value: float) -> str:
    """Seconds, likewise."""
    return told_ms(1e3 * value)


def axis_s(value: float) -> str:
    """Seconds at an axis, where numbers are round."""
    return f"{value:g} s"


def axis_ms(value: float) -> str:
    """Milliseconds at an axis."""
    return f"{value:g} ms"


def count(value: float) -> str:
    """How many; of a few, also the half ones that an axis may have."""
    return f"{value:g}" if value < 10 else f"{value:.0f}"
