"""The command line: parse, call, render; exit codes.

Only the module of the command that was asked for is imported, and that module
imports its recipe only once the arguments are known to be good.

Exit codes: 0 done; 1 failed, the source runs as before; 2 usage; 3 refused before
anything was touched; 4 in doubt; 130 and 143 cancelled by SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

from pipeline.cli import inherited
from pipeline.cli.render import fail
from pipeline.errors import PipelineError, exhausted

PROGRAM = "python -m pipeline"


class Command(Protocol):
    """What a module of this package must offer."""

    #: an example that works, shown by ``--help``
    EXAMPLE: str

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, /) -> None:
        """Declare the command's options."""

    @staticmethod
    def execute(arguments: argparse.Namespace, /) -> int:
        """Do it; returns the exit code. PipelineErrors are rendered by the caller."""


class Entry(NamedTuple):
    """A command's module in this package and its line in the overview."""

    module: str
    summary: str


COMMANDS = {
    "check": Entry("check", "say what this host can do, and what would stop a tree from being carried"),
    "run": Entry("run", "start a program in new, nested namespaces"),
    "dump": Entry("dump", "write a process tree into an image"),
    "restore": Entry("restore", "rebuild a process tree from an image"),
    "serve": Entry("serve", "receive trees from another host and rebuild them straight from the wire"),
    "migrate": Entry("migrate", "move a running tree to a host where `serve` listens"),
    "inspect": Entry("inspect", "show what an image holds"),
    "report": Entry("report", "draw the event log of a migration as one page of HTML"),
    "clean": Entry("clean", "remove what a killed command left behind"),
    "demo": Entry("demo", "move a tree in three levels of user namespaces between two hosts made here"),
}


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {entry.summary}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTION...]",
        description="Checkpoint, restore and live migration of Linux process trees in nested user namespaces.",
        epilog=f"commands:\n{listing}\n\n`{PROGRAM} COMMAND --help` shows each with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=(command.__doc__ or "").strip(),
        epilog=f"example:\n{command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        overview = _overview()
        arguments, rest = overview.parse_known_args(argv)
        if arguments.version:
            from pipeline import __version__

            print(__version__)
            return 0
        if rest:
            overview.error(f"no command {rest[0]!r}; there are: {', '.join(COMMANDS)}")
        overview.print_help(sys.stderr)
        return 2
    name, *rest = argv
    # A module has the protocol's attributes; the type checker cannot see that through its name.
    command = cast(Command, importlib.import_module(f"pipeline.cli.{COMMANDS[name].module}"))
    split: Callable[[list[str]], tuple[list[str], list[str]]] | None = getattr(command, "split", None)
    options, operands = split(rest) if split else (rest, [])
    arguments = _parser(name, command).parse_args(options)
    if split:
        arguments.command = operands
    try:
        return command.execute(arguments)
    except PipelineError as error:
        return fail(name, error, json=getattr(arguments, "json", False))
    except Exception as error:
        told = exhausted(error)
        if told is None:
            raise
        return fail(name, told, json=getattr(arguments, "json", False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse's own errors exit with 2)."""
    inherited.settle()
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # Before or after the recipe, where nothing is held; inside it SIGINT is a cancellation.
        return 130
    except RuntimeError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return 130  # in an import, where a class was made: Python 3.11 makes another error of what __set_name__ raises
    except BrokenPipeError:
        # The reader of our output went away; do not let the interpreter complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
