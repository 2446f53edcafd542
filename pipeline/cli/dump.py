"""Write the tree of a process, with all its descendants and threads, into an image.

The tree is ended once the image is complete and synced, unless it is to be left
running or stopped. IMAGE is a directory (new or empty), file://..., s3://bucket/prefix,
or - for a stream on stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Literal

from pipeline.cli import inherited, pacing, placing, policies, progress, render
from pipeline.errors import UsageError

EXAMPLE = (
    "  python -m pipeline run --userns --detach --pidfile pid -- sleep 1000\n"
    '  python -m pipeline dump --pid "$(cat pid)" --to image\n'
    "  python -m pipeline restore --from image --detach\n"
    "how far it is, for a program to read:\n"
    "  python -m pipeline dump --pid PID --to image --progress json 2>&1 | tee events.jsonl\n"
    "a program that runs in a pipeline, and a job of this shell that ^Z has stopped:\n"
    "  python -m pipeline dump --pid PID --to image --external-fd any\n"
    '  python -m pipeline dump --pid "$(jobs -p %1)" --to job --shell-job'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=int, required=True, metavar="PID", help="the root of the tree")
    parser.add_argument("--to", required=True, metavar="IMAGE", help="a directory, a URL, or - for stdout")
    after = parser.add_mutually_exclusive_group()
    after.add_argument(
        "--leave-running", action="store_true", help="the tree goes on, as soon as all of it was read"
    )
    after.add_argument("--leave-stopped", action="store_true", help="the tree is left stopped (SIGSTOP)")
    parser.add_argument(
        "--mode",
        choices=("stop", "precopy"),
        help="when memory is written: while the tree stands still, or before that in rounds "
        "(default: precopy; for --to -, and for many processes of less than a MB each, stop)",
    )
    pacing.add_rounds(parser)
    parser.add_argument(
        "--parent",
        metavar="IMAGE",
        help="an earlier image: its pages are not stored again where they are the same, and both are needed",
    )
    parser.add_argument(
        "--digests",
        action="store_true",
        help="keep a digest of each page: a later dump with --parent IMAGE need not read this one",
    )
    placing.add_external(parser)
    policies.add_dump(parser)
    placing.add_compress(parser)
    progress.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def execute(arguments: argparse.Namespace) -> int:
    if arguments.to == "-" and arguments.json:
        arguments.json = False  # not even the error may go to stdout
        raise UsageError("--json and --to - both want stdout; write the image elsewhere")
    if arguments.to == "-" and inherited.was_closed(1):
        raise UsageError("--to - writes the image to stdout, which is closed")
    if arguments.to == "-" and os.isatty(sys.stdout.fileno()):
        raise UsageError("--to - would write the image to this terminal; redirect stdout")
    leave: Literal["end", "running", "stopped"] = "end"
    if arguments.leave_running:
        leave = "running"
    elif arguments.leave_stopped:
        leave = "stopped"
    import pipeline
    from pipeline.cli import recipe, within
    from pipeline.kernel import descriptor_table
    from pipeline.userns import externals

    outside = externals.parse(arguments.external)
    policy = policies.of_dump(arguments)
    with progress.listener("dump", arguments, pid=arguments.pid, to=arguments.to) as listener:
        place = within.enter("dump", arguments.pid)
        descriptor_table.make_room_first()
        to = place.path(arguments.to)
        parent = place.path(arguments.parent) if arguments.parent is not None else None
        outside = {kind: place.path(path) for kind, path in outside.items()}
        result = recipe.run(
            lambda: pipeline.dump(
                place.pid,
                to,
                leave=leave,
                mode=arguments.mode,
                max_downtime=arguments.max_downtime,
                max_rounds=arguments.max_rounds,
                parent=parent,
                digests=arguments.digests,
                externals=outside,
                policy=policy,
                compress=arguments.compress,
                progress=listener,
            ),
            deaf_then=True,
        )
        listener.completed(arguments.pid, result.figures, result.notes)
    if arguments.json:
        render.document({**render.plain(result), "root_pid": arguments.pid})
    else:
        outcome = {"end": "ended", "running": "still running", "stopped": "stopped"}[leave]
        render.say(f"dump: pid {arguments.pid} is in {arguments.to}; the tree is {outcome}")
        render.say(f"dump: {render.figures(result.figures)}")
        for note in result.notes:
            render.say(f"dump: note: {note}")
        if leave == "running" and (hint := pacing.advice(arguments, result.figures)):
            render.say(f"dump: {hint}")
        if result.external_ends:
            render.say(f"dump: to be given to the restore: {', '.join(result.external_ends)}")
    return 0
