"""Reading a page of HTML strictly: what is open is closed in order, ids are unique, nothing is loaded or run."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta"}
_ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "main", "section", "footer", "h1", "h2", "p", "div", "span",
    "strong", "pre", "code", "time", "ul", "li", "dl", "dt", "dd", "data", "table", "caption", "thead", "tbody", "tr",
    "th", "td", "svg", "rect", "path", "text",
}  # fmt: skip
_PLACES = {"x", "y", "width", "height", "rx"}


class Page(HTMLParser):
    """A page, taken apart; AssertionError where it is not what a page has to be.

    Args:
        page: its text.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self._ids: set[str] = set()
        self._named: set[str] = set()
        #: the tags that there are
        self.tags: set[str] = set()
        #: all text outside of the style, piece by piece
        self.pieces: list[str] = []
        #: exact numbers
        self.values: set[str] = set()
        #: what the rows of tables are called
        self.rows: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open
        assert self._named <= self._ids

    @property
    def text(self) -> str:
        """What there is to read."""
        return " ".join(" ".join(self.pieces).split())

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _ALLOWED, f"<{tag}>"
        self.tags.add(tag)
        given: dict[str, Any] = dict(attrs)
        assert len(given) == len(attrs)
        assert not {name for name in given if name.startswith("on")} | given.keys() & {"src", "href", "style"}
        if "id" in given:
            assert given["id"] not in self._ids
            self._ids.add(given["id"])
        if tag == "svg":
            assert given["role"] == "img"
            self._named.add(given["aria-labelledby"])
        for name in given.keys() & _PLACES:
            number = float(given[name])
            assert math.isfinite(number)
            assert number >= 0
        if tag == "data":
            self.values.add(given["value"])
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.pieces.append(data)
            if self._open[-1:] == ["th"] and "tbody" in self._open:
                self.rows.append(data)


def exact(value: float) -> str:
    """How a page says the exact number."""
    return str(int(value) if value == int(value) else value)
