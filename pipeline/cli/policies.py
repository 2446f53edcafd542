"""The options by which a person decides about states that have more than one good answer.

`check`, `dump` and `migrate` take those of the side that captures, `restore` and `serve` those of the side that
rebuilds. See `pipeline.policy`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

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
    parser.add_argument(
        "--external-fd",
        action="append",
        default=[],
        metavar="NAME|any",
        help="this open file has an end outside of the tree, which the destination shall give (--inherit-fd): "
        "pipe:[123], fifo:/path, tty:/dev/pts/3 or socket:[123], as `check` names it. any: all pipes, FIFOs and "
        "terminals that have one; may be repeated",
    )
    parser.add_argument(
        "--shell-job",
        action="store_true",
        help="the tree is a job of a shell that stays behind: its terminal is not carried, `restore --shell-job` gives "
        "it another one",
    )
    parser.add_argument(
        "--with-files",
        action="append",
        default=[],
        metavar="GLOB",
        help="take the content of open and mapped files along whose names match, for a destination that lacks them; "
        "without a / in front, names below the working directory are meant (may be given several times)",
    )
    parser.add_argument(
        "--file-events",
        choices=("refuse", "drop"),
        default="refuse",
        help="events of inotify and fanotify that the program has not read, and that cannot be carried: wait a little, "
        "then refuse and name them (default), or drop them",
    )


def of_dump(arguments: argparse.Namespace) -> DumpPolicy:
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    names = frozenset(arguments.external_fd)
    for name in names - {"any"}:
        if not name.startswith(("pipe:[", "fifo:/", "tty:/", "socket:[")):
            raise UsageError(
                f"--external-fd {name}: say pipe:[123], fifo:/path, tty:/dev/pts/3, socket:[123] or any"
            )
    return DumpPolicy(
        tcp=arguments.tcp,
        cgroup=arguments.cgroup,
        udp_queue=arguments.udp_queue,
        unix_outside=arguments.unix_outside,
        external_fds=names,
        shell_job=arguments.shell_job,
        with_files=tuple(arguments.with_files),
        file_events=arguments.file_events,
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
    parser.add_argument(
        "--inherit-fd",
        action="append",
        default=[],
        metavar="NAME=FD|PATH",
        help="what takes the place of an end outside of the tree, by the name that `dump` and `inspect` say: a "
        "descriptor of this command, such as 'pipe:[123]=5', or a path that is opened; may be repeated",
    )
    parser.add_argument(
        "--files",
        choices=("same", "any"),
        default="same",
        help="files that the tree has open or mapped: they must be what they were at the source (default: build id of "
        "ELF files, size and modification time of others), or any file of that name will do",
    )
    parser.add_argument(
        "--with-files",
        action="append",
        default=[],
        metavar="GLOB",
        help="let the image make lacking files of these names here whoever they belong to; without, it makes what "
        "the tree itself would be allowed to (may be given several times)",
    )


def of_restore(arguments: argparse.Namespace) -> RestorePolicy:
    """What they say.

    Raises:
        UsageError: an option is not of its form.
    """
    if arguments.cgroup not in {"keep", "ignore"} and not arguments.cgroup.startswith("/"):
        raise UsageError(f"--cgroup {arguments.cgroup}: say keep, ignore, or a path that begins with /")
    return RestorePolicy(
        cgroup=arguments.cgroup,
        udp_queue=arguments.udp_queue,
        clocks=arguments.clocks,
        inherited=_inherited(arguments.inherit_fd),
        shell_job=getattr(arguments, "shell_job", False),
        files=arguments.files,
        with_files=tuple(arguments.with_files),
    )


def _inherited(texts: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, given = text.rpartition("=")
        if not equals or not given or ":" not in name:
            raise UsageError(
                f"--inherit-fd {text}: say NAME=FD or NAME=PATH, such as 'pipe:[123]=5' or tty:/dev/pts/3=/dev/null"
            )
        if name in found:
            raise UsageError(f"--inherit-fd {text}: {name} is given twice")
        if given.isdecimal():
            try:
                os.fstat(int(given))
            except OSError:
                raise UsageError(
                    f"--inherit-fd {text}: this command has no descriptor {given} (in a shell: {given}>FILE behind it)"
                ) from None
        found[name] = given
    return found
