"""The support matrix in the documentation is the one that the registry prints."""

from __future__ import annotations

from pathlib import Path

from pipeline.resources.matrix import support_matrix
from pipeline.resources.registry import kinds


def test_documentation_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "support.md").read_text()
    assert written == support_matrix()


def test_every_kind_says_something() -> None:
    for kind in kinds():
        assert kind.carried or kind.refused, kind.name
