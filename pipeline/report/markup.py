"""HTML as text. What comes from a log is somebody else's: it goes through `text`, and through nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as text of a page, also within quotes. What cannot be seen, and may turn what can, shows as a box."""
    if isinstance(value, Markup):
        return value
    seen = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in str(value))
    return Markup(escape(seen))


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int]
) -> Markup:
    """A table whose first column says what each row is; columns `numbers` stand at the right."""
    right = set(numbers)

    def cell(kind: str, index: int, value: object, scope: str = "") -> str:
        name = ' class="number"' if index in right else ""
        return f"<{kind}{scope}{name}>{text(value)}</{kind}>"

    lines = [f"<caption>{text(caption)}</caption>"]
    top = "".join(cell("th", index, head, ' scope="col"') for index, head in enumerate(heads))
    lines.append(f"<thead><tr>{top}</tr></thead>\n<tbody>")
    for first, *others in rows:
        cells = [cell("th", 0, first, ' scope="row"')]
        cells += [cell("td", index, value) for index, value in enumerate(others, 1)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody>")
    return wide(caption, "<table>" + "\n".join(lines) + "</table>")


def wide(label: str, *contents: str) -> Markup:
    """What may be wider than the window: it is scrolled by itself, by the keyboard, too."""
    lines = "\n".join(contents)
    return Markup(
        f'<div class="wide" role="group" aria-label="{text(label)}" tabindex="0">\n{lines}\n</div>\n'
    )
