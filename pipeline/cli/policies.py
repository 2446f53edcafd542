"""The options by which a person decides about states that have more than one good answer.

`check`, `dump` and `migrate` take those of the side that captures, `restore` and `serve` those of the side that
rebuilds. See `pipeline.policy`.
"""

from __future__ import annotations

import argparse

from pipeline.policy import DumpPolicy, RestorePolicy


def add_dump(parser: argparse.ArgumentParser) -> None:
    """Add the options of check, dump and migrate."""
    parser.add_argument(
        "--tcp",
        choices=("established", "close", "refuse"),
        default="established",
        help="TCP connections: carry them (default), close them at the destination, or refuse and name them",
    )


def of_dump(arguments: argparse.Namespace) -> DumpPolicy:
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    return DumpPolicy(tcp=arguments.tcp)


def add_restore(parser: argparse.ArgumentParser) -> None:
    """Add the options of restore and serve."""


def of_restore(arguments: argparse.Namespace) -> RestorePolicy:  # noqa: ARG001
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    return RestorePolicy()
