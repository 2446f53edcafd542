"""The options that say where a tree lies: its ids (of restore and serve), and its external namespaces (of all).

And how its memory travels (of dump and migrate).
"""

from __future__ import annotations

import argparse


def add_external(parser: argparse.ArgumentParser, devices: str = "") -> None:
    """Add --external; `devices`: what its help says of devices."""
    parser.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="KIND=PATH",
        help="the external namespace of this kind (net, uts, ipc, cgroup) is not that of this command but the one "
        "at PATH, such as net=/run/netns/blue; may be repeated" + devices,
    )


def add_compress(parser: argparse.ArgumentParser) -> None:
    """Add --compress, of dump and migrate."""
    parser.add_argument(
        "--compress",
        choices=("none", "lz4", "zstd", "auto"),
        default="none",
        help="how memory is compressed: not at all (default), with lz4 (fast), with zstd (smaller), or with whichever "
        "is measured to pay on the way to the destination",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --map, --unmapped and --external."""
    add_external(
        parser,
        ". veth:NAME=PEER[@BRIDGE]: the other end of the tree's device NAME is made here, is called PEER, and is put "
        "under BRIDGE. macvlan:NAME=LOWER: the tree's device NAME lies on LOWER here",
    )
    parser.add_argument(
        "--map",
        default="same",
        metavar="same|auto|BASE:COUNT",
        help="where the ids that the tree's outermost user namespaces map to lie here: where they lay (default), in "
        "the ranges that subuid(5) gives this user, or in COUNT ids from BASE on, such as 200000:65536",
    )
    parser.add_argument(
        "--unmapped",
        choices=("refuse", "overflow"),
        default="refuse",
        help="ids of the tree that have no place here: refuse and name them (default), or let the overflow id "
        "(65534) stand for them",
    )
