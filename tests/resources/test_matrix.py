"""The support matrix in the documentation is the one that the registry prints."""

from __future__ import annotations

from pathlib import Path

from pipeline.resources.matrix import namespace_matrix, support_matrix
from pipeline.resources.namespaces.registry import KINDS
from pipeline.resources.registry import kinds


def test_documentation_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "support.md").read_text()
    assert written == support_matrix()


def test_namespaces_in_the_documentation_are_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "user-namespaces.md").read_text()
    assert f"\n\n{namespace_matrix()}\n" in written


def test_every_kind_of_namespace_is_there() -> None:
    assert {kind.kind for kind in KINDS} == {"user", "pid", "mnt", "uts", "ipc", "net", "time", "cgroup"}


def test_every_kind_says_something() -> None:
    for kind in kinds():
        assert kind.carried or kind.refused, kind.name


def test_what_shows_a_state_is_there() -> None:
    rows = {kind.name: kind.shown_by for kind in kinds()} | {kind.kind: kind.shown_by for kind in KINDS}
    tests = Path(__file__).parents[1]
    for name, shown_by in rows.items():
        assert shown_by, name
        assert [path for path in shown_by if not (tests / path).is_file()] == [], name
