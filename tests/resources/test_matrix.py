"""The support matrix in the documentation is the one that the registry prints."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pipeline import resources
from pipeline.resources.matrix import namespace_matrix, support_matrix
from pipeline.resources.namespaces.registry import KINDS
from pipeline.resources.registry import kinds
from pipeline.resources.support import Support
from pipeline.resources.tasks.registry import KINDS as TASK_KINDS


def test_documentation_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "support.md").read_text()
    assert written == support_matrix()


def test_namespaces_in_the_documentation_are_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "user-namespaces.md").read_text()
    assert f"\n\n{namespace_matrix()}\n" in written


def test_every_kind_of_namespace_is_there() -> None:
    assert {kind.kind for kind in KINDS} == {"user", "pid", "mnt", "uts", "ipc", "net", "time", "cgroup"}


def test_every_file_of_task_state_that_declares_itself_is_there() -> None:
    rows = {kind.kind for kind in TASK_KINDS}
    for folder in ("tasks", "memory"):
        package = importlib.import_module(f"pipeline.resources.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            declared = getattr(importlib.import_module(module.name), "SUPPORT", ())
            found = [declared] if isinstance(declared, Support) else declared
            assert {row.kind for row in found} <= rows, module.name
    assert len(rows) == len(TASK_KINDS) > 10


def test_every_file_that_has_a_kind_is_asked() -> None:
    modules = pkgutil.iter_modules(resources.__path__, f"{resources.__name__}.")
    found = {getattr(importlib.import_module(module.name), "KIND", None) for module in modules}
    assert found - {None} == set(kinds())


def test_every_kind_says_something() -> None:
    for kind in kinds():
        assert kind.carried or kind.refused, kind.name
    for row in TASK_KINDS:
        assert row.carried, row.kind


def test_what_shows_a_state_is_there() -> None:
    rows = {kind.name: kind.shown_by for kind in kinds()} | {
        kind.kind: kind.shown_by for kind in (*KINDS, *TASK_KINDS)
    }
    tests = Path(__file__).parents[1]
    for name, shown_by in rows.items():
        assert shown_by, name
        assert [path for path in shown_by if not (tests / path).is_file()] == [], name
