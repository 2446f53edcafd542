"""What a person may decide about states that have more than one good answer.

One record for the side that captures (check, dump, migrate), one for the side that rebuilds (restore,
serve). Every kind finds them in its scope; the command line builds them in `pipeline.cli.policies`.
Whatever is not decided has the default that loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tcp = Literal["established", "close", "refuse"]
UdpQueue = Literal["carry", "drop", "refuse"]
UdpQueueHere = Literal["carry", "drop"]
Clocks = Literal["auto", "keep", "host"]
Files = Literal["same", "any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpPolicy:
    """Decisions of whoever captures a tree.

    Args:
        tcp: what becomes of TCP connections: carried, closed, or refused by name.
        cgroup: whether the cgroups that only the tree lives in go along.
        udp_queue: what becomes of datagrams that wait to be read in UDP sockets: carried, dropped, or waited for and
            then refused by name. Those of ping, raw and packet sockets cannot be carried: they are dropped where this
            says so, else waited for and refused.
        unix_outside: what becomes of unix sockets that are connected to a process outside the tree: refused by
            name, or closed, as if that process had ended.
        external_fds: names of open files that have an end outside of the tree, such as ``pipe:[123]``, which the
            destination shall give; ``any``: all pipes, FIFOs and terminals that have one.
        shell_job: the tree may be a job of a shell outside: its terminal is the destination's to give.
        with_files: patterns of names of files whose content goes along, see `pipeline.resources.taken`.
        file_events: what becomes of events of inotify and fanotify that the tree has not read: waited for and then
            refused by name, or dropped.
    """

    tcp: Tcp = "established"
    cgroup: Literal["keep", "ignore"] = "keep"
    udp_queue: UdpQueue = "carry"
    unix_outside: Literal["refuse", "close"] = "refuse"
    external_fds: frozenset[str] = frozenset()
    shell_job: bool = False
    with_files: tuple[str, ...] = ()
    file_events: Literal["refuse", "drop"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePolicy:
    """Decisions of whoever rebuilds a tree.

    Args:
        cgroup: where the cgroups that came with the tree are made: ``keep``: where they were; ``ignore``: nowhere,
            all of it is in the restorer's; or the path of a cgroup to make them in.
        udp_queue: what becomes of the unread datagrams of an image: queued again, or dropped.
        clocks: whether CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree that shares those of its surroundings go on from
            what they said: where they would jump (auto), always (keep), or never (host).
        inherited: what takes the place of ends outside of the tree, by their names: the number of a descriptor of
            this process, or a path.
        stdio: descriptors 0, 1 and 2 of the tree that are such ends come from this process's own.
        shell_job: a tree that was a job of a shell becomes one of the shell that this process is a job of.
        files: whether files that are not what they were at the source (see `pipeline.resources.identity`) are
            refused (``same``) or used all the same (``any``).
        with_files: patterns of files that an image may make here where they are lacking, whoever they belong to.
        parent_stays: this process stays as the parent of the tree until that ends.
        moves: the source still stands, stopped, and holds what it held until the tree is let run here.
    """

    cgroup: str = "keep"
    udp_queue: UdpQueueHere = "carry"
    clocks: Clocks = "auto"
    inherited: Mapping[str, str] = field(default_factory=dict)
    stdio: bool = False
    shell_job: bool = False
    files: Files = "same"
    with_files: tuple[str, ...] = ()
    parent_stays: bool = False
    moves: bool = False
