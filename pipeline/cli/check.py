"""Say what this host can do, row by row, with the remedy for each missing thing.

With --pid: the tree's namespaces and who lives in them, and everything that would stop it from
being dumped, all of it at once, for which it stands still for some milliseconds; the exit code is
then 3. It is 1 where this host lacks something that nothing works without (NO; a small no costs
only what its row says).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.cli import forest, policies, render, within

if TYPE_CHECKING:
    from pipeline.check import CheckReport

EXAMPLE = "  python -m pipeline check\n  python -m pipeline check --pid 4242"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, metavar="PID", help="also look at the tree whose root is PID")
    policies.add_dump(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def execute(arguments: argparse.Namespace) -> int:
    from pipeline.check import host_rows, report_on
    from pipeline.cli import recipe

    policy = policies.of_dump(arguments)
    rows = host_rows()  # from here, not from where the tree is
    pid = None if arguments.pid is None else within.enter("check", arguments.pid).pid
    report = recipe.run(lambda: report_on(pid, rows, policy))
    if arguments.json:
        render.document(_plain(report))
    else:
        _show(report, pid)
    if report.blockers:
        return 3
    return 0 if report.ok else 1


def _plain(report: CheckReport) -> dict[str, object]:
    return {
        "ok": report.ok,
        "host": [
            {
                "name": row.name,
                "ok": row.ok,
                "needed": row.needed,
                "detail": row.detail,
                "remedy": row.remedy,
            }
            for row in report.rows
        ],
        "blockers": [render.blocker(blocker) for blocker in report.blockers],
        "namespaces": None if report.portrait is None else forest.as_document(report.portrait),
    }


def _show(report: CheckReport, pid: int | None) -> None:
    width = max((len(row.name) for row in report.rows), default=0)
    for row in report.rows:
        answer = "yes" if row.ok else "NO" if row.needed else "no"
        print(f"{answer:<3}  {row.name:<{width}}  {row.detail}".rstrip())
        if not row.ok and row.remedy:
            print(f"     {'':<{width}}  -> {row.remedy}")
    if pid is None:
        return
    print()
    if report.portrait is not None:
        forest.draw(report.portrait)
        print()
    if not report.blockers:
        print(f"pid {pid}: nothing stops this tree from being carried")
        return
    count = len(report.blockers)
    print(f"pid {pid}: {count} thing{'s stop' if count > 1 else ' stops'} this tree from being carried")
    for item in report.blockers:
        print(f"  {item.subject}: {item.reason}")
        if item.remedy:
            print(f"     -> {item.remedy}")
