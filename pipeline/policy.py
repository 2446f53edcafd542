"""What a person may decide about states that have more than one good answer.

One record for the side that captures (check, dump, migrate), one for the side that rebuilds (restore,
serve). Every kind finds them in its scope; the command line builds them in `pipeline.cli.policies`.
Whatever is not decided has the default that loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tcp = Literal["established", "close", "refuse"]
UdpQueue = Literal["carry", "drop", "refuse"]
UdpQueueHere = Literal["carry", "drop"]
Clocks = Literal["auto", "keep", "host"]


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
    """

    tcp: Tcp = "established"
    cgroup: Literal["keep", "ignore"] = "keep"
    udp_queue: UdpQueue = "carry"
    unix_outside: Literal["refuse", "close"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePolicy:
    """Decisions of whoever rebuilds a tree.

    Args:
        cgroup: where the cgroups that came with the tree are made: ``keep``: where they were; ``ignore``: nowhere,
            all of it is in the restorer's; or the path of a cgroup to make them in.
        udp_queue: what becomes of the unread datagrams of an image: queued again, or dropped.
        clocks: whether CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree that shares those of its surroundings go on from
            what they said: where they would jump (auto), always (keep), or never (host).
    """

    cgroup: str = "keep"
    udp_queue: UdpQueueHere = "carry"
    clocks: Clocks = "auto"
