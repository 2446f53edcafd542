"""What is measured, and how it becomes rows: cases, run in turns until the time is over.

A case measures one thing once, with its bare loop in the same moment, and looks whether what it measured was right. The
matrix runs all cases once, then all of them again, so that what else the machine does meets each of them alike.
Pure: what a case does, and what is printed, is given.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A command to be measured failed, or a program to be measured ended; the text has what it said."""


@dataclass
class Sample:
    """One measurement.

    Args:
        figures: their names end in the unit: ``-ms``, ``-bytes``, ``-rate`` (bytes a second), ``-ratio``; others are
            counts.
        checks: what had to be true afterwards, and whether it was.
    """

    figures: dict[str, float]
    checks: dict[str, bool]


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Args:
        section: what it belongs to.
        name: what it is, once in a section.
        measure: does it, in an empty directory on tmpfs that is removed afterwards.
        parameters: what the name says, for machines.
        missing: why it cannot be done here.
    """

    section: str
    name: str
    measure: Callable[[Path], Sample]
    parameters: dict[str, float | str] = field(default_factory=dict)
    missing: str | None = None


@dataclass
class Row:
    """All samples of a case, and the one-minute load average when each began; `failed`: what it failed with."""

    case: Case
    samples: list[Sample] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    failed: str | None = None

    def values(self, name: str) -> list[float]:
        """A figure of all samples that have it."""
        return [sample.figures[name] for sample in self.samples if name in sample.figures]

    def median(self, name: str) -> float | None:
        """None: no sample has it."""
        values = self.values(name)
        return statistics.median(values) if values else None

    @property
    def names(self) -> list[str]:
        """Of its figures, in the order in which they were told."""
        return list(dict.fromkeys(name for sample in self.samples for name in sample.figures))

    @property
    def checks(self) -> dict[str, bool]:
        """What was looked at, and whether it was right in every sample."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.checks)
        return {name: all(sample.checks.get(name, False) for sample in self.samples) for name in names}

    @property
    def is_good(self) -> bool:
        """It was measured, and all that was looked at was right."""
        return self.failed is None and bool(self.checks) and all(self.checks.values())

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "section": self.case.section,
            "name": self.case.name,
            "parameters": self.case.parameters,
            "runs": len(self.samples),
            "load": [min(self.loads), max(self.loads)],
            "figures": {name: spread(self.values(name)) for name in self.names},
            "checks": self.checks,
            "good": self.is_good,
            **({"failed": self.failed} if self.failed is not None else {}),
        }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of a figure, and all values in the order in which they were measured."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "values": list(values),
    }


@dataclass
class Results:
    """Rows in the order of the cases, and for each that has none why."""

    rows: list[Row]
    left_out: list[tuple[Case, str]]

    @property
    def are_good(self) -> bool:
        """Something was measured, and nothing was wrong."""
        return bool(self.rows) and all(row.is_good for row in self.rows)


def run(
    cases: Sequence[Case],
    folder: Path,
    *,
    most_rounds: int,
    budget_s: float,
    said: Callable[[Row], None],
) -> Results:
    """Measure all cases in turns, at most `most_rounds` times.

    Args:
        folder: an empty directory on tmpfs.
        budget_s: no case is begun when that many seconds are over; what was never begun is left out, and says so.
        said: is told every row after each of its samples.
    """
    end_s = time.monotonic() + budget_s
    rows: dict[int, Row] = {}
    left_out = {index: case.missing for index, case in enumerate(cases) if case.missing is not None}
    for _ in range(most_rounds):
        for index, case in enumerate(cases):
            if index in left_out or (index in rows and rows[index].failed is not None):
                continue
            if time.monotonic() > end_s:
                if index not in rows:
                    left_out[index] = "the time was over"
                continue
            row = rows.setdefault(index, Row(case))
            row.loads.append(os.getloadavg()[0])
            place = folder / "case"
            place.mkdir()
            try:
                row.samples.append(case.measure(place))
            except (Failed, AssertionError, OSError) as error:
                row.failed = f"{type(error).__name__}: {error}"
            finally:
                shutil.rmtree(place)
            said(row)
    return Results(
        [rows[index] for index in sorted(rows)],
        [(cases[index], why) for index, why in sorted(left_out.items())],
    )
