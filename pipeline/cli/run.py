"""Start a program in new namespaces, nested as deep as wanted; without root too.

MAP is INNER:OUTER:COUNT[,INNER:OUTER:COUNT...], for uids and gids alike, or auto: own ids
as 0, and behind it the ranges of /etc/subuid and /etc/subgid. Without it own ids become 0.
--userns may be given several times, from the outermost in; the other namespaces belong to
the innermost. With --pidns the program is pid 1 there, and with --mntns too it has a fresh
/proc. Without --detach the command waits for the program, forwards signals and exits with
its status.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

from pipeline.cli import pidfile, render
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.run import Granted, IdMap

EXAMPLE = (
    "  python -m pipeline run --userns --pidns --mntns -- ps ax\n"
    "  python -m pipeline run --userns=auto -- sh -c 'id; cat /proc/self/uid_map'\n"
    "  python -m pipeline run --userns=0:100000:65536 --userns=0:1000:100 --detach --pidfile pid -- sleep 1000"
)

_FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)

_OTHERS = {
    "pidns": "NEWPID",
    "mntns": "NEWNS",
    "ipcns": "NEWIPC",
    "utsns": "NEWUTS",
    "netns": "NEWNET",
    "timens": "NEWTIME",
    "cgroupns": "NEWCGROUP",
}


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Options before the first ``--``, the program and its arguments after it."""
    if "--" not in words:
        return (words if {"-h", "--help"} & set(words) else []), []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "python -m pipeline run [--userns[=MAP]]... [--pidns] [--mntns] [--ipcns] [--utsns] [--netns]\n"
        "           [--timens] [--cgroupns] [--detach] [--pidfile FILE] -- COMMAND [ARG...]"
    )
    parser.add_argument(
        "--userns",
        action="append",
        nargs="?",
        const="",
        metavar="MAP",
        help="a new user namespace (repeatable)",
    )
    for name in _OTHERS:
        parser.add_argument(
            f"--{name}", action="store_true", help=f"a new {name.removesuffix('ns')} namespace"
        )
    parser.add_argument("--detach", action="store_true", help="return at once and print the program's pid")
    parser.add_argument(
        "--pidfile", metavar="FILE", help="write the program's pid, as seen from here, to FILE"
    )


def _map(text: str) -> IdMap | Granted | None:
    from pipeline import run

    if text == "auto":
        return "auto"
    return run.parse_map(text) if text else None


def execute(arguments: argparse.Namespace) -> int:
    if not arguments.command:
        raise UsageError("no COMMAND; write it after --")
    pidfile.check(arguments.pidfile)
    from pipeline import run
    from pipeline.kernel.syscalls import CLONE

    others = 0
    for name, flag in _OTHERS.items():
        if getattr(arguments, name):
            others |= CLONE[flag]
    surroundings = run.Surroundings(
        users=[_map(text) for text in arguments.userns or ()],
        others=others,
        detach=arguments.detach,
    )
    blocked = () if arguments.detach else (*_FORWARDED, signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    pid = run.start(arguments.command, surroundings, sorted(mask))
    pidfile.write(arguments.pidfile, pid)
    if arguments.detach:
        print(pid, flush=True)
        return 0
    code = os.waitstatus_to_exitcode(run.wait(pid, _FORWARDED))
    if code < 0:
        render.say(f"run: ended by {signal.Signals(-code).name}")
        return 128 - code
    return code
