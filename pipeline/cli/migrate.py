"""Move a running tree to a host where `serve` listens.

The source is ended only after the destination has said that its tree is complete;
never do two run. Exit code 4 means that this side cannot know: the text then says
which side holds what and the command that settles it.
"""

from __future__ import annotations

import argparse

from pipeline.cli import pacing, placing, policies, progress, render

EXAMPLE = "  python -m pipeline migrate --pid 4242 --to other.example:7000 --secret-file secret"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plaintext",
        action="store_true",
        help="no TLS: both sides prove the secret, but everybody on the way can read the memory of the tree",
    )
    parser.add_argument("--pid", type=int, required=True, metavar="PID", help="the root of the tree")
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="where `serve` listens")
    parser.add_argument("--secret-file", metavar="FILE", help="the secret that both sides share (mode 0600)")
    parser.add_argument(
        "--mode",
        choices=("stop", "precopy", "postcopy", "hybrid"),
        default="precopy",
        help="when memory travels: while the tree stands still, before that in rounds, behind it, or both "
        "(default: precopy)",
    )
    pacing.add_rounds(parser)
    parser.add_argument(
        "--on-timeout",
        choices=("switch", "cancel", "postcopy"),
        default="switch",
        help="when the rounds end and --max-downtime cannot be kept (default: switch)",
    )
    parser.add_argument(
        "--auto-converge",
        action="store_true",
        help="hold the tree back during the rounds if it writes faster than it can be sent: 20%% of its time at first, "
        "10%% more with each round that brings nothing, 99%% at most",
    )
    placing.add_external(parser)
    policies.add_dump(parser)
    placing.add_compress(parser)
    parser.add_argument(
        "--streams",
        type=int,
        default=1,
        metavar="N",
        help="connections that memory is spread over (default: 1; more only pay where one cannot fill the line)",
    )
    progress.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def execute(arguments: argparse.Namespace) -> int:
    import pipeline
    from pipeline.cli import recipe, within
    from pipeline.kernel import descriptor_table
    from pipeline.userns import externals

    outside = externals.parse(arguments.external)
    policy = policies.of_dump(arguments)
    subject = {"pid": arguments.pid, "to": arguments.to, "mode": arguments.mode}
    with progress.listener("migrate", arguments, **subject) as listener:
        place = within.enter("migrate", arguments.pid)
        descriptor_table.make_room_first()
        outside = {kind: place.path(path) for kind, path in outside.items()}
        secret_file = arguments.secret_file and place.path(arguments.secret_file)
        result = recipe.run(
            lambda: pipeline.migrate(
                place.pid,
                arguments.to,
                secret_file=secret_file,
                mode=arguments.mode,
                max_downtime_s=arguments.max_downtime,
                max_rounds=arguments.max_rounds,
                on_timeout=arguments.on_timeout,
                auto_converge=arguments.auto_converge,
                plaintext=arguments.plaintext,
                externals=outside,
                policy=policy,
                compress=arguments.compress,
                streams=arguments.streams,
                progress=listener,
            ),
            deaf_then=True,
        )
        listener.completed(result.root_pid, result.figures, result.notes)
    if arguments.json:
        render.document(result)
    else:
        render.say(f"migrate: the tree of pid {arguments.pid} runs at {arguments.to} and is gone from here")
        render.say(f"migrate: {render.figures(result.figures)}")
        for note in result.notes:
            render.say(f"migrate: note: {note}")
        if hint := pacing.advice(arguments, result.figures):
            render.say(f"migrate: {hint}")
    return 0
