"""The support matrix: what every kind of open file says of itself, as a table for people.

``python -m pipeline.resources.matrix > docs/support.md`` writes it; a test holds that it is current.
"""

from __future__ import annotations

import sys

from pipeline.resources.registry import kinds

_HEAD = """# What is carried, and what is refused

Printed from the registry of kinds (`python -m pipeline.resources.matrix`). What is not
carried is refused before anything is touched, with the pid and the number of the descriptor.
Memory, namespaces and task state say the same in the first lines of their files, under
`pipeline/resources/`.

| kind of open file | carried | refused |
|---|---|---|
"""


def support_matrix() -> str:
    """The table as Markdown."""
    rows = (
        f"| {kind.name} | {'; '.join(kind.carried) or '—'} | {'; '.join(kind.refused) or '—'} |\n"
        for kind in kinds()
    )
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(support_matrix())
