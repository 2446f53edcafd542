"""The options by which a person decides about states that have more than one good answer.

`check`, `dump` and `migrate` take those of the side that captures, `restore` and `serve` those of the side that
rebuilds. See `pipeline.policy`.
"""

from __future__ import annotations

import argparse

from pipeline.errors import UsageError
from pipeline.policy import DumpPolicy, RestorePolicy


def add_dump(parser: argparse.ArgumentParser) -> None:
    """Add the options of check, dump and migrate."""
    parser.add_argument(
        "--tcp",
        choices=("established", "close", "refuse"),
        default="established",
        help="TCP connections: carry them (default), close them at the destination, or refuse and name them",
    )
    parser.add_argument(
        "--cgroup",
        choices=("keep", "ignore"),
        default="keep",
        help="cgroups that only the tree lives in: carry them with their limits (default), or leave them behind",
    )
    parser.add_argument(
        "--udp-queue",
        choices=("carry", "drop", "refuse"),
        default="carry",
        help="datagrams that wait to be read: carry them (default; those of ping, raw and packet sockets are refused), "
        "drop them, or refuse and name them",
    )
    parser.add_argument(
        "--unix-outside",
        choices=("refuse", "close"),
        default="refuse",
        help="unix sockets connected to a process outside the tree: refuse and name them (default), or close them: the "
        "program finds that the other side hung up",
    )


def of_dump(arguments: argparse.Namespace) -> DumpPolicy:
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    return DumpPolicy(
        tcp=arguments.tcp,
        cgroup=arguments.cgroup,
        udp_queue=arguments.udp_queue,
        unix_outside=arguments.unix_outside,
    )


def add_restore(parser: argparse.ArgumentParser) -> None:
    """Add the options of restore and serve."""
    parser.add_argument(
        "--cgroup",
        default="keep",
        metavar="keep|ignore|PATH",
        help="cgroups that came with the tree: make them where they were (default), put the tree into the cgroup of "
        "this command, or make them in the cgroup PATH, such as /trees",
    )
    parser.add_argument(
        "--udp-queue",
        choices=("carry", "drop"),
        default="carry",
        help="unread datagrams of the image: queue them again (default), or drop them",
    )
    parser.add_argument(
        "--clocks",
        choices=("auto", "keep", "host"),
        default="auto",
        help="CLOCK_MONOTONIC and CLOCK_BOOTTIME go on from what they said at the dump, by a time namespace around the "
        "tree: where they would jump otherwise, as after another boot (default), always, or never",
    )


def of_restore(arguments: argparse.Namespace) -> RestorePolicy:
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    if arguments.cgroup not in {"keep", "ignore"} and not arguments.cgroup.startswith("/"):
        raise UsageError(f"--cgroup {arguments.cgroup}: say keep, ignore, or a path that begins with /")
    return RestorePolicy(cgroup=arguments.cgroup, udp_queue=arguments.udp_queue, clocks=arguments.clocks)
