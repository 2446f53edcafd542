"""What it costs: `make bench`, or `python -m bench [--full] [--only SECTION]... [--to FOLDER]`.

Measures a matrix of programs, sizes, rates and modes, each beside its bare loop, or CRIU, of the same moment, and looks
each time whether what was measured was right. Writes results.json, and results.html, which draws it; images go to
tmpfs. Exit code 1: something was wrong. Figures are only good on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import crowd, kept, live, plain, scale, services, slowdown, small, standstill, wire
from bench.criu import Criu
from bench.extent import FULL, TINY, USUAL, Extent
from bench.machine import ROOT, describe
from bench.matrix import Case, Results, Row, run
from bench.page import page, told
from tests.harness.leaks import become_subreaper

SECTIONS = ("small", "standstill", "plain", "kept", "wire", "live", "slowdown", "services", "crowd", "scale")


def all_cases(extent: Extent, criu: Criu) -> list[Case]:
    """Those of all sections."""
    return [
        *small.cases(criu),
        *standstill.cases(extent),
        *plain.cases(extent, criu),
        *kept.cases(extent),
        *wire.cases(extent),
        *live.cases(extent),
        *slowdown.cases(extent),
        *services.cases(extent),
        *crowd.cases(extent),
        *scale.cases(extent),
    ]


def document(machine: dict[str, Any], criu: Criu, results: Results) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "format": 1,
        "machine": machine,
        "criu": {"path": criu.path, "version": criu.version, "why-not": criu.why_not},
        "rows": [row.document() for row in results.rows],
        "left-out": [
            {"section": case.section, "name": case.name, "why": why} for case, why in results.left_out
        ],
    }


def say(row: Row) -> None:
    """One line for a sample."""
    if row.failed is not None:
        said = f"FAILED: {row.failed}"
    else:
        figures = row.samples[-1].figures
        said = ", ".join(f"{name} {told(name, value)}" for name, value in figures.items())
        said += "".join(f"; WRONG: not {name}" for name, holds in row.checks.items() if not holds)
    print(f"{row.case.section}: {row.case.name}: {said}", flush=True)


def _keep_bytecode() -> None:
    """Let commands find their modules compiled, as they are wherever this was installed."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT / "pipeline")], check=True)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    extents = parser.add_mutually_exclusive_group()
    extents.add_argument(
        "--full", dest="extent", action="store_const", const=FULL, default=USUAL, help="hours"
    )
    extents.add_argument(
        "--tiny", dest="extent", action="store_const", const=TINY, help="only to see that it works"
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="this section (again: and that one)"
    )
    parser.add_argument("--rounds", type=int, help="times that each case is measured, at most")
    parser.add_argument("--minutes", type=float, help="no case is begun after that")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "bench", help="folder of the results")
    arguments = parser.parse_args(argv)
    extent: Extent = arguments.extent
    become_subreaper()
    _keep_bytecode()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    machine = describe()
    with tempfile.TemporaryDirectory(dir=shm, prefix="pipeline-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        trial = folder / "criu"
        trial.mkdir()
        criu = Criu.find(trial)
        print(f"CRIU: {criu.version if criu.why_not is None else f'none: {criu.why_not}'}", flush=True)
        cases = [
            case for case in all_cases(extent, criu) if not arguments.only or case.section in arguments.only
        ]
        results = run(
            cases,
            folder,
            most_rounds=arguments.rounds or extent.rounds,
            budget_s=60 * (arguments.minutes or extent.minutes),
            said=say,
        )
    found = document(machine, criu, results)
    arguments.to.mkdir(parents=True, exist_ok=True)
    (arguments.to / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.to / "results.html").write_text(page(found))
    for case, why in results.left_out:
        print(f"not measured: {case.section}: {case.name}: {why}")
    print(f"written: {arguments.to}/results.json, results.html")
    return 0 if results.are_good else 1


if __name__ == "__main__":
    sys.exit(main())
