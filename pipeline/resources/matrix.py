"""The support matrix: what every kind of open file, of namespace and of task state says of itself, as tables.

``python -m pipeline.resources.matrix > docs/support.md`` writes it; a test holds that it is current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from pipeline.resources.namespaces.registry import KINDS
from pipeline.resources.registry import kinds
from pipeline.resources.tasks.registry import KINDS as TASK_KINDS

_HEAD = """# What is carried, and what is refused

Printed from the registry of kinds (`python -m pipeline.resources.matrix`). What is not
carried is refused before anything is touched, with the pid and the number of the descriptor.
Tests are named by their paths below `tests/`.
The first lines of each kind's file, under `pipeline/resources/`, say what is not preserved, and why.

"""


def support_matrix() -> str:
    """All tables as Markdown."""
    files = ((kind.name, kind.carried, kind.refused, kind.shown_by) for kind in kinds())
    return _HEAD + _table("kind of open file", files) + "\n" + namespace_matrix() + "\n" + task_matrix()


def namespace_matrix() -> str:
    """The table of namespaces as Markdown."""
    return _table("kind of namespace", KINDS)


def task_matrix() -> str:
    """The table of task and memory state as Markdown."""
    return _table("task or memory state", TASK_KINDS)


def _table(what: str, rows: Iterable[tuple[str, Sequence[str], Sequence[str], Sequence[str]]]) -> str:
    lines = [f"| {what} | carried | refused | shown by |", "|---|---|---|---|"]
    for name, carried, refused, shown_by in rows:
        tests = "; ".join(f"`{path}`" for path in shown_by)
        lines.append(f"| {name} | {'; '.join(carried) or '—'} | {'; '.join(refused) or '—'} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(support_matrix())
