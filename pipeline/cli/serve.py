"""Receive trees from `migrate` on another host and rebuild them straight from the wire.

Both sides prove that they know the same secret before anything else happens. Without
--secret-file one is made up, and the command to type on the other host is printed.
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import TYPE_CHECKING

from pipeline.cli import placing, policies, progress, render

if TYPE_CHECKING:
    from pipeline.restore import RestoredTree

EXAMPLE = (
    "  (umask 077; head -c 32 /dev/urandom | base64 > secret)\n"
    "  python -m pipeline serve --listen 127.0.0.1:7000 --secret-file secret --once"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", required=True, metavar="HOST:PORT", help="where to listen; port 0 picks a free one"
    )
    parser.add_argument("--secret-file", metavar="FILE", help="the secret that both sides share (mode 0600)")
    parser.add_argument(
        "--plaintext",
        action="store_true",
        help="no TLS: both sides prove the secret, but everybody on the way can read the memory of the tree",
    )
    parser.add_argument("--once", action="store_true", help="end after one tree has arrived")
    parser.add_argument(
        "--new-pidns", action="store_true", help="rebuild each tree in a pid namespace of its own"
    )
    placing.add_arguments(parser)
    policies.add_restore(parser)
    progress.add_arguments(parser)


def execute(arguments: argparse.Namespace) -> int:
    # before anything here opens files, whose numbers somebody could mean
    policy = policies.of_restore(arguments)
    import pipeline
    from pipeline.cli import recipe
    from pipeline.kernel import descriptor_table
    from pipeline.userns import cradle, externals

    outside = externals.parse(arguments.external)
    # before there are threads: behind them the table would wait, and a plain user could not enter a user namespace
    descriptor_table.make_room_first()
    cradle.enter()
    with progress.listener("serve", arguments, listen=arguments.listen) as listener:

        def listening(host: str, port: int, secret: str | None) -> None:
            listener.listening(host, port)
            _listening(host, port, secret)

        def restored(tree: RestoredTree) -> None:
            listener.restored(tree.root_pid, tree.figures, tree.notes)
            _restored(tree)

        recipe.run(
            lambda: pipeline.serve(
                arguments.listen,
                secret_file=arguments.secret_file,
                once=arguments.once,
                new_pidns=arguments.new_pidns,
                map=arguments.map,
                unmapped=arguments.unmapped,
                externals=outside,
                policy=policy,
                on_listening=listening,
                on_restored=restored,
                on_message=lambda text: render.say(f"serve: {text}"),
                plaintext=arguments.plaintext,
                progress=listener,
            )
        )
        listener.completed()
    return 0


def _listening(host: str, port: int, secret: str | None) -> None:
    shown = f"[{host}]" if ":" in host else host
    render.write(f"listening on {shown}:{port}", sys.stdout)
    if secret is None:
        return
    reachable = socket.gethostname() if host in {"0.0.0.0", "::"} else shown
    render.write(
        f"on the other host:\n"
        f"  (umask 077; echo {secret} > pipeline-secret)\n"
        f"  python -m pipeline migrate --pid PID --to {reachable}:{port} --secret-file pipeline-secret",
        sys.stdout,
    )


def _restored(tree: RestoredTree) -> None:
    render.write(f"restored: root pid {tree.root_pid}", sys.stdout)
    for note in tree.notes:
        render.say(f"serve: note: {note}")
    render.say(f"serve: {render.figures(tree.figures)}")
