"""Numbers for people: sizes, durations, and the figures of a result by their names."""

from __future__ import annotations

#: figures that are numbers of bytes; durations, in milliseconds, end in ``time``
_BYTES = ("transferred", "remaining", "page-bytes")


def size(count: float) -> str:
    """Bytes for a person: ``18.3 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def milliseconds(value: float) -> str:
    """A duration in milliseconds for a person: ``8.2 ms``, ``350 ms``, ``2.4 s``."""
    if value < 10:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def figure(name: str, value: object) -> str:
    """What a figure says; its name tells the unit."""
    if isinstance(value, int | float):
        if name.endswith("time"):
            return milliseconds(value)
        if name in _BYTES:
            return size(value)
        if isinstance(value, float):
            return f"{value:.0f}" if value.is_integer() else f"{value:g}"
    return f"{value}"
