"""Rebuild a tree from an image: same pids, same ids, same namespaces.

Without --detach the command stays as the tree's parent, forwards signals and exits
with the root's status; with it, it returns when the tree runs and prints the root's pid.

What had an end outside of the tree when it was dumped (dump --external-fd, `inspect` lists the names) is given
here: by --inherit-fd; else, without --detach, standard input, output and error of the tree are this command's own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from pipeline.cli import inherited, pidfile, placing, policies, progress, render
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pipeline.policy import RestorePolicy
    from pipeline.restore import RestoredTree

EXAMPLE = (
    "  python -m pipeline restore --from image\n"
    "  python -m pipeline restore --from image --map 200000:65536\n"
    "  python -m pipeline restore --from image | tee log\n"
    "  python -m pipeline restore --from image --inherit-fd 'pipe:[4711]=5' 5>log --detach\n"
    "  python -m pipeline restore --from job --shell-job\n"
    "  python -m pipeline restore --from s3://bucket/prefix --detach --pidfile pid\n"
    "  python -m pipeline restore --from s3://bucket/prefix --lazy"
)

#: what is passed on to the tree while the command stays as its parent
FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)

#: what a terminal sends to all of the group in the foreground
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", required=True, metavar="IMAGE", help="a directory, a URL, or - for stdin"
    )
    parser.add_argument(
        "--detach", action="store_true", help="return when the tree runs, print its root's pid"
    )
    parser.add_argument("--pidfile", metavar="FILE", help="write the root's pid to FILE")
    parser.add_argument(
        "--new-pidns", action="store_true", help="rebuild the tree in a pid namespace of its own"
    )
    placing.add_arguments(parser)
    policies.add_restore(parser)
    parser.add_argument(
        "--shell-job",
        action="store_true",
        help="the tree was dumped as a job of a shell (dump --shell-job): it becomes a job of this one, with its "
        "terminal, and ^C, ^Z, fg and bg reach it; not with --detach",
    )
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="let the tree run before its memory is there, which comes as it is touched, and beside; needs root, and "
        "IMAGE in a directory or an object store; while that cannot be read, the tree waits",
    )
    progress.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, once the tree runs")


def execute(arguments: argparse.Namespace) -> int:
    pidfile.check(arguments.pidfile)
    if arguments.shell_job and arguments.detach:
        raise UsageError("--shell-job and --detach: a job stays with its shell; leave one of them out")
    if arguments.source == "-" and inherited.was_closed(0):
        raise UsageError("--from - reads the image from stdin, which is closed")
    if arguments.source == "-" and os.isatty(sys.stdin.fileno()):
        raise UsageError("--from - reads the image from stdin, which is a terminal")
    # before anything here opens files, whose numbers somebody could mean
    policy = policies.of_restore(arguments)
    import trio

    from pipeline.kernel import descriptor_table
    from pipeline.userns import cradle

    # before there are threads: behind them the table would wait, and a plain user could not enter a user namespace
    descriptor_table.make_room_first()
    cradle.enter()
    return trio.run(_main, arguments, policy)


async def _main(arguments: argparse.Namespace, policy: RestorePolicy) -> int:
    import trio

    import pipeline
    from pipeline.cli import recipe
    from pipeline.userns import externals

    with progress.listener("restore", arguments, source=arguments.source) as listener:
        build = partial(
            pipeline.restore,
            arguments.source,
            detach=arguments.detach,
            new_pidns=arguments.new_pidns,
            map=arguments.map,
            unmapped=arguments.unmapped,
            externals=externals.parse(arguments.external),
            policy=policy,
            lazy=arguments.lazy,
            on_message=lambda text: render.say(f"restore: {text}"),
            progress=listener,
        )
        if arguments.detach:
            tree = await recipe.cancellable(build)
            _announce(arguments, tree, listener)
            tree.close()
            return 0
        # Taken before the tree runs, so that no signal falls between its rebuild and its life.
        with trio.open_signal_receiver(*FORWARDED) as signals:
            tree = await recipe.cancellable(build)
            _announce(arguments, tree, listener)
            _let_go_of_ends(tree)
            if tree.terminal is not None:
                tree.terminal.greet()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_forward, signals, tree)
                    status = await tree.wait()
                    nursery.cancel_scope.cancel()
            finally:
                tree.close()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _let_go_of_ends(tree: RestoredTree) -> None:
    """What the tree was given is the tree's: when it closes a pipe, whoever is at the other end shall see that."""
    for fd in tree.given:
        if fd in {0, 1}:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            os.close(null)
        elif fd > sys.stderr.fileno():
            os.close(fd)


async def _forward(signals: AsyncIterator[int], tree: RestoredTree) -> None:
    async for number in signals:
        if number in _FROM_TERMINAL and tree.terminal is not None and tree.terminal.reaches(tree.root_pid):
            continue
        with suppress(ProcessLookupError):  # its status is on the way
            tree.send_signal(number)


def _announce(arguments: argparse.Namespace, tree: RestoredTree, listener: progress.Listener) -> None:
    listener.completed(tree.root_pid, tree.figures, tree.notes)
    pidfile.write(arguments.pidfile, tree.root_pid)
    if arguments.json:
        render.document({"root_pid": tree.root_pid, "figures": tree.figures, "notes": tree.notes})
        return
    if arguments.detach:
        print(tree.root_pid, flush=True)
    for note in tree.notes:
        render.say(f"restore: note: {note}")
    render.say(f"restore: the tree runs, its root is pid {tree.root_pid}")
    render.say(f"restore: {render.figures(tree.figures)}")
